"""Importing torch, Lightning and fairseq faster."""

from __future__ import annotations

import atexit
import gc
import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

# A fifth of the importing, for nothing that this project calls: torchmetrics looks whether scipy.signal has ``hamming``
# (torchmetrics/__init__.py) and takes models of transformers, where that is installed, for metrics of generated text;
# fairseq takes f1_score, pearsonr and others for criterions and tasks of its own.
NEVER_CALLED = ("scipy.signal", "scipy.stats", "sklearn", "sklearn.metrics", "transformers")


@contextmanager
def quick_imports(*, freeze: bool = True) -> Iterator[None]:
    """Imports within this run in two thirds of the time.

    Without garbage collection, because they make very many objects that stay, and each collection goes through them
    again; afterwards, too, unless they are put aside. And with :class:`Deferred` in place of :data:`NEVER_CALLED`.

    Args:
        freeze: whether all that is there then is put aside; not in a process that is somebody else's.
    """
    collecting = gc.isenabled()
    gc.disable()
    try:
        with deferred(*NEVER_CALLED):
            yield
    finally:
        if freeze:
            gc.freeze()
            atexit.unregister(_thaw)
            atexit.register(_thaw)
        if collecting:
            gc.enable()


def _thaw() -> None:
    """Give the interpreter's last collection what was put aside, where Triton is among it.

    Triton, which torch brings along for GPUs, would complain at length about each of its objects that outlives that.
    Elsewhere a process ends a second sooner without.
    """
    if "triton" in sys.modules:
        gc.unfreeze()


class Deferred(ModuleType):
    """Stands in for a module while others import it. Its functions, called later, import the module itself."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__spec__ = ModuleSpec(name, None)  # torch._dynamo asks for it

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("__"):
            raise AttributeError(name)

        def function(*args: Any, **options: Any) -> Any:
            return getattr(importlib.import_module(self.__name__), name)(*args, **options)

        return function


@contextmanager
def deferred(*names: str) -> Iterator[None]:
    """Stand-ins for these modules within this run, where they are not imported yet; parents before their children."""
    stand_ins = {name: Deferred(name) for name in names if name not in sys.modules}
    for name, stand_in in stand_ins.items():
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(importlib.import_module(parent), child, stand_in)
        sys.modules[name] = stand_in
    try:
        yield
    finally:
        for name, stand_in in stand_ins.items():
            parent, _, child = name.rpartition(".")
            if parent in sys.modules:
                delattr(sys.modules[parent], child)
            if sys.modules.get(name) is stand_in:
                del sys.modules[name]
