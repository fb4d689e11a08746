"""Fine-tune RoBERTa on a GLUE task: ``python -m lightning_glue.train --task RTE``."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_glue import config as configuration
from lightning_glue.config import Config
from lightning_glue.errors import run_main
from lightning_glue.tasks import TRAINABLE, get_task

if TYPE_CHECKING:
    import pytorch_lightning as pl

    from lightning_glue.data import GlueDataModule
    from lightning_glue.module import GlueModule
    from lightning_glue.monitor import BestEvaluation
    from lightning_glue.pretrained import Pretrained
    from lightning_glue.tracking import MLflowTracker


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m lightning_glue.train",
        description="Fine-tune fairseq's RoBERTa on a GLUE task and track the run in MLflow.",
        epilog="Without --task and --experiment: the demo, generated SST-2 sentences and a small encoder.",
    )
    parser.add_argument("--task", metavar="TASK", help=f"one of {', '.join(TRAINABLE)}")
    parser.add_argument("--model", metavar="MODEL", help=f"one of {', '.join(configuration.options('model'))}, or the "
                        "path of a fairseq *.pt (default: minilm on CPU, roberta.base on GPUs)")  # fmt: skip
    parser.add_argument("--data", metavar="DATA", help="glue: $GLUE_DIR, else cache, else download (default); "
                        "sample: generated sentences")  # fmt: skip
    parser.add_argument("--experiment", metavar="NAME", help="a recipe below experiments/, such as paper/roberta_base")
    parser.add_argument("--gpus", metavar="N", help="GPUs on this machine; 0: CPU (default: one if there is one)")
    parser.add_argument("--procs", metavar="N", help="DDP processes on the CPU")
    parser.add_argument("--init-from", metavar="PATH|RUN_ID", help="start from this checkpoint's or run's encoder")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="any key of conf/, such as optimizer.lr=3e-5")
    return parser.parse_intermixed_args()


def compose(args: argparse.Namespace) -> Config:
    """The run's configuration from the command line."""
    flags = {"trainer.gpus": args.gpus, "trainer.procs": args.procs, "init_from": args.init_from}
    overrides = [f"{key}={configuration.quote(value)}" for key, value in flags.items() if value is not None]
    named = args.task or any(override.startswith("task=") for override in args.overrides)
    experiment = args.experiment or (None if named else "demo")
    chosen = args.model or args.experiment or any(override.startswith("model=") for override in args.overrides)
    model = args.model or (None if chosen or not named or args.gpus in (None, "0") else "roberta.base")
    return configuration.compose(
        overrides + args.overrides, task=args.task, model=model, data=args.data, experiment=experiment
    )


def build(config: Config) -> tuple[GlueModule, GlueDataModule, Pretrained]:
    """Model and data of a configuration."""
    from lightning_glue import sources
    from lightning_glue.data import GlueDataModule
    from lightning_glue.model import build_model, load_encoder
    from lightning_glue.module import GlueModule
    from lightning_glue.preprocess import prepare
    from lightning_glue.pretrained import load_pretrained

    task, data = get_task(config.task.name), config.data
    start = load_pretrained(config.model.source, config.model.tokenizer, data.bpe_dir, config.model.architecture)
    dropouts = {name: getattr(config.model, name) for name in ("dropout", "attention_dropout", "pooler_dropout")}
    model = build_model(start, task.num_outputs, dropouts)
    if config.init_from:
        from lightning_glue.checkpoint import model_state

        load_encoder(model, model_state(config.init_from, config.tracking.uri))

    record = {"config": configuration.flatten(config), "task": task.name, "start_sha256": start.sha256}
    module = GlueModule(model, task, config.optimizer, config.lr, record)
    datamodule = GlueDataModule(
        task,
        lambda: prepare(
            task,
            sources.glue_directory(task, data.source, data.glue_dir),
            start.tokenizer,
            sources.cache_dir(),
            data.on_bad_row,
        ),
        batch_size=data.batch_size,
        eval_tokens=data.eval_tokens,
        max_tokens=data.max_tokens,
        accumulate=config.trainer.accumulate,
        pool=data.length_pool,
        seed=config.seed,
    )
    return module, datamodule, start


def make_trainer(config: Config, callbacks: list[pl.Callback], tracker: MLflowTracker) -> pl.Trainer:
    import pytorch_lightning as pl

    from lightning_glue.hardware import resolve_devices, resolve_precision, resolve_strategy

    devices = resolve_devices(config.trainer)
    interval = config.trainer.val_check_interval
    return pl.Trainer(
        accelerator=devices.accelerator,
        devices=devices.devices,
        num_nodes=devices.nodes,
        strategy=resolve_strategy(devices),
        precision=resolve_precision(config.trainer, devices.accelerator),
        max_epochs=config.trainer.max_epochs,
        max_steps=config.trainer.max_steps,
        accumulate_grad_batches=config.trainer.accumulate,
        gradient_clip_val=config.trainer.gradient_clip_val or None,
        deterministic=config.trainer.deterministic,
        val_check_interval=int(interval) if interval > 1 else interval,
        use_distributed_sampler=False,  # batching.py shares the examples out
        num_sanity_val_steps=0,
        log_every_n_steps=1,  # TrainingMonitor keeps its own interval
        callbacks=callbacks,
        logger=tracker,
        enable_progress_bar=sys.stdout.isatty(),
        enable_model_summary=False,
    )


