"""What a training says: what it begins with, what came out, and what to do next."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_glue import config as configuration
from lightning_glue.config import Config
from lightning_glue.tasks import Task
from lightning_glue.tracking.pages import how_to_look
from lightning_glue.utils.hints import hint
from lightning_glue.utils.redact import hide_secrets

if TYPE_CHECKING:
    from lightning_glue.data.binarize import SplitInfo
    from lightning_glue.data.datamodule import GlueDataModule
    from lightning_glue.tracking.logger import MLflowTracker
    from lightning_glue.training.callbacks import BestEvaluation
    from lightning_glue.training.resume import Resume


LOGGERS = ("pytorch_lightning", "lightning_fabric", "mlflow.system_metrics", "mlflow.store", "alembic")


def quiet() -> None:
    """Keep Lightning's advertisements and notes about choices made on purpose off the terminal."""
    import logging
    import warnings

    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="pytorch_lightning", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*your dataloader is not resumable.*")  # TrainSampler is
    warnings.filterwarnings("ignore", message=".*sync_dist=True.*")  # every process computes the same value
    warnings.filterwarnings("ignore", message=".*all_gather.*deprecated.*")
    warnings.filterwarnings("ignore", module="pytorch_lightning", message=".*could not find the monitored key.*")
    warnings.filterwarnings("ignore", message=".*`srun` command is available.*")  # where SLURM is, but not wanted
    warnings.filterwarnings("ignore", message=".*LeafSpec.*|.*isinstance\\(treespec.*")


def headline(config: Config, data: GlueDataModule) -> list[str]:
    """Data and recipe of a training, a line each."""
    files = data.prepared.splits
    kept = ", ".join(f"{name} {info.rows}" for name, info in files.items())
    notes = []
    if lost := sum(info.dropped + info.skipped for info in files.values()):
        notes.append(f"malformed rows left out: {lost}")
    if cut := sum(split.truncated for split in data.splits.values()):
        notes.append(f"examples cut to length: {cut}")
    if data.max_tokens < config.data.max_tokens:
        notes.append(f"cut to the {data.max_tokens} positions that the model has")
    source = {"sample": "generated sample, not GLUE", "own": own_files(files)}.get(config.data.source, "GLUE")
    length = run_length(config, len(data.splits["train"].lengths))
    return [
        f"{config.task.name} ({source}): {'; '.join([kept, *notes])}",
        f"{config.model.name}, {length}, batch {config.data.batch_size}, lr {config.lr:g}",
    ]


def own_files(files: Mapping[str, SplitInfo]) -> str:
    """The names of the files, each once."""
    return ", ".join(dict.fromkeys(Path(info.file).name for info in files.values()))


def announce(config: Config, data: GlueDataModule, resume: str | Resume | None, found: Resume | None) -> None:
    """Say what is about to be trained on."""
    for line in headline(config, data):
        print(line)
    if found:
        epochs, batches = found.position
        done = f"{counted(epochs, 'epoch')} and {counted(batches, 'batch', 'batches')}"
        print(f"resuming run {found.run_id} after {done}")
    elif resume:
        print("no interrupted run of this configuration to resume: a new one")


def counted(number: int, one: str, many: str = "") -> str:
    return f"{number} {one if number == 1 else many or one + 's'}"


def run_length(config: Config, examples: int) -> str:
    """``3 epochs``, or ``200 steps (0.1 epochs)`` where that comes first; of so many training examples."""
    epochs, steps = config.trainer.max_epochs, config.trainer.max_steps
    share = steps * config.data.batch_size / max(examples, 1)
    if steps < 1 or share >= epochs:
        return counted(epochs, "epoch")
    return f"{counted(steps, 'step')} ({share:.1g} epochs)" if share < 1 else f"{steps} steps ({share:.1f} epochs)"


def scores(task: Task, best: BestEvaluation) -> list[str]:
    """A line for each value of the best evaluation; beside a metric what one constant answer would score."""
    from lightning_glue.training.metrics import majority_values

    constant = {
        f"{split}/{metric}": value
        for split, evaluation in best.evaluations.items()
        for metric, value in majority_values(task, evaluation.targets).items()
    }
    what = task.constant_answer.removeprefix("the ")
    beside = {name: f" ({what} {value:.4f})" for name, value in constant.items()}
    width = max([23, *map(len, best.values)]) + 1
    return [f"{name:<{width}}{value:.4f}{beside.get(name, '')}" for name, value in sorted(best.values.items())]


def report(config: Config, tracker: MLflowTracker, best: BestEvaluation) -> None:
    """Say what came out, where it is and what to do next."""
    print(f"\nbest evaluation (step {best.step}):")
    for line in scores(configuration.task_of(config), best):
        print(f"  {line}")
    print(f"run: {tracker.describe()}")
    if tracker.registered:
        print(f"model: {tracker.registered}")
    print("next:")
    for line, purpose in next_steps(config, tracker).items():
        print(f"  {line}\n      {purpose}")


def next_steps(config: Config, tracker: MLflowTracker) -> dict[str, str]:
    """What to type or to open after a training, with what each is for."""
    uri, cpu = tracking_override(config), {"GPUS": "0"} if config.trainer.gpus == "0" else {}
    steps = how_to_look(str(tracker.uri), tracker.experiment_id, tracker.run_id)
    if config.tracking.checkpoints:
        steps[hint("evaluate", {"RUN": tracker.run_id, **cpu}, uri)] = "score it again"
    if config.data.source == "sample":
        steps[hint("train", {"TASK": "RTE", "MODEL": "minilm"})] = "train on real GLUE data"
    if config.task.name == "MNLI" and config.tracking.checkpoints:
        named = config.model.name in configuration.options("model")  # else it came from a path
        start = {"MODEL": config.model.name if named else config.model.source, "INIT_FROM": tracker.run_id}
        steps[hint("train", {"TASK": "RTE", **start, **cpu}, uri)] = "start RTE from it"
    return steps


def tracking_override(config: Config) -> list[str]:
    """What a command needs besides the environment to find the run."""
    uri = config.tracking.uri
    if not uri or uri == os.environ.get("MLFLOW_TRACKING_URI"):
        return []
    return [f"tracking.uri={configuration.quote(hide_secrets(uri))}"]


def how_to_go_on(run_id: str, saved_step: int | None) -> str:
    again = hint("train", {"RESUME": run_id})
    if saved_step is None:
        return f"no checkpoint yet: {again}\n    starts over"
    return f"saved at step {saved_step}: {again}\n    goes on from there"
