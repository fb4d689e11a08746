"""Checkpoint files of fairseq and Lightning, read without executing anything in them."""

from __future__ import annotations

import re
from argparse import Namespace
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_glue.errors import CheckpointError, UserError
from lightning_glue.utils.redact import first_line, hide_secrets

if TYPE_CHECKING:
    import torch

_MOST = 100_000  # layers, width or positions of an architecture
_PREFIX = "model."  # of the RobertaModel in a Lightning checkpoint of GlueModule


@contextmanager
def reading(name: str) -> Iterator[None]:
    """One line that says ``name``, whatever the content of a foreign file makes the libraries raise."""
    try:
        yield
    except MemoryError:
        raise
    except UserError as error:
        raise (error if name in str(error) else CheckpointError(f"{name}: {error}")) from error
    except Exception as error:
        said = hide_secrets(" ".join(str(error).split()))[:300]
        raise CheckpointError(f"{name} does not hold a model as expected ({type(error).__name__}: {said})") from error


def safe_load(path: Path, *, mapped: bool = False, verified: bool = False) -> dict[str, Any]:
    """Load a checkpoint's tensors and plain values, never code, and never tensors that were damaged since.

    Old fairseq checkpoints hold an ``argparse.Namespace`` or omegaconf objects; these inert classes are allowed.

    Args:
        mapped: leave the tensors in the file, whose pages are read when they are used; the oldest format cannot.
        verified: the caller compares the file's SHA-256; else its own checksums are compared, which torch does not look
            at (0.3 s for each 500 MB). The oldest format has none.

    Raises:
        UserError: the file is missing, damaged, or holds any other class.
    """
    import pickle
    import typing

    import torch
    from omegaconf import DictConfig, ListConfig
    from omegaconf.base import ContainerMetadata, Metadata
    from omegaconf.nodes import AnyNode

    if not path.is_file():
        raise CheckpointError(f"checkpoint {path} does not exist")
    inert = [Namespace, DictConfig, ListConfig, ContainerMetadata, Metadata, AnyNode, defaultdict, typing.Any]
    try:
        zipped = _is_zip(path)
        if zipped:
            _check_records(path, sums=not verified)
        with torch.serialization.safe_globals([*inert, *_numbers(), dict, list, int]):
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped and zipped)
    except UserError:
        raise
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        found = f"; it asks for {named[1]}" if named else ""
        raise CheckpointError(
            f"{path} is damaged or holds more than tensors and plain values, so it is not loaded{found}"
        ) from None
    except Exception as error:  # of a damaged file torch raises anything
        raise CheckpointError(f"{path} is no readable checkpoint ({first_line(error, 200)})") from None
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} holds a {type(state).__name__}, expected a checkpoint dictionary")
    return state


def _numbers() -> list[Any]:
    """What a pickled number of NumPy is made of, which trainers of long ago kept among their scores."""
    import numpy as np

    scalar = np.float64(0).__reduce__()[0]
    kinds = [type(np.dtype(kind)) for kind in ("f2", "f4", "f8", "i4", "i8", "?")]
    names = [f"numpy.{core}.multiarray.scalar" for core in ("core", "_core")]
    return [*((scalar, name) for name in names), np.dtype, *kinds]


def _is_zip(path: Path) -> bool:
    """Whether torch will read ``path`` as the zip file that ``torch.save`` writes."""
    with open(path, "rb") as file:
        return file.read(4) == b"PK\x03\x04"


_FOLDER = 0x10  # DOS's attribute; of such a record torch reads nothing, and returns memory as it was


def _check_records(path: Path, *, sums: bool) -> None:
    """Raise UserError where a record differs from its checksum, or where the records hold more than the file.

    ``torch.save`` compresses nothing: a file whose records are compressed could fill the memory.
    """
    import zipfile

    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
        if any(one.compress_type != zipfile.ZIP_STORED for one in records):
            raise CheckpointError(
                f"{path} has compressed records, which torch.save does not write; save it again with torch"
            )
        if folder := next((one.filename for one in records if one.external_attr & _FOLDER), None):
            raise CheckpointError(f"{path} is damaged: its record {folder} is marked as a folder")
        if sum(one.file_size for one in records) > path.stat().st_size:
            raise CheckpointError(f"{path} is damaged: its records claim more bytes than the file has")
        if not sums or not any(one.CRC for one in records):  # torch.serialization.set_crc32_options(False)
            return
        if damaged := archive.testzip():
            raise CheckpointError(f"{path} is damaged: its record {damaged} does not have its checksum")


