"""One tracked run: training, the best model and its figures, and a true status whatever happens."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_glue import config as configuration
from lightning_glue.config import Config
from lightning_glue.errors import Diverged, first_line
from lightning_glue.launch import is_distributed_child
from lightning_glue.messages import how_to_go_on, quiet
from lightning_glue.preemption import Preemption, Stopped
from lightning_glue.tasks import get_task

if TYPE_CHECKING:
    import pytorch_lightning as pl

    from lightning_glue.data import GlueDataModule
    from lightning_glue.module import GlueModule
    from lightning_glue.monitor import BestEvaluation
    from lightning_glue.pretrained import Pretrained
    from lightning_glue.resume import Resume
    from lightning_glue.tracking import MLflowTracker


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


@contextmanager
def run_status(tracker: MLflowTracker, register: bool, preemption: Preemption, *, kept: bool = True) -> Iterator[None]:
    """Give the run its true final status: FINISHED, KILLED (a request to stop) or FAILED with the tracebacks.

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
