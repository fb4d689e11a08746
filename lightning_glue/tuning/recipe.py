"""The recipe a study has found, as a file that ``--experiment tuned/<task>`` uses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning_glue import config as configuration
from lightning_glue.config import Config, options
from lightning_glue.config.escape import escaped
from lightning_glue.utils.files import new_file

_UNNAMED = "roberta.base"  # what the model of a path is made from


def write_recipe(config: Config, *, study: str, trial: int, metric: str, value: float, trials: int) -> Path:
    """Write ``experiments/tuned/<task>.yaml``: what composes the configuration of a study's best trial.

    In the current folder, where it takes the place of another study's.

    Args:
        config: the best trial's.

    Raises:
        OSError: it cannot be written.
    """
    from omegaconf import OmegaConf

    model = config.model.name if config.model.name in options("model") else _UNNAMED
    lines = [
        "# @package _global_",
        f"# Study {_one_line(study)}: trial {trial} of {trials}, {metric} {value:.4f}. Written by lightning_glue.tune.",
        "defaults:",
        f"  - override /task: {configuration.task_file(config)}",
        f"  - override /model: {model}",
        f"  - override /data: {configuration.data_file(config)}",
        "",
    ]
    own = differences(config, model)
    target = Path.cwd() / "experiments" / "tuned" / f"{config.task.name}.yaml"
    target.parent.mkdir(parents=True, exist_ok=True)
    with new_file(target) as file:
        file.write("\n".join(lines) + (OmegaConf.to_yaml(OmegaConf.create(escaped(own))) if own else ""))
    return target


def _one_line(text: str) -> str:
    return " ".join(text.split())


def differences(config: Config, model: str) -> dict[str, Any]:
    """The keys, nested, whose values are not those that task, ``model`` and data alone would give.

    Of those that :func:`lightning_glue.config.identity` has: not where a run is carried out or recorded. And the
    description of data of one's own.
    """
    description = config.task.description
    usual = (
        configuration.compose(model=model, data=description)
        if description
        else configuration.compose(task=config.task.name, model=model, data=config.data.source)
    )
    before = configuration.identity(usual)
    own = {key: value for key, value in configuration.identity(config).items() if value != before[key]}
    own |= {"task.name": config.task.name, "task.description": description} if description else {}
    return configuration.nested(own)
