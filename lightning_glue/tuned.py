"""The recipe a study has found, as a file that ``--experiment tuned/<task>`` uses."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_glue.atomic import new_file
from lightning_glue.config import EXPERIMENTS, Config, options


def write_recipe(
    config: Config, parameters: Mapping[str, Any], *, study: str, trial: int, metric: str, value: float, trials: int
) -> Path:
    """Write ``experiments/tuned/<task>.yaml``: the study's task, model and data, and its best trial's parameters.

    It takes the place of another study's.
    """
    from omegaconf import OmegaConf

    nested: dict[str, Any] = {}
    for key, entry in parameters.items():
        group, _, name = key.rpartition(".")
        (nested.setdefault(group, {}) if group else nested)[name] = entry
    named = config.model.name in options("model")
    lines = [
        "# @package _global_",
        f"# Study {study}: trial {trial} of {trials}, {metric} {value:.4f}. Written by lightning_glue.tune.",
        "defaults:",
        f"  - override /task: {config.task.name}",
        *([f"  - override /model: {config.model.name}"] if named else []),
        *(["  - override /data: sample"] if config.data.source == "sample" else []),
        "",
    ]
    if not named:
        nested.setdefault("model", {}).update(name=config.model.name, source=config.model.source)
    target = EXPERIMENTS / "tuned" / f"{config.task.name}.yaml"
    target.parent.mkdir(parents=True, exist_ok=True)
    with new_file(target) as file:
        file.write("\n".join(lines) + OmegaConf.to_yaml(OmegaConf.create(nested)))
    return target
