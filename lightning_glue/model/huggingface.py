"""Encoders and classifiers of Hugging Face folders as fairseq's RoBERTa, and back: configuration and weights.

Read are RoBERTa, XLM-R and BERT with learned absolute positions and gelu, from ``config.json`` and
``model.safetensors`` (or ``pytorch_model.bin``, or the parts of either), weights only. What differs:

- RoBERTa's positions begin behind ``pad_token_id``, fairseq's behind 1, BERT's at 0;
- the embedding of segment 0, which is added to every token, goes into the positions. BERT gives the second text of a
  pair segment 1 and one ``[SEP]``, fairseq neither: pairs have the embeddings that RoBERTa's have;
- LayerNorm's epsilon is kept as the model argument ``layer_norm_eps``, which fairseq itself, always at 1e-5, ignores.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_glue.data import huggingface_tokenizer
from lightning_glue.data.tokenizer import EOS, PAD, UNK, Tokenizer
from lightning_glue.errors import CheckpointError
from lightning_glue.model.checkpoint_file import safe_load
from lightning_glue.utils.digests import file_sha256
from lightning_glue.utils.redact import first_line

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

EPSILON = 1e-5  # of every LayerNorm of fairseq
HEAD = "classification_heads.sentence_classification_head."  # in the state dict of fairseq's model
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_TOP = "encoder.sentence_encoder."
_KINDS = {
    "roberta": "roberta.",
    "xlm-roberta": "roberta.",
    "bert": "bert.",
}  # model_type: prefix of a model with a head
_MOST = 100_000  # layers, width or positions of an architecture
_OLD, _NEW = re.compile(r"(?<=LayerNorm\.)(?:gamma|beta)$"), {"gamma": "weight", "beta": "bias"}
_PART = re.compile(r"[\w-][\w.-]*\.(?:safetensors|bin)", re.ASCII)

# fairseq's names of a layer's modules, theirs.
_LAYER = {
    "self_attn.q_proj": "attention.self.query",
    "self_attn.k_proj": "attention.self.key",
    "self_attn.v_proj": "attention.self.value",
    "self_attn.out_proj": "attention.output.dense",
    "self_attn_layer_norm": "attention.output.LayerNorm",
    "fc1": "intermediate.dense",
    "fc2": "output.dense",
    "final_layer_norm": "output.LayerNorm",
}
_HEADS = {"roberta.": ("classifier.dense", "classifier.out_proj"), "bert.": ("bert.pooler.dense", "classifier")}
_LM_HEAD = {"dense.weight", "dense.bias", "layer_norm.weight", "layer_norm.bias", "bias"}


@dataclass(frozen=True)
class HuggingFace:
    """What a folder holds, in fairseq's terms.

    Attributes:
        config: ``config.json``.
        args: fairseq's model arguments.
        state: fairseq state dict; with ``classification_heads.sentence_classification_head.*`` where there is a head,
            whose outputs are in the folder's order.
        sha256: of the weights' file, or of the digests of its parts.
    """

    config: dict[str, Any]
    args: dict[str, Any]
    state: dict[str, torch.Tensor]
    tokenizer: Tokenizer
    sha256: str


def folder_of(path: Path) -> Path | None:
    """The folder of Hugging Face that ``path`` is, or a weights file in one; None for anything else."""
    if path.suffix in (".safetensors", ".bin") and (path.parent / "config.json").is_file():
        return path.parent
    ours = any((path / name).is_file() for name in ("checkpoint_best.pt", "model.pt"))
    return path if (path / "config.json").is_file() and not ours else None


def load(folder: Path) -> HuggingFace:
    """Read a folder that ``save_pretrained`` wrote, or one of the hub.

    Raises:
        UserError: a file is missing or damaged, or the model or its tokenizer is of another kind; names what.
    """
    config = read_config(folder)
    renumbered = huggingface_tokenizer.read(folder)
    weights, files = _read_weights(folder)
    prefix = _KINDS[config["model_type"]]
    state = to_fairseq(weights, config, renumbered.rows, prefix, folder)
    digests = [file_sha256(file) for file in files]
    digest = digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
    return HuggingFace(config, _args(config, state), state, renumbered.tokenizer, digest)


def read_config(folder: Path) -> dict[str, Any]:
    """``config.json``, each field of which that fairseq's model has no counterpart of is refused by its name."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is no readable JSON ({first_line(error)}); get the file again") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} holds a {type(config).__name__}, expected a JSON object; get the file again")
    kind = config.get("model_type")
    if kind not in _KINDS:
        raise CheckpointError(f"{path}: model_type is {str(kind)[:40]!r}, which cannot be read; expected {_or(_KINDS)}")
    for name, usual in {
        "hidden_act": "gelu", "position_embedding_type": "absolute", "is_decoder": False, "add_cross_attention": False,
        "quantization_config": None,
    }.items():  # fmt: skip
        if (found := config.get(name, usual)) != usual:
            raise CheckpointError(
                f"{path}: {name} is {str(found)[:40]!r}, which fairseq's RoBERTa has not; expected {usual!r}"
            )
    for name in ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads",
                 "max_position_embeddings", "vocab_size", "type_vocab_size"):  # fmt: skip
        if type(config.get(name)) is not int or not 0 < config[name] <= (_MOST if name != "vocab_size" else 10**7):
            found = str(config.get(name))[:40]
            raise CheckpointError(f"{path}: {name} is {found!r}, expected a number from 1 to {_MOST}")
    epsilon = config.get("layer_norm_eps", 1e-12)
    if not isinstance(epsilon, float) or not 0 < epsilon < 0.1:
        raise CheckpointError(f"{path}: layer_norm_eps is {str(epsilon)[:40]!r}, expected a small number such as 1e-5")
    padding = config.get("pad_token_id", 0 if kind == "bert" else 1)
    if type(padding) is not int or not 0 <= padding < config["max_position_embeddings"]:
        raise CheckpointError(f"{path}: pad_token_id is {str(padding)[:40]!r}, expected the id of the padding token")
    if config.get("auto_map"):
        log.warning("%s names program code of its own (auto_map), which is not run", path)
    return config | {"layer_norm_eps": epsilon, "pad_token_id": padding}