def weights_file(path: Path) -> Path:
    """The checkpoint in a directory: ``checkpoint_best.pt``, else the ``model.pt`` of fairseq's archives."""
    if path.suffix == ".safetensors":
        raise CheckpointError(_foreign(path))
    if not path.is_dir():
        return path
    found = [path / name for name in ("checkpoint_best.pt", "model.pt") if (path / name).is_file()]
    if found:
        return found[0]
    if any((path / name).exists() for name in ("pytorch_model.bin", "model.safetensors", "config.json")):
        raise CheckpointError(_foreign(path))
    raise CheckpointError(f"{path} holds neither checkpoint_best.pt nor model.pt; expected a checkpoint of fairseq")


def _foreign(path: Path) -> str:
    return (
        f"{path} is a model of Hugging Face; expected a *.pt of fairseq here (MODEL= takes its folder with config.json)"
    )


def embeddings(state: dict[str, torch.Tensor]) -> str:
    """Name of the token embeddings of a RoBERTa encoder of any age; empty if there are none."""
    return next((name for name in state if name.endswith("sentence_encoder.embed_tokens.weight")), "")


def fairseq_args(checkpoint: dict[str, Any], path: Path) -> dict[str, Any]:
    """The model arguments in a fairseq checkpoint of a RoBERTa, old (``args``) or new (``cfg``).

    Raises:
        UserError: it is something else, or its weights or arguments are not of the kind they must be.
    """
    if "model" not in checkpoint:
        names = list(map(str, checkpoint))
        if any(name.endswith(("word_embeddings.weight", "attention.self.query.weight")) for name in names):
            raise CheckpointError(_foreign(path))
        found = ", ".join(name[:40] for name in names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        raise CheckpointError(f"{path} is no fairseq checkpoint: it has no 'model'; found {found or 'nothing'}")
    _check_weights(checkpoint["model"], path)
    args = _named_args(checkpoint, path)
    _check_sizes(args, checkpoint["model"], path)
    return args


def _check_weights(state: Any, path: Path) -> None:
    import torch

    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: 'model' is a {type(state).__name__}, expected names and tensors")
    for name, tensor in state.items():
        if not (isinstance(name, str) and isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided):
            raise CheckpointError(
                f"{path}: {str(name)[:100]!r} of 'model' is no dense tensor ({type(tensor).__name__})"
            )
    name = embeddings(state)
    if not name or state[name].dim() != 2:
        raise CheckpointError(
            f"{path} is no RoBERTa: its 'model' has no sentence_encoder.embed_tokens.weight (rows, width)"
        )


def _named_args(checkpoint: dict[str, Any], path: Path) -> dict[str, Any]:
    from omegaconf import OmegaConf

    try:
        args = checkpoint["cfg"]["model"] if checkpoint.get("cfg") else checkpoint.get("args")
        if OmegaConf.is_config(args):
            args = OmegaConf.to_container(args)
        if args is not None:
            return {str(name): value for name, value in (vars(args) if isinstance(args, Namespace) else args).items()}
    except Exception as error:  # the checkpoint's objects are of any kind
        raise CheckpointError(f"{path} names no readable architecture ({first_line(error, 200)})") from None
    raise CheckpointError(f"{path} names no architecture: neither 'cfg' nor 'args' is in it")


def _check_sizes(args: dict[str, Any], state: dict[str, torch.Tensor], path: Path) -> None:
    """Raise UserError where building the architecture would fail, or go on for ever, before it is compared."""
    for name in (
        *(f"encoder_{size}" for size in ("layers", "embed_dim", "ffn_embed_dim", "attention_heads")),
        "max_positions",
    ):
        value = args.get(name)
        if value is not None and (type(value) is not int or not 0 < value <= _MOST):
            raise CheckpointError(f"{path}: {name} is {str(value)[:50]!r}, expected a number from 1 to {_MOST}")
    epsilon = args.get("layer_norm_eps", 1e-5)
    if not isinstance(epsilon, float) or not 0 < epsilon < 0.1:
        raise CheckpointError(f"{path}: layer_norm_eps is {str(epsilon)[:50]!r}, expected a small number such as 1e-5")
    if (args.get("encoder_layers") or 0) > len(state):
        raise CheckpointError(f"{path}: encoder_layers is {args['encoder_layers']}, but there are {len(state)} tensors")
    width = state[embeddings(state)].shape[1]
    if (args.get("encoder_embed_dim") or width) != width:
        raise CheckpointError(
            f"{path}: encoder_embed_dim is {args['encoder_embed_dim']}, but its embeddings have {width}"
        )


def model_state(path: Path) -> dict[str, torch.Tensor]:
    """fairseq state dict of a checkpoint: a fairseq ``*.pt``, or a ``*.ckpt`` that training wrote."""
    state = safe_load(path)
    with reading(str(path)):
        if "state_dict" in state:
            return {
                name.removeprefix(_PREFIX): tensor
                for name, tensor in state["state_dict"].items()
                if name.startswith(_PREFIX)
            }
        fairseq_args(state, path)  # raises where this is no fairseq checkpoint
        return state["model"]