def make_callbacks(config: Config, checkpoints: str | Path | None) -> list[pl.Callback]:
    """Monitoring, the best and the last checkpoint in ``checkpoints``, early stopping if asked for.

    Process 0's folder holds for all: Lightning broadcasts it.
    """
    from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint, RichProgressBar

    from lightning_glue.monitor import BestEvaluation, EvaluationLine, TrainingMonitor

    monitor = get_task(config.task.name).selection_metric
    callbacks: list[pl.Callback] = [
        BestEvaluation(monitor),
        EvaluationLine(),
        TrainingMonitor(config.trainer.log_every),
    ]
    shared = {"dirpath": checkpoints, "enable_version_counter": False, "auto_insert_metric_name": False}
    callbacks += [
        ModelCheckpoint(filename="best", monitor=monitor, mode="max", save_weights_only=True, **shared),
        ModelCheckpoint(filename="last", save_on_train_epoch_end=False, **shared),
    ]
    if sys.stdout.isatty():
        callbacks.append(RichProgressBar())
    if config.trainer.early_stopping_patience is not None:
        callbacks.append(EarlyStopping(monitor, patience=config.trainer.early_stopping_patience, mode="max"))
    return callbacks


@contextmanager
def run_status(tracker: MLflowTracker) -> Iterator[None]:
    """Give the run its true final status: FINISHED, KILLED (Ctrl-C, SIGTERM) or FAILED with the traceback."""
    import traceback

    from pytorch_lightning.utilities.exceptions import SIGTERMException

    try:
        yield
    except (KeyboardInterrupt, SystemExit) as stop:
        tracker.finish("KILLED")
        cause = signal.SIGTERM if isinstance(stop, SIGTERMException) else signal.SIGINT
        print(f"stopped by {cause.name}; run: {tracker.describe()}", file=sys.stderr)
        sys.exit(128 + cause)
    except BaseException:
        tracker.log_text(traceback.format_exc(), "traceback.txt")
        tracker.finish("FAILED")
        raise
    tracker.finish("FINISHED")


def fit(
    config: Config,
    module: GlueModule,
    data: GlueDataModule,
    tracker: MLflowTracker,
    checkpoints: str | Path | None,
) -> BestEvaluation:
    """Train, evaluate at least once, and leave the best weights in ``module`` of process 0."""
    from lightning_glue.monitor import BestEvaluation
    from lightning_glue.pretrained import safe_load

    callbacks = make_callbacks(config, checkpoints)
    trainer = make_trainer(config, callbacks, tracker)
    trainer.fit(module, data)
    best = next(callback for callback in callbacks if isinstance(callback, BestEvaluation))
    if not best.values:  # max_steps ended training before the first evaluation
        trainer.validate(module, data, verbose=False)
        trainer.save_checkpoint(Path(trainer.checkpoint_callbacks[0].dirpath) / "best.ckpt", weights_only=True)
    elif trainer.is_global_zero:
        module.load_state_dict(safe_load(Path(trainer.checkpoint_callbacks[0].best_model_path))["state_dict"])
    return best


def conclude(
    config: Config,
    module: GlueModule,
    data: GlueDataModule,
    start: Pretrained,
    tracker: MLflowTracker,
    best: BestEvaluation,
) -> None:
    """In process 0: the best model as a fairseq directory, figures, predictions, the best metrics."""
    from lightning_glue import figures
    from lightning_glue.export import export
    from lightning_glue.preprocess import read_label_symbols

    task = module.task
    tracker.log_metrics({f"best/{name}": value for name, value in best.values.items()}, step=best.step)
    if config.tracking.checkpoints:
        symbols = [] if task.is_regression else read_label_symbols(data.prepared.directory)
        with tracker.artifact_folder("fairseq") as folder:
            export(module.model.cpu(), task, start.tokenizer, symbols, best.step, folder)
    drawn = {"learning_curves.png": figures.learning_curves(task, tracker.history)}
    for split, evaluation in best.evaluations.items():
        drawn |= figures.evaluation_figures(task, split, evaluation)
    tracker.log_figures(drawn)
    if config.trainer.predict:
        with tracker.artifact_folder("predictions") as folder:
            write_predictions(config, module, data, start, folder)


