"""Micro-batches that fit into memory: halved, and twice as many of them, until the longest one of the training does."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from lightning_glue.config import Config
from lightning_glue.errors import OutOfMemory
from lightning_glue.training.allocator import is_out_of_memory
from lightning_glue.training.distributed import highest
from lightning_glue.utils.launch import LIGHTNING, launch
from lightning_glue.utils.logs import log
from lightning_glue.utils.redact import first_line

if TYPE_CHECKING:
    from lightning_glue.training.resume import Resume

_CHOSEN = "LIGHTNING_GLUE_ACCUMULATE"  # in the environment: what process 0 has chosen for those that Lightning starts


def divided(config: Config, accumulate: int) -> Config:
    """``config`` with each optimizer step cut into ``accumulate`` micro-batches; all else stays as it is in steps."""
    trainer = config.trainer
    if accumulate == trainer.accumulate:
        return config
    interval = trainer.val_check_interval
    if interval > 1:  # in micro-batches
        interval = interval * accumulate / trainer.accumulate
    made = replace(config, trainer=replace(trainer, accumulate=accumulate, val_check_interval=interval))
    made.recipe = config.recipe  # no field, so nothing replace() knows of
    return made


def as_recorded(config: Config, found: Resume) -> Config:
    """What the run that goes on was begun with, whatever would fit here: its position counts micro-batches."""
    accumulate = found.record.get("config", {}).get("trainer.accumulate")
    if not config.trainer.auto_batch or not isinstance(accumulate, int):
        return config
    return divided(config, accumulate)


def fitting(config: Config, world: int, attempt: Callable[[int], None], *, fixed: bool) -> int:
    """The number of micro-batches to an optimizer step whose longest one fits into memory, in every process.

    Args:
        attempt: puts the longest micro-batch of a step in so many parts through the model.
        fixed: nothing may be changed, for a run goes on.

    Raises:
        OutOfMemory: it does not fit, and may not be changed or has one example.
    """
    asked = accumulate = config.trainer.accumulate
    may_change = config.trainer.auto_batch and not fixed
    if may_change and launch().by == LIGHTNING and _CHOSEN in os.environ:
        return int(json.loads(os.environ[_CHOSEN]))
    while reason := _lacking(attempt, accumulate):
        smaller = 2 * accumulate
        if not may_change or config.data.batch_size < world * smaller:
            raise OutOfMemory(_advice(config, world, accumulate, reason, may_change))
        accumulate = smaller
    if may_change:
        accumulate = highest(accumulate)
        os.environ[_CHOSEN] = json.dumps(accumulate)
    if accumulate != asked:
        log.info(
            "the longest batch does not fit into memory: trainer.accumulate=%d instead of %d, %d examples at once; a "
            "step has %d as before",
            accumulate,
            asked,
            -(-config.data.batch_size // (world * accumulate)),
            config.data.batch_size,
        )
    return accumulate


def _lacking(attempt: Callable[[int], None], accumulate: int) -> str:
    """What the device says where there is no memory; empty where there is."""
    try:
        attempt(accumulate)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return first_line(error, 160)
    return ""


def _advice(config: Config, world: int, accumulate: int, reason: str, tried: bool) -> str:
    examples = -(-config.data.batch_size // (world * accumulate))
    what = f"the longest batch, {examples} examples at once, does not fit into memory ({reason})"
    if examples == 1:
        return f"{what}; lower data.max_tokens, or take a smaller model or another device"
    if tried:
        return f"{what}; raise data.batch_size to a multiple of {world * 2 * accumulate}, or lower data.max_tokens"
    ways = "lower data.batch_size or data.max_tokens"
    return f"{what}; set trainer.accumulate={2 * accumulate} or trainer.auto_batch=true, or {ways}"


def tags(config: Config, world: int) -> dict[str, str]:
    """What a run says where its micro-batches were chosen so."""
    if not config.trainer.auto_batch:
        return {}
    examples = -(-config.data.batch_size // (world * config.trainer.accumulate))
    return {"auto_batch.accumulate": str(config.trainer.accumulate), "auto_batch.examples_at_once": str(examples)}
