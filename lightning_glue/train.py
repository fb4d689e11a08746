"""Fine-tune RoBERTa on a GLUE task: ``python -m lightning_glue.train --task RTE``."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_glue import config as configuration
from lightning_glue.addresses import hide_secrets
from lightning_glue.config import Config
from lightning_glue.console import Parser, program
from lightning_glue.errors import UserError, first_line, run_main
from lightning_glue.imports import quick_imports
from lightning_glue.launch import end_with_launcher, is_distributed_child
from lightning_glue.preemption import Preemption, Stopped, end_at_once
from lightning_glue.tasks import TRAINABLE, Task, get_task

if TYPE_CHECKING:
    import pytorch_lightning as pl

    from lightning_glue.data import GlueDataModule
    from lightning_glue.module import GlueModule
    from lightning_glue.monitor import BestEvaluation
    from lightning_glue.pretrained import Pretrained
    from lightning_glue.resume import Resume
    from lightning_glue.tracking import MLflowTracker


def parse_arguments() -> argparse.Namespace:
    parser = Parser(
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
    parser.add_argument("--resume", metavar="auto|RUN_ID|PATH", help="continue an interrupted run; auto: the newest of "
                        "this configuration, if any; a run id or a last.ckpt needs no other argument")  # fmt: skip
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


def check_arguments(args: argparse.Namespace, own: dict[str, Any]) -> Config:
    """The configuration of a run to resume, ``own``, with the flags that say where it is to go on.

    Raises:
        UserError: a flag that contradicts the run's own configuration.
    """
    given = {"task": "task.name", "model": "model.name", "data": "data.source", "init_from": "init_from"}
    given = {key for flag, key in given.items() if getattr(args, flag) is not None}
    given |= {"trainer.gpus"} if args.gpus else set()
    given |= {"trainer.procs"} if args.procs else set()
    given |= {override.partition("=")[0] for override in args.overrides}
    own = configuration.flatten(configuration.compose()) | own  # keys that are newer than the run
    present = compose(args)
    asked, shown = configuration.flatten(present), configuration.recorded(present)
    identity = configuration.identity(configuration.unflatten(own))
    for key in given & asked.keys():
        if key in identity and shown[key] != own[key]:
            raise UserError(
                f"--resume {args.resume}: {key}={asked[key]} contradicts the run's {own[key]}; leave it out"
            )
    here = {key: asked[key] for key in given & asked.keys()}
    if asked["tracking.uri"] or "***" in str(own["tracking.uri"]):
        here["tracking.uri"] = asked["tracking.uri"]  # what was recorded may lack the password
    return configuration.unflatten(own | here)


def build(config: Config, warm: dict[Any, Any] | None = None) -> tuple[GlueModule, GlueDataModule, Pretrained]:
    """Model and data of a configuration.

    Args:
        warm: keeps pretrained weights and tokenized splits for the next call with the same dictionary.
    """
    with quick_imports():
        from lightning_glue import sources
        from lightning_glue.checkpoint import locate, model_state, reading
        from lightning_glue.data import GlueDataModule
        from lightning_glue.hardware import resolve_eval_tokens
        from lightning_glue.model import build_model, load_encoder, token_limit
        from lightning_glue.module import GlueModule
        from lightning_glue.preprocess import prepare
        from lightning_glue.pretrained import file_sha256, load_pretrained

    task, data = get_task(config.task.name), config.data
    warm = {} if warm is None else warm
    origin = (config.model.source, config.model.tokenizer, data.bpe_dir)
    start = warm.get(origin) or load_pretrained(*origin, config.model.architecture)
    dropouts = {name: getattr(config.model, name) for name in ("dropout", "attention_dropout", "pooler_dropout")}
    with reading("model.architecture" if config.model.source == "random" else config.model.source):
        model = build_model(start, task.num_outputs, dropouts)
        max_tokens = token_limit(model, data.max_tokens)
    record = {"config": configuration.recorded(config), "task": task.name, "lineage": lineage(task, start)}
    if config.init_from:
        path = locate(config.init_from, config.tracking.uri)
        with reading(str(path)):
            load_encoder(model, model_state(path))
        record["lineage"]["start_sha256"] = file_sha256(path)
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
        eval_tokens=resolve_eval_tokens(config),
        max_tokens=max_tokens,
        accumulate=config.trainer.accumulate,
        pool=data.length_pool,
        seed=config.seed,
    )
    texts = (task.name, data.source, data.glue_dir, data.on_bad_row, max_tokens, origin)
    if texts in warm:
        datamodule.prepared, datamodule.splits = warm[texts]
    else:
        datamodule.setup("fit")
    check_data_fits(config, datamodule)
    warm.clear()
    warm |= {origin: start, texts: (datamodule.prepared, datamodule.splits)}
    return module, datamodule, start


def check_data_fits(config: Config, data: GlueDataModule) -> None:
    """Raise UserError, before there is a run, where the files lack what the configuration asks of them."""
    from lightning_glue import sources
    from lightning_glue.predict import read_indices

    batches = len(data.train_dataloader())
    if config.trainer.val_check_interval > batches:
        raise UserError(
            f"trainer.val_check_interval={config.trainer.val_check_interval:g} batches, but an epoch of "
            f"{config.task.name} has {batches}; lower it, or leave it out to evaluate after every epoch"
        )
    if config.trainer.predict:
        if not any(split.name in data.splits for split in data.task.test):
            names = ", ".join(split.file_name for split in data.task.test)
            raise UserError(f"trainer.predict=true, but {config.task.name} is there without {names}")
        read_indices(data.task, data.prepared)
        if config.task.name == "MNLI":
            sources.glue_directory(get_task("AX"), config.data.source, config.data.glue_dir)


def lineage(task: Task, start: Pretrained) -> dict[str, str]:
    """What a model comes from, besides its data, configuration and commit, which are on its run anyway."""
    return {
        "labels": json.dumps(task.labels),
        "tokenizer_sha256": start.tokenizer.digest,
        "start_sha256": start.sha256 or "random weights",
    }


def evaluation_interval(config: Config, batches: int) -> int | float:
    """Micro-batches between two evaluations, or 1.0 for one at the end of each epoch.

    Always whole optimizer steps: gradients accumulated so far are in no checkpoint.

    Args:
        batches: micro-batches in an epoch.
    """
    interval, accumulate = config.trainer.val_check_interval, config.trainer.accumulate
    if interval == 1:
        return 1.0
    wanted = int(interval) if interval > 1 else max(1, int(batches * interval))
    return -(-wanted // accumulate) * accumulate


def make_trainer(
    config: Config, callbacks: list[pl.Callback], tracker: MLflowTracker, interval: int | float = 1.0
) -> pl.Trainer:
    import pytorch_lightning as pl

    from lightning_glue.distributed import cluster_environment
    from lightning_glue.hardware import resolve_devices, resolve_precision, resolve_strategy
    from lightning_glue.saving import AtomicCheckpointIO

    devices = resolve_devices(config.trainer)
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
        val_check_interval=interval,
        use_distributed_sampler=False,  # batching.py shares the examples out
        num_sanity_val_steps=0,
        log_every_n_steps=1,  # TrainingMonitor keeps its own interval
        callbacks=callbacks,
        plugins=[AtomicCheckpointIO(), cluster_environment()],
        logger=tracker,
        enable_progress_bar=sys.stdout.isatty(),
        enable_model_summary=False,
    )


def make_callbacks(config: Config, checkpoints: str | Path | None, preemption: Preemption) -> list[pl.Callback]:
    """Monitoring, the best and the last checkpoint in ``checkpoints`` (of process 0), early stopping if asked for."""
    from pytorch_lightning.callbacks import EarlyStopping, RichProgressBar

    from lightning_glue.monitor import BestEvaluation, EvaluationLine, TrainingMonitor
    from lightning_glue.saving import Checkpoints

    monitor = get_task(config.task.name).selection_metric
    best = BestEvaluation(monitor)
    callbacks: list[pl.Callback] = [best, EvaluationLine(), TrainingMonitor(config.trainer.log_every)]
    if sys.stdout.isatty():
        callbacks.append(RichProgressBar())
    if config.trainer.early_stopping_patience is not None:
        callbacks.append(EarlyStopping(monitor, patience=config.trainer.early_stopping_patience, mode="max"))
    every = config.trainer.checkpoint_every_steps, config.trainer.checkpoint_every_minutes
    keep = config.tracking.keep_best
    return [*callbacks, Checkpoints(Path(checkpoints or ""), best, keep, config.seed, *every, preemption)]


class Diverged(UserError):
    """The weights ceased to be numbers; ``where`` is the step."""

    def __init__(self, where: str, lr: float) -> None:
        super().__init__(f"the training diverged at {where}; lower optimizer.lr ({lr:g})")
        self.where = where


@contextmanager
def run_status(tracker: MLflowTracker, register: bool, preemption: Preemption, *, kept: bool = True) -> Iterator[None]:
    """Give the run its true final status: FINISHED, KILLED (Ctrl-C, SIGTERM, SIGUSR1) or FAILED with the tracebacks.

    Args:
        register: the model of a finished run.
        kept: whether checkpoints outlive the training.
    """
    from lightning_glue.resume import keep_traceback, keep_tracebacks_left

    try:
        yield
        preemption.check()
    except (KeyboardInterrupt, SystemExit) as stop:
        if is_distributed_child():
            sys.exit(0)  # Lightning kills process 0 when another one ends with an error
        crashed = _attempted(lambda: keep_tracebacks_left(tracker))
        _attempted(lambda: tracker.finish("FAILED" if crashed else "KILLED"))
        cause = stop.signal if isinstance(stop, Stopped) else signal.SIGINT
        print(f"stopped by {cause.name}; run: {tracker.describe()}", file=sys.stderr)
        print(how_to_go_on(tracker.run_id, preemption.saved_step if kept else None), file=sys.stderr)
        sys.exit(128 + cause)
    except Diverged as error:
        where = error.where
        _attempted(lambda: tracker.set_tags({"diverged": where}))
        _attempted(lambda: tracker.finish("FAILED"))
        raise
    except BaseException:
        _attempted(lambda: keep_traceback(tracker))
        _attempted(lambda: tracker.finish("FAILED"))
        raise
    try:
        with preemption.acting_at_once():
            tracker.finish("FINISHED", register)
    except Stopped as stop:
        print(f"stopped by {stop.signal.name} when all was done; run: {tracker.describe()}", file=sys.stderr)
        raise


def _attempted(action: Callable[[], Any]) -> Any:
    """What an action at the end of a run gives; what hinders it, most likely what ended the run, hinders no other."""
    try:
        return action()
    except Exception as error:
        print(f"the run's end could not be written in full: {first_line(error)}", file=sys.stderr)
        return None


def how_to_go_on(run_id: str, saved_step: int | None) -> str:
    command = f"{program('python')} -m lightning_glue.train --resume {run_id}"
    if saved_step is None:
        return f"no checkpoint yet: {command}\n    starts over"
    return f"saved at step {saved_step}: {command}\n    goes on from there"


def fit(
    config: Config,
    module: GlueModule,
    data: GlueDataModule,
    tracker: MLflowTracker,
    checkpoints: str | Path | None,
    start: Path | None,
    preemption: Preemption,
    more: Sequence[pl.Callback] = (),
) -> BestEvaluation:
    """Train, from the checkpoint ``start`` if any, and leave the best weights in ``module`` of process 0.

    Evaluates at least once.

    Raises:
        Stopped: the processes agreed to stop.
        Diverged: the weights are no longer numbers.
    """
    from lightning_glue.saving import Checkpoints

    callbacks = [*more, *make_callbacks(config, checkpoints, preemption)]
    trainer = make_trainer(config, callbacks, tracker, evaluation_interval(config, len(data.train_dataloader())))
    # Lightning's own handlers talk to other processes in the middle of a step.
    trainer._signal_connector.register_signal_handlers = lambda: None
    trainer.fit(module, data, ckpt_path=start)
    saving = callbacks[-1]
    assert isinstance(saving, Checkpoints)
    if saving.stop:
        raise Stopped(saving.stop)
    if module.diverged:
        raise Diverged(module.diverged, config.lr)
    if not saving.best.values:  # max_steps ended training before the first evaluation
        trainer.validate(module, data, verbose=False)
        saving.save_best(trainer)
    elif trainer.is_global_zero:
        module.load_state_dict(saving.best_weights())
    return saving.best


def conclude(
    config: Config,
    module: GlueModule,
    data: GlueDataModule,
    start: Pretrained,
    tracker: MLflowTracker,
    best: BestEvaluation,
    preemption: Preemption,
) -> None:
    """In process 0: the best model as a fairseq directory, figures, predictions, the best metrics.

    A request to stop is acted on between two of them, and between two batches of the predictions.
    """
    from lightning_glue import figures
    from lightning_glue.checkpoint import EXPORT_DIGEST
    from lightning_glue.export import export, settings
    from lightning_glue.preprocess import read_label_symbols
    from lightning_glue.pretrained import file_sha256

    task = module.task
    tracker.log_metrics({f"best/{name}": value for name, value in best.values.items()}, step=best.step)
    if config.tracking.checkpoints:
        symbols = [] if task.is_regression else read_label_symbols(data.prepared.directory)
        with tracker.artifact_folder("fairseq") as folder:
            model, own = module.model.cpu(), settings(config, data)
            export(model, task, start.tokenizer, symbols, best.step, folder, own)
            tracker.set_tags({EXPORT_DIGEST: file_sha256(folder / "checkpoint_best.pt")})
    preemption.check()
    drawn = {"learning_curves.png": figures.learning_curves(task, tracker.history)}
    for split, evaluation in best.evaluations.items():
        drawn |= figures.evaluation_figures(task, split, evaluation)
    tracker.log_figures(drawn)
    preemption.check()
    if config.trainer.predict:
        module.model.register_forward_pre_hook(lambda *_: preemption.check())
        with tracker.artifact_folder("predictions") as folder:
            write_predictions(config, module, data, start, folder)


def write_predictions(
    config: Config, module: GlueModule, data: GlueDataModule, start: Pretrained, folder: Path
) -> None:
    """Leaderboard files of the task's test splits, and of AX for a model of MNLI."""
    from lightning_glue import sources
    from lightning_glue.hardware import resolve_devices, resolve_precision
    from lightning_glue.predict import write_submissions
    from lightning_glue.preprocess import prepare

    accelerator = resolve_devices(config.trainer).accelerator
    module.model.to(accelerator)
    limits = {"eval_tokens": data.eval_tokens, "max_tokens": data.max_tokens}
    limits |= {"precision": resolve_precision(config.trainer, accelerator)}
    write_submissions(module.model, module.task, data.prepared, folder, **limits)
    if module.task.name == "MNLI":
        ax = get_task("AX")
        root = sources.glue_directory(ax, config.data.source, config.data.glue_dir)
        prepared = prepare(ax, root, start.tokenizer, sources.cache_dir(), config.data.on_bad_row)
        write_submissions(module.model, ax, prepared, folder, **limits)


