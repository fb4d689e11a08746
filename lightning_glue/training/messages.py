"""What a training says: what it begins with, what came out, and what to do next."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_glue import config as configuration
from lightning_glue.config import Config
from lightning_glue.utils.console import command
from lightning_glue.utils.paths import sqlite_file
from lightning_glue.utils.redact import hide_secrets

if TYPE_CHECKING:
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


def announce(config: Config, data: GlueDataModule, resume: str | Resume | None, found: Resume | None) -> None:
    """Say what is about to be trained on."""
    files = data.prepared.splits
    kept = ", ".join(f"{name} {info.rows}" for name, info in files.items())
    notes = []
    if lost := sum(info.dropped + info.skipped for info in files.values()):
        notes.append(f"malformed rows left out: {lost}")
    if cut := sum(split.truncated for split in data.splits.values()):
        notes.append(f"examples cut to length: {cut}")
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
    uri, cpu = tracking_override(config), ["--gpus", "0"] if config.trainer.gpus == "0" else []
    train, score = ("python", "-m", "lightning_glue.train"), ("python", "-m", "lightning_glue.evaluate")
    commands = {compare_command(str(tracker.uri)): "compare runs"}
    if config.tracking.checkpoints:
        commands[command(*score, tracker.run_id, *cpu, *uri)] = "score it again"
    if config.data.source == "sample":
        commands[command(*train, "--task", "RTE", "--model", "minilm")] = "train on real GLUE data"
    if config.task.name == "MNLI" and config.tracking.checkpoints:
        commands[command(*train, "--task", "RTE", "--init-from", tracker.run_id, *uri)] = "start RTE from it"
    print("next:")
    for line, purpose in commands.items():
        print(f"  {line}\n      {purpose}")


def tracking_override(config: Config) -> list[str]:
    """What a command needs besides the environment to find the run."""
    uri = config.tracking.uri
    if not uri or uri == os.environ.get("MLFLOW_TRACKING_URI"):
        return []
    return [f"tracking.uri={configuration.quote(hide_secrets(uri))}"]


def compare_command(uri: str) -> str:
    """What opens MLflow's page of the runs: the server's own address, or a server to start."""
    uri = hide_secrets(uri)
    if uri.startswith(("http://", "https://")):
        return uri
    default = sqlite_file(uri) == Path.cwd() / "mlflow.db"
    return command("mlflow", "ui", *([] if default else ["--backend-store-uri", uri]))


def how_to_go_on(run_id: str, saved_step: int | None) -> str:
    again = command("python", "-m", "lightning_glue.train", "--resume", run_id)
    if saved_step is None:
        return f"no checkpoint yet: {again}\n    starts over"
    return f"saved at step {saved_step}: {again}\n    goes on from there"
