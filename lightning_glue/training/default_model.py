"""The model of a training or a search that names none: one rule for all commands and for the library."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

Composed = TypeVar("Composed")


def with_default_model(
    compose: Callable[[str | None], Composed],
    model: str | None,
    experiment: str | None,
    overrides: Iterable[str],
    gpus: Callable[[Composed], str],
) -> Composed:
    """What ``compose`` makes of the model: ``roberta.base`` where it is to run on a GPU, else ``conf/``'s, ``minilm``.

    One that was named, by itself or as ``model=``, is taken as it is, and an experiment says itself on what it is made.

    Args:
        model, experiment, overrides: as they were given.
        gpus: ``trainer.gpus`` of what was composed, however it was asked for.
    """
    composed = compose(model)
    named = model or experiment or any(override.lstrip("+").startswith("model=") for override in overrides)
    return composed if named or not on_gpu(gpus(composed)) else compose("roberta.base")


def on_gpu(gpus: str) -> bool:
    """Whether a training runs on a GPU for a value of ``trainer.gpus``: a number, or ``auto``, one if there is one."""
    if gpus != "auto":
        return int(gpus) > 0
    import torch

    return torch.cuda.device_count() > 0