def announce(config: Config, data: GlueDataModule, resume: str | Resume | None, found: Resume | None) -> None:
    """Say what is about to be trained on."""
    kept = ", ".join(f"{name} {info.rows}" for name, info in data.prepared.splits.items())
    lost = sum(info.dropped + info.skipped for info in data.prepared.splits.values())
    cut = sum(split.truncated for split in data.splits.values())
    notes = [f"malformed rows left out: {lost}"] * bool(lost) + [f"examples cut to length: {cut}"] * bool(cut)
    if data.max_tokens < config.data.max_tokens:
        notes.append(f"cut to the {data.max_tokens} positions that the model has")
    source = "generated sample, not GLUE" if config.data.source == "sample" else "GLUE"
    print(f"{config.task.name} ({source}): {'; '.join([kept, *notes])}")
    steps = f" or {config.trainer.max_steps} steps" if config.trainer.max_steps > 0 else ""
    length = f"{config.trainer.max_epochs} epochs{steps}"
    print(f"{config.model.name}, {length}, batch {config.data.batch_size}, lr {config.lr:g}")
    if found:
        epochs, batches = found.position
        print(f"resuming run {found.run_id} after {epochs} epochs and {batches} batches")
    elif resume:
        print("no interrupted run of this configuration to resume: a new one")


