"""What this package changes in a process that is somebody else's, put back afterwards."""

from __future__ import annotations

import gc
import logging
import os
import random
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

# Of the environment: what trainings tell MLflow, Lightning, torch and their own processes there.
_PREFIXES = ("LIGHTNING_GLUE_", "MLFLOW_", "PL_", "MASTER_", "TORCH", "CUBLAS_", "NCCL_")
_NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "NODE_RANK", "GROUP_RANK", "GROUP_WORLD_SIZE")


@contextmanager
def as_a_guest(loggers: Sequence[str] = ()) -> Iterator[None]:
    """Afterwards signal handlers, warning filters, logging levels, random states and the environment are as before.

    Handlers are those of the main thread; in another one there are none to put back. Of the environment it is what
    trainings use. What :mod:`~lightning_glue.utils.quick_imports` put aside meanwhile counts again for the collector of
    garbage, unless something had been put aside before.

    Args:
        loggers: names of those whose levels will be changed, besides all that are there already.
    """
    with ExitStack() as stack:
        if not gc.get_freeze_count():
            stack.callback(gc.unfreeze)
        stack.enter_context(_environment())
        stack.enter_context(_handlers())
        stack.enter_context(_levels(loggers))
        stack.enter_context(_randomness())
        stack.enter_context(warnings.catch_warnings())
        yield


@contextmanager
def _environment() -> Iterator[None]:
    def own() -> dict[str, str]:
        return {name: value for name, value in os.environ.items() if name.startswith(_PREFIXES) or name in _NAMES}

    before = own()
    try:
        yield
    finally:
        for name in own().keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)


@contextmanager
def _handlers() -> Iterator[None]:
    main = threading.current_thread() is threading.main_thread()
    before = {number: signal.getsignal(number) for number in signal.valid_signals()} if main else {}
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None and signal.getsignal(number) is not handler:
                signal.signal(number, handler)


@contextmanager
def _levels(names: Sequence[str]) -> Iterator[None]:
    there = [entry for entry in logging.root.manager.loggerDict.values() if isinstance(entry, logging.Logger)]
    levels = {logger: logger.level for logger in [logging.root, *there, *map(logging.getLogger, names)]}
    try:
        yield
    finally:
        for logger, level in levels.items():
            if logger.level != level:
                logger.setLevel(level)


@contextmanager
def _randomness() -> Iterator[None]:
    """Of Python, NumPy and torch, as far as these are imported."""
    numpy, torch = sys.modules.get("numpy"), sys.modules.get("torch")
    python, states = random.getstate(), _states(numpy, torch)
    deterministic = torch.are_deterministic_algorithms_enabled() if torch else False
    try:
        yield
    finally:
        random.setstate(python)
        if numpy:
            numpy.random.set_state(states["numpy"])
        if torch:
            torch.set_rng_state(states["torch"])
            if torch.are_deterministic_algorithms_enabled() != deterministic:  # or torch imports its compiler
                torch.use_deterministic_algorithms(deterministic)
            if "cuda" in states:
                torch.cuda.set_rng_state_all(states["cuda"])


def _states(numpy: Any, torch: Any) -> dict[str, Any]:
    states = {"numpy": numpy.random.get_state()} if numpy else {}
    if torch:
        states["torch"] = torch.get_rng_state()
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            states["cuda"] = torch.cuda.get_rng_state_all()
    return states
