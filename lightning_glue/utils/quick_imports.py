"""Importing torch, Lightning and fairseq faster."""

from __future__ import annotations

import atexit
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from lightning_glue.utils.deferred import Deferred, DeferredCompiler, deferred
from lightning_glue.utils.openmp import spin_where_cores_are_free

# A third of the importing, for nothing that this project calls: torchmetrics looks whether scipy.signal has ``hamming``
# (torchmetrics/__init__.py), draws with matplotlib, and takes models of transformers, where that is installed, for
# metrics of generated text; fairseq takes f1_score, pearsonr and others for criterions and tasks of its own.
NEVER_CALLED = (
    "scipy.signal", "scipy.stats", "sklearn", "sklearn.metrics", "transformers",
    "matplotlib", "matplotlib.axes", "matplotlib.pyplot",
)  # fmt: skip


@contextmanager
def quick_imports(*, freeze: bool = True) -> Iterator[None]:
    """Imports within this run in half the time.

    Without garbage collection, because they make very many objects that stay, and each collection goes through them
    again; afterwards, too, unless they are put aside. And without :data:`NEVER_CALLED` and torch's compiler, until
    somebody calls these.

    Args:
        freeze: whether all that is there then is put aside; not in a process that is somebody else's.
    """
    spin_where_cores_are_free()
    collecting = gc.isenabled()
    gc.disable()
    try:
        with deferred(*map(Deferred, NEVER_CALLED), DeferredCompiler()):
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
