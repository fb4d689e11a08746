"""Lightning's Trainer for a configuration: devices, precision, callbacks, intervals."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_glue.config import Config, task_of
from lightning_glue.training.messages import quiet
from lightning_glue.training.preemption import Preemption
from lightning_glue.utils.quick_imports import quick_imports

if TYPE_CHECKING:
    import pytorch_lightning as pl

    from lightning_glue.tracking.logger import MLflowTracker


def prepare_process(config: Config) -> None:
    """Raise UserError, before anything is made, where this machine cannot run the configuration; set the process up."""
    with quick_imports():
        from lightning_glue.data.batching import check_batch_size
        from lightning_glue.training import callbacks  # noqa: F401  with it fairseq, before anybody else brings it
        from lightning_glue.training.allocator import keep_freed_memory
        from lightning_glue.training.devices import check_port, resolve_devices
        from lightning_glue.training.distributed import prepare

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
    config: Config,
    callbacks: list[pl.Callback],
    tracker: MLflowTracker | None,
    interval: int | float = 1.0,
    *,
    some_unused: bool = False,
) -> pl.Trainer:
    """The trainer of a configuration.

    Args:
        tracker: None: nothing is logged.
        interval: of :func:`evaluation_interval`.
        some_unused: a step may leave parameters of the model without a gradient.
    """
    import pytorch_lightning as pl
    from torch import are_deterministic_algorithms_enabled  # setting what is set already would import torch._inductor

    from lightning_glue.training.checkpoints import AtomicCheckpointIO
    from lightning_glue.training.devices import resolve_devices, resolve_precision, resolve_strategy
    from lightning_glue.training.distributed import cluster_environment

    devices = resolve_devices(config.trainer)
    return pl.Trainer(
        accelerator=devices.accelerator,
        devices=devices.devices,
        num_nodes=devices.nodes,
        strategy=resolve_strategy(devices, some_unused=some_unused),
        precision=resolve_precision(config.trainer, devices.accelerator),
        max_epochs=config.trainer.max_epochs,
        max_steps=config.trainer.max_steps,
        accumulate_grad_batches=config.trainer.accumulate,
        gradient_clip_val=config.trainer.gradient_clip_val or None,
        deterministic=config.trainer.deterministic or (False if are_deterministic_algorithms_enabled() else None),
        val_check_interval=interval,
        use_distributed_sampler=False,  # batching.py shares the examples out
        num_sanity_val_steps=0,
        log_every_n_steps=1,  # TrainingMonitor keeps its own interval
        callbacks=callbacks,
        plugins=[AtomicCheckpointIO(), cluster_environment()],
        logger=tracker or False,
        enable_progress_bar=False,  # RunProgress is the run's own
        enable_model_summary=False,
    )


def make_callbacks(
    config: Config, checkpoints: str | Path | None, preemption: Preemption, *, shows: bool = True
) -> list[pl.Callback]:
    """Monitoring, the best and the last checkpoint in ``checkpoints`` (of process 0), early stopping if asked for.

    Args:
        shows: a line for each evaluation, and progress.
    """
    from pytorch_lightning.callbacks import EarlyStopping

    from lightning_glue.training.callbacks import BestEvaluation, EvaluateAtTheEnd, EvaluationLine, TrainingMonitor
    from lightning_glue.training.checkpoints import Checkpoints
    from lightning_glue.training.progress import RunProgress

    metric = task_of(config).selection_metric
    best, monitor = BestEvaluation(metric), TrainingMonitor(config.trainer.log_every)
    callbacks: list[pl.Callback] = [best, *([EvaluationLine(monitor)] if shows else []), monitor, EvaluateAtTheEnd()]
    if shows:
        callbacks.append(RunProgress(monitor, best, draws=sys.stdout.isatty()))
    if config.trainer.early_stopping_patience is not None:
        callbacks.append(EarlyStopping(metric, patience=config.trainer.early_stopping_patience, mode="max"))
    every = config.trainer.checkpoint_every_steps, config.trainer.checkpoint_every_minutes
    keep = config.tracking.keep_best
    return [*callbacks, Checkpoints(Path(checkpoints or ""), best, keep, config.seed, *every, preemption)]