def report(config: Config, tracker: MLflowTracker, best: BestEvaluation) -> None:
    """Say what came out, where it is and what to do next."""
    print(f"\nbest evaluation (step {best.step}):")
    for name, value in sorted(best.values.items()):
        print(f"  {name:<24}{value:.4f}")
    print(f"run: {tracker.describe()}")
    if tracker.registered:
        print(f"model: {tracker.registered}")
    python = program("python")
    uri, cpu = tracking_override(config), " --gpus 0" if config.trainer.gpus == "0" else ""
    commands = {compare_command(str(tracker.uri)): "compare runs"}
    if config.tracking.checkpoints:
        commands[f"{python} -m lightning_glue.evaluate {tracker.run_id}{cpu}{uri}"] = "score it again"
    if config.data.source == "sample":
        commands[f"{python} -m lightning_glue.train --task RTE --model minilm"] = "train on real GLUE data"
    if config.task.name == "MNLI" and config.tracking.checkpoints:
        commands[f"{python} -m lightning_glue.train --task RTE --init-from {tracker.run_id}{uri}"] = "start RTE from it"
    print("next:")
    for command, purpose in commands.items():
        print(f"  {command}\n      {purpose}")


def tracking_override(config: Config) -> str:
    """What a command needs besides the environment to find the run."""
    uri = config.tracking.uri
    if not uri or uri == os.environ.get("MLFLOW_TRACKING_URI"):
        return ""
    return " " + shlex.quote(f"tracking.uri={configuration.quote(hide_secrets(uri))}")


