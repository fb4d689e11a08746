"""A model by any of its names: run id, registered model, exported directory, file."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_glue.errors import CheckpointError, ConfigError
from lightning_glue.utils.quick_imports import quick_imports

if TYPE_CHECKING:
    from lightning_glue.inference.text_model import Model


def load_model(reference: str, uri: str | None = None, device: str | None = None, *, calibrated: bool = False) -> Model:
    """See :func:`lightning_glue.load`; ``reference`` is a run's id, ``models:/<name>@<alias>`` or a path."""
    with quick_imports(freeze=False):
        import torch

        from lightning_glue.inference.text_model import Model
        from lightning_glue.inference.training_checkpoint import load_any
        from lightning_glue.tracking.artifacts import locate
        from lightning_glue.utils.guest import as_a_guest

    available = torch.cuda.is_available()
    device = device or ("cuda" if available else "cpu")
    if device not in ("cpu", "cuda") or (device == "cuda" and not available):
        raise ConfigError(f"device={device!r}; expected cpu" + (" or cuda" if available else ": no GPU is to be had"))
    with as_a_guest(["fairseq"]):
        if not isinstance(reference, str) or not reference:
            raise CheckpointError(f"{reference!r} names no model; expected a run, its id, a path or models:/name@alias")
        return Model(load_any(locate(reference, uri)), device, calibrated=calibrated)
