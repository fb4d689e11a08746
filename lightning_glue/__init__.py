"""Fine-tune fairseq's RoBERTa on GLUE with PyTorch Lightning, MLflow and Optuna.

As a library: :func:`fit`, :func:`load` and :func:`search`. They are imported when they are first asked for.
"""

import os
from typing import TYPE_CHECKING, Any

from lightning_glue.utils.openmp import sleep_while_waiting

if TYPE_CHECKING:
    from lightning_glue.api import Run, Study, Trial, fit, load, search
    from lightning_glue.errors import (
        CheckpointError,
        ConfigError,
        DataError,
        Diverged,
        Interrupted,
        TrackingError,
        UserError,
    )

sleep_while_waiting()
# Read when MLflow is first imported. It would report its use to its makers, from a thread of its own.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

if "LIGHTNING_GLUE_PARENT" in os.environ:  # before anything that takes seconds to import
    from lightning_glue.utils.processes import end_with_parent

    end_with_parent()

__version__ = "0.2.0"

__all__ = [
    "CheckpointError", "ConfigError", "DataError", "Diverged", "Interrupted", "Run", "Study", "TrackingError", "Trial",
    "UserError", "fit", "load", "search",
]  # fmt: skip
_OF_API = ("Run", "Study", "Trial", "fit", "load", "search")


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module("lightning_glue.api" if name in _OF_API else "lightning_glue.errors"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
