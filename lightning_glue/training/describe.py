"""What a run says of itself in MLflow: precision and devices in force, its whole configuration, a description."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from lightning_glue import config as configuration
from lightning_glue.config import Config
from lightning_glue.config.escape import escaped
from lightning_glue.tracking import provenance
from lightning_glue.training.messages import headline, scores

if TYPE_CHECKING:
    from lightning_glue.data.datamodule import GlueDataModule
    from lightning_glue.training.callbacks import BestEvaluation

CONFIG_FILE = "config.yaml"  # the run's artifact
NOTE = "mlflow.note.content"  # the tag that MLflow shows as the run's description
_UNNAMED = "roberta.base"  # what the model of a path is made from


def in_force(config: Config) -> dict[str, str]:
    """Tags with what ``auto`` came to on this machine."""
    from lightning_glue.training.devices import resolve_devices, resolve_precision

    devices = resolve_devices(config.trainer)
    return {
        "resolved.precision": resolve_precision(config.trainer, devices.accelerator),
        "resolved.devices": f"{devices.world} x {devices.accelerator}",
    }


def gpus_in_force(config: Config) -> dict[str, str]:
    """A tag with the numbers of its GPUs on this machine; none on a CPU, on several machines, or without numbers."""
    from lightning_glue.tracking.energy import GPUS
    from lightning_glue.training.devices import resolve_devices

    devices = resolve_devices(config.trainer)
    if devices.accelerator != "cuda" or devices.nodes > 1:
        return {}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(devices.devices)))
    numbers = [one.strip() for one in visible.split(",")][: devices.devices]
    return {GPUS: ",".join(numbers)} if all(one.isdecimal() for one in numbers) else {}


def config_file(config: Config, run_id: str) -> str:
    """The whole configuration as a recipe: with it as ``experiments/NAME.yaml``, ``--experiment NAME`` trains so again.

    A tracking address that holds a password is left out.
    """
    from omegaconf import OmegaConf

    flat = {key: escaped(value) for key, value in configuration.recorded(config).items()}
    if "***" in str(flat["tracking.uri"]):
        flat["tracking.uri"] = None
    model = config.model.name if config.model.name in configuration.options("model") else _UNNAMED
    found = ", ".join(in_force(config).values())
    lines = [
        "# @package _global_",
        f"# The whole configuration of run {run_id}, which had {found}.",
        "# As experiments/NAME.yaml: python -m lightning_glue.train --experiment NAME trains so again.",
        "defaults:",
        f"  - override /task: {configuration.task_file(config)}",
        f"  - override /model: {model}",
        f"  - override /data: {configuration.data_file(config)}",
        "",
    ]
    return "\n".join(lines) + OmegaConf.to_yaml(OmegaConf.create(configuration.nested(flat)))


def note(config: Config, data: GlueDataModule, run_id: str, best: BestEvaluation | None = None) -> str:
    """The run's description in Markdown: data, recipe, scores once there are any, and how to make or continue it."""
    lines = [*headline(config, data), f"on {', '.join(reversed(in_force(config).values()))}"]
    text = "\n\n".join(hard.replace("*", "\\*") for hard in lines)
    if best and best.values:
        rows = "\n".join(f"    {line}" for line in scores(configuration.task_of(config), best))
        text += f"\n\nBest evaluation, step {best.step}:\n\n{rows}"
    text += f"\n\nAgain (or with the artifact `{CONFIG_FILE}` as a recipe):\n\n    {provenance.command_line()}"
    return f"{text}\n\nIf it was interrupted:\n\n    python -m lightning_glue.train --resume {run_id}\n"