def _or(names: Any) -> str:
    *first, last = names
    return f"{', '.join(first)} or {last}"


def _read_weights(folder: Path) -> tuple[dict[str, torch.Tensor], list[Path]]:
    """All tensors by name, and their files."""
    for name in WEIGHTS:
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            files = [folder / name]
        elif index.is_file():
            files = _parts(index)
        else:
            continue
        return {key: tensor for file in files for key, tensor in _read_file(file).items()}, files
    raise CheckpointError(f"{folder} has a config.json, but no weights; expected {_or(WEIGHTS)}")


def _parts(index: Path) -> list[Path]:
    """The files that an index names: names of files beside it, nothing else."""
    try:
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{index} is no index of weights ({first_line(error)}); get the file again") from None
    for name in names:
        if not isinstance(name, str) or not _PART.fullmatch(name) or not (index.parent / name).is_file():
            raise CheckpointError(f"{index} names the file {str(name)[:80]!r}, which is not beside it; get it as well")
    return [index.parent / name for name in names]


def _read_file(path: Path) -> dict[str, torch.Tensor]:
    import torch

    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} is damaged or no safetensors ({first_line(error)}); get it again") from None
    found = safe_load(path, mapped=True)
    if wrong := next((key for key, tensor in found.items() if not isinstance(tensor, torch.Tensor)), None):
        raise CheckpointError(f"{path}: {str(wrong)[:80]!r} is no tensor; expected names and tensors")
    return found


def _args(config: dict[str, Any], state: dict[str, torch.Tensor]) -> dict[str, Any]:
    """fairseq's model arguments."""
    args = {
        "encoder_layers": config["num_hidden_layers"],
        "encoder_embed_dim": config["hidden_size"],
        "encoder_ffn_embed_dim": config["intermediate_size"],
        "encoder_attention_heads": config["num_attention_heads"],
        "max_positions": len(state[f"{_TOP}embed_positions.weight"]) - PAD - 1,
    }
    return args if config["layer_norm_eps"] == EPSILON else args | {"layer_norm_eps": config["layer_norm_eps"]}


# --- the names of the weights ---------------------------------------------------------------------------------------


def _names(layers: int) -> Iterator[tuple[str, str]]:
    """Each weight of an encoder but its embeddings of tokens and positions: fairseq's name, theirs."""
    pairs = [("layernorm_embedding", "embeddings.LayerNorm")]
    for layer in range(layers):
        pairs += [(f"layers.{layer}.{ours}", f"encoder.layer.{layer}.{theirs}") for ours, theirs in _LAYER.items()]
    for ours, theirs in pairs:
        for kind in ("weight", "bias"):
            yield f"{_TOP}{ours}.{kind}", f"{theirs}.{kind}"