def write_predictions(
    config: Config, module: GlueModule, data: GlueDataModule, start: Pretrained, folder: Path
) -> None:
    """Leaderboard files of the task's test splits, and of AX for a model of MNLI."""
    import torch

    from lightning_glue import sources
    from lightning_glue.predict import write_submissions
    from lightning_glue.preprocess import prepare

    if torch.cuda.is_available() and config.trainer.gpus != "0":
        module.model.cuda()
    limits = {"eval_tokens": config.data.eval_tokens, "max_tokens": config.data.max_tokens}
    write_submissions(module.model, module.task, data.prepared, folder, **limits)
    if module.task.name == "MNLI":
        ax = get_task("AX")
        root = sources.glue_directory(ax, config.data.source, config.data.glue_dir)
        prepared = prepare(ax, root, start.tokenizer, sources.cache_dir(), config.data.on_bad_row)
        write_submissions(module.model, ax, prepared, folder, **limits)


def announce(config: Config, data: GlueDataModule) -> None:
    """Say what is about to be trained on."""
    data.setup("fit")
    kept = ", ".join(f"{name} {info.rows}" for name, info in data.prepared.splits.items())
    lost = sum(info.dropped + info.skipped for info in data.prepared.splits.values())
    cut = sum(split.truncated for split in data.splits.values())
    notes = [f"{lost} malformed rows left out"] * bool(lost) + [f"{cut} examples cut to length"] * bool(cut)
    source = "generated sample, not GLUE" if config.data.source == "sample" else "GLUE"
    print(f"{config.task.name} ({source}): {'; '.join([kept, *notes])}")
    print(f"{config.model.name}, {config.trainer.max_epochs} epochs, batch {config.data.batch_size}, lr {config.lr:g}")


def report(config: Config, tracker: MLflowTracker, best: BestEvaluation) -> None:
    """Say what came out, where it is and what to do next."""
    print(f"\nbest evaluation (step {best.step}):")
    for name, value in sorted(best.values.items()):
        print(f"  {name:<24}{value:.4f}")
    print(f"run: {tracker.describe()}")
    default_store = tracker.uri == f"sqlite:///{Path.cwd() / 'mlflow.db'}"
    sample = " --data sample" if config.data.source == "sample" else ""
    commands = {
        "mlflow ui" if default_store else f"mlflow ui --backend-store-uri {tracker.uri}": "compare runs",
        f"python -m lightning_glue.evaluate {tracker.run_id}{sample}": "score it again",
        "python -m lightning_glue.train --task RTE --model minilm": "train on real GLUE data",
    }
    if config.task.name == "MNLI":
        commands[f"python -m lightning_glue.train --task RTE --init-from {tracker.run_id}"] = "start RTE from it"
    print("next:")
    for command, purpose in commands.items():
        print(f"  {command}\n      {purpose}")


def quiet() -> None:
    """Keep Lightning's advertisements and notes about choices made on purpose off the terminal."""
    import logging
    import warnings

    for name in ("pytorch_lightning", "lightning_fabric", "mlflow.system_metrics", "mlflow.store", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="pytorch_lightning", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", module="pytorch_lightning", message=".*exists and is not empty.*")
    warnings.filterwarnings("ignore", module="pytorch_lightning", message=".*could not find the monitored key.*")
    warnings.filterwarnings("ignore", message=".*LeafSpec.*|.*isinstance\\(treespec.*")


def train(config: Config) -> None:
    """One training run, from raw files to a tracked, reloadable model."""
    import pytorch_lightning as pl

    from lightning_glue import environment, hardware
    from lightning_glue.batching import check_batch_size
    from lightning_glue.tracking import MLflowTracker, run_tags

    quiet()
    devices = hardware.resolve_devices(config.trainer)  # mistakes show before anything is made
    check_batch_size(config.data.batch_size, devices.world, config.trainer.accumulate)
    pl.seed_everything(config.seed, workers=True, verbose=False)
    module, data, start = build(config)
    leader = not configuration.is_distributed_child()
    if leader:
        announce(config, data)
    task = module.task
    tracker = MLflowTracker(config.tracking.uri, config.tracking.experiment or task.experiment, config.run_name)
    tracker.start(configuration.flatten(config), run_tags() if leader else {}, config.tracking.system_metrics_seconds)
    with run_status(tracker), ExitStack() as stack:
        checkpoints = None
        if leader:
            tracker.log_inputs(task.name, data.prepared.splits)
            tracker.log_text(environment.git_diff(), "git.diff")
            checkpoints = stack.enter_context(checkpoint_folder(config, tracker))
        best = fit(config, module, data, tracker, checkpoints)
        if leader:
            conclude(config, module, data, start, tracker, best)
    if leader:
        report(config, tracker, best)


def checkpoint_folder(config: Config, tracker: MLflowTracker) -> AbstractContextManager[str | Path]:
    """The run's artifact folder for checkpoints, or one that is thrown away."""
    import tempfile

    if config.tracking.checkpoints:
        return tracker.artifact_folder("checkpoints")
    return tempfile.TemporaryDirectory(prefix="lightning-glue-")


def main() -> None:
    train(compose(parse_arguments()))


if __name__ == "__main__":
    run_main(main)