def compare_command(uri: str) -> str:
    """What opens MLflow's page of the runs: the server's own address, or a server to start."""
    if uri.startswith(("http://", "https://")):
        return uri
    default = uri == f"sqlite:///{Path.cwd() / 'mlflow.db'}"
    return f"{program('mlflow')} ui" + ("" if default else f" --backend-store-uri {uri}")


def quiet() -> None:
    """Keep Lightning's advertisements and notes about choices made on purpose off the terminal."""
    import logging
    import warnings

    for name in ("pytorch_lightning", "lightning_fabric", "mlflow.system_metrics", "mlflow.store", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="pytorch_lightning", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*your dataloader is not resumable.*")  # TrainSampler is
    warnings.filterwarnings("ignore", message=".*sync_dist=True.*")  # every process computes the same value
    warnings.filterwarnings("ignore", message=".*all_gather.*deprecated.*")
    warnings.filterwarnings("ignore", module="pytorch_lightning", message=".*could not find the monitored key.*")
    warnings.filterwarnings("ignore", message=".*`srun` command is available.*")  # where SLURM is, but not wanted
    warnings.filterwarnings("ignore", message=".*LeafSpec.*|.*isinstance\\(treespec.*")


def prepare_process(config: Config) -> None:
    """Raise UserError, before anything is made, where this machine cannot run the configuration; set the process up."""
    from lightning_glue.batching import check_batch_size
    from lightning_glue.distributed import prepare
    from lightning_glue.hardware import check_port, resolve_devices
    from lightning_glue.memory import keep_freed_memory

    quiet()
    prepare()
    devices = resolve_devices(config.trainer)
    check_port(devices)
    check_batch_size(config.data.batch_size, devices.world, config.trainer.accumulate)
    if devices.accelerator == "cpu":
        keep_freed_memory()


def train(config: Config, resume: str | Resume | None = None) -> None:
    """One training run, from raw files to a tracked, reloadable model.

    Args:
        resume: an interrupted run to continue: its id, its last checkpoint, or ``auto`` for the newest one of this
            configuration, if there is one.
    """
    from lightning_glue.watcher import watch

    leader = not is_distributed_child()
    if leader:
        watch()  # it gets ready meanwhile
    with quick_imports():
        import pytorch_lightning as pl

        from lightning_glue.resume import check_config, check_data, find

    prepare_process(config)
    pl.seed_everything(config.seed, workers=True, verbose=False)
    found = find(resume, config) if isinstance(resume, str) else resume
    if found:
        check_config(found, config)
    tracker = make_tracker(config)
    module, data, start = build(config)
    if leader:
        announce(config, data, resume, found)
        if found:
            check_data(found, data.prepared.splits)
    register = config.tracking.register and config.tracking.checkpoints
    try:
        best = execute(config, module, data, start, tracker, found, register=register)
    except Diverged as error:
        sys.exit(f"error: {error}" if leader else 0)
    if leader:
        report(config, tracker, best)


def make_tracker(config: Config) -> MLflowTracker:
    from lightning_glue.tracking import MLflowTracker

    experiment = config.tracking.experiment or get_task(config.task.name).experiment
    return MLflowTracker(config.tracking.uri, experiment, config.run_name, config.tracking.journal)


def execute(
    config: Config,
    module: GlueModule,
    data: GlueDataModule,
    start: Pretrained,
    tracker: MLflowTracker,
    found: Resume | None = None,
    *,
    tags: Mapping[str, str] | None = None,
    callbacks: Sequence[pl.Callback] = (),
    checkpoints: Path | None = None,
    register: bool = False,
    started: Callable[[], None] = lambda: None,
    ending: Callable[[BestEvaluation], None] = lambda best: None,
) -> BestEvaluation:
    """Train in one tracked run, new or ``found``; what comes out is in the run and in ``module``.

    Args:
        tags, callbacks: besides the usual ones.
        checkpoints: folder for them instead of the run's.
        register: the best model, once the run is finished.
        started, ending: called as soon as the run is there (process 0 alone), and before it gets its status.

    Raises:
        Diverged: the weights are no longer numbers; the run is FAILED.
    """
    from lightning_glue import environment
    from lightning_glue.resume import digests, told_to_children
    from lightning_glue.tracking import run_tags

    leader = not is_distributed_child()
    come_from = {f"lineage.{name}": value for name, value in module.record["lineage"].items()}
    tags = {**run_tags(config), **come_from, **(tags or {})} if leader else {}
    system_metrics = config.tracking.system_metrics_seconds
    with Preemption() as preemption:
        with preemption.acting_at_once():
            tracker.start(configuration.recorded(config), tags, system_metrics, found.run_id if found else None)
        if leader:
            started()
        kept = config.tracking.checkpoints or checkpoints is not None
        preemption.saved_step = found.step if found and found.path else None
        with run_status(tracker, register, preemption, kept=kept), ExitStack() as stack:
            if leader:
                module.record |= {"run_id": tracker.run_id, "data": digests(data.prepared.splits)}
                tracker.log_inputs(module.task.name, data.prepared.splits)
                tracker.log_text(environment.git_diff(), "git.diff")
                checkpoints = checkpoints or stack.enter_context(checkpoint_folder(config, tracker))
                stack.enter_context(told_to_children(found, tracker))
                carry_on(found, tracker, checkpoints)
            if found:
                data.start = found.position
            preemption.check()
            path = found.path if found else None
            best = fit(config, module, data, tracker, checkpoints, path, preemption, callbacks)
            if leader:
                conclude(config, module, data, start, tracker, best, preemption)
            ending(best)
    return best


def carry_on(found: Resume | None, tracker: MLflowTracker, checkpoints: Path) -> None:
    """Bring the best checkpoints so far into the folder in which a run goes on."""
    for name in found.carry_best(checkpoints) if found else []:
        if checkpoints == tracker.artifacts / "checkpoints":
            tracker.log_artifact(f"checkpoints/{name}")


@contextmanager
def checkpoint_folder(config: Config, tracker: MLflowTracker) -> Iterator[Path]:
    """The run's artifact folder for checkpoints, or one that is thrown away."""
    from lightning_glue.resume import scratch

    if config.tracking.checkpoints:
        yield tracker.artifacts / "checkpoints"
        return
    with scratch(Path(config.tracking.journal)) as folder:
        yield folder


def main() -> None:
    end_with_launcher()
    end_at_once()
    args = parse_arguments()
    config = compose(args)
    if args.resume in (None, "auto"):
        requeued = os.environ.get("SLURM_RESTART_COUNT", "0") != "0"
        return train(config, "auto" if requeued else args.resume)
    from lightning_glue.resume import find

    quiet()
    found = find(args.resume, config)
    train(check_arguments(args, found.record["config"]), found)


if __name__ == "__main__":
    run_main(main)