def to_fairseq(
    weights: dict[str, torch.Tensor], config: dict[str, Any], rows: list[int], prefix: str, source: Path
) -> dict[str, torch.Tensor]:
    """fairseq's state dict, in float32 (float64 stays) of the weights of a model with or without a head.

    Args:
        rows: for each id of fairseq's dictionary the row of the token embeddings there.
        prefix: of the encoder's names where the model has a head.
    """
    import torch

    renamed = {_OLD.sub(lambda found: _NEW[found[0]], name): tensor for name, tensor in weights.items()}
    inner = prefix if f"{prefix}embeddings.word_embeddings.weight" in renamed else ""

    def take(name: str, *shape: int) -> torch.Tensor:
        tensor = renamed.get(name)
        if tensor is None:
            found = ", ".join([*renamed][:3])
            raise CheckpointError(f"{source} has no weight {name}; found {found[:200] or 'nothing'}")
        if tuple(tensor.shape) != shape or not tensor.is_floating_point():
            expected = f"expected {shape}, as config.json has it"
            raise CheckpointError(f"{source}: {name} is {tensor.dtype} {tuple(tensor.shape)}, {expected}")
        return tensor if tensor.dtype == torch.float64 else tensor.float()

    width, inside, count = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    if len(rows) != count:
        raise CheckpointError(
            f"{source}: vocab_size is {count}, but its tokenizer has {len(rows)} tokens; get both of the same model"
        )
    embedded = take(f"{inner}embeddings.word_embeddings.weight", count, width)
    table = take(f"{inner}embeddings.position_embeddings.weight", config["max_position_embeddings"], width)
    segments = take(f"{inner}embeddings.token_type_embeddings.weight", config["type_vocab_size"], width)
    state = {
        f"{_TOP}embed_tokens.weight": embedded if rows == list(range(count)) else embedded[rows],
        f"{_TOP}embed_positions.weight": _positions(table, segments[0], config),
    }
    for ours, theirs in _names(config["num_hidden_layers"]):
        outer = inside if ".fc1." in ours else width
        shape = (outer,) if ours.endswith("bias") or "norm" in ours else (outer, inside if ".fc2." in ours else width)
        state[ours] = take(f"{inner}{theirs}", *shape)
    dense, out = _HEADS[prefix]
    if f"{out}.weight" in renamed and f"{dense}.weight" in renamed:
        outputs = len(renamed[f"{out}.weight"])
        for ours, theirs, size in (("dense", dense, width), ("out_proj", out, outputs)):
            state[f"{HEAD}{ours}.weight"] = take(f"{theirs}.weight", size, width)
            state[f"{HEAD}{ours}.bias"] = take(f"{theirs}.bias", size)
    return state


def _positions(table: torch.Tensor, segment: torch.Tensor, config: dict[str, Any]) -> torch.Tensor:
    """fairseq's table of positions, which begin in row ``PAD + 1``."""
    import torch

    begin = 0 if config["model_type"] == "bert" else config["pad_token_id"] + 1
    if segment.any():
        table = table + segment
    if begin == PAD + 1:
        return table
    return torch.cat([table.new_zeros(PAD + 1, table.shape[1]), table[begin:]])


def to_huggingface(state: dict[str, torch.Tensor], layers: int, tokens: int) -> dict[str, torch.Tensor]:
    """The weights of a ``RobertaForSequenceClassification`` from fairseq's state dict.

    Args:
        tokens: rows of the token embeddings; those behind the dictionary's are copies of ``<unk>``.
    """
    import torch

    embedded, table = state[f"{_TOP}embed_tokens.weight"], state[f"{_TOP}embed_positions.weight"]
    more = tokens - len(embedded)
    weights = {
        "roberta.embeddings.word_embeddings.weight": torch.cat([embedded, embedded[UNK].expand(more, -1)]),
        "roberta.embeddings.position_embeddings.weight": table,
        "roberta.embeddings.token_type_embeddings.weight": table.new_zeros(1, table.shape[1]),
    }
    weights |= {f"roberta.{theirs}": state[ours] for ours, theirs in _names(layers)}
    for layer in ("dense", "out_proj"):
        for kind in ("weight", "bias"):
            weights[f"classifier.{layer}.{kind}"] = state[f"{HEAD}{layer}.{kind}"]
    return {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}


def make_config(args: dict[str, Any], state: dict[str, torch.Tensor], tokens: int) -> dict[str, Any]:
    """``config.json`` of :func:`to_huggingface`'s weights, without what a task adds.

    Args:
        args: fairseq's model arguments.
    """
    table = state[f"{_TOP}embed_positions.weight"]
    return {
        "architectures": ["RobertaForSequenceClassification"],
        "model_type": "roberta",
        "attention_probs_dropout_prob": args.get("attention_dropout", 0.1),
        "hidden_dropout_prob": args.get("dropout", 0.1),
        "classifier_dropout": args.get("pooler_dropout", 0.0),
        "bos_token_id": 0,
        "pad_token_id": PAD,
        "eos_token_id": EOS,
        "hidden_act": "gelu",
        "hidden_size": table.shape[1],
        "initializer_range": 0.02,
        "intermediate_size": len(state[f"{_TOP}layers.0.fc1.bias"]),
        "layer_norm_eps": args.get("layer_norm_eps", EPSILON),
        "max_position_embeddings": len(table),
        "num_attention_heads": args["encoder_attention_heads"],
        "num_hidden_layers": args["encoder_layers"],
        "type_vocab_size": 1,
        "vocab_size": tokens,
        "dtype": str(table.dtype).removeprefix("torch."),
    }
