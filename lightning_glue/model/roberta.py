"""fairseq's RobertaModel with a ``sentence_classification_head``, built and filled for one task."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from lightning_glue.model.fairseq_import import import_fairseq

import_fairseq()
from fairseq.data import Dictionary  # noqa: E402
from fairseq.models.roberta import RobertaModel  # noqa: E402
from fairseq.modules.transformer_sentence_encoder import init_bert_params  # noqa: E402

from lightning_glue.data.batching import Packed, padded  # noqa: E402
from lightning_glue.data.tokenizer import Tokenizer  # noqa: E402
from lightning_glue.errors import CheckpointError, ConfigError  # noqa: E402
from lightning_glue.model import unpadded  # noqa: E402
from lightning_glue.model.pretrained import Pretrained  # noqa: E402

HEAD = "sentence_classification_head"
MAX_TOKENS = 512  # the default of data.max_tokens: RoBERTa's positions
_LEAST_TOKENS = 8  # a pair and its specials
_DRAWING = {"normal_", "uniform_", "xavier_normal_", "xavier_uniform_", "kaiming_uniform_"}


class _WithoutDrawing(TorchFunctionMode):
    """Modules made within keep their weights as they were allocated: a checkpoint fills them, and drawing takes longer
    than loading it."""

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Iterable[type],
        args: Any = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(function, "__name__", "") in _DRAWING:
            return args[0] if args else kwargs["tensor"]
        return function(*args, **kwargs)


def fairseq_dictionary(tokenizer: Tokenizer) -> Dictionary:
    """The model's dictionary: the tokenizer's and ``<mask>``, as fairseq's ``sentence_prediction`` task loads it."""
    dictionary = Dictionary()
    for symbol, count in zip(tokenizer.symbols, tokenizer.counts):
        dictionary.add_symbol(symbol, n=count, overwrite=True)  # each is an id of its own, checked when read
    dictionary.add_symbol("<mask>")
    return dictionary


def build_model(start: Pretrained, num_outputs: int, overrides: dict[str, Any]) -> RobertaModel:
    """Build the model with the start's encoder and a new classification head.

    ``encoder.lm_head`` keeps its weights, so that a checkpoint is complete for fairseq, but needs no gradient: the
    task never uses it, and DDP would otherwise wait for it. ``runs_unpadded`` says which forward :func:`logits` takes.

    Args:
        num_outputs: classes, or 1 for regression.
        overrides: fairseq model arguments to change, for example ``dropout``.

    Raises:
        UserError: the checkpoint's tensors do not fit the architecture or the dictionary.
    """
    positions = start.args.get("tokens_per_sample") or MAX_TOKENS  # what fairseq takes where max_positions is not said
    args = Namespace(**{"max_positions": positions, **start.args, **overrides})
    args.load_checkpoint_heads = False
    width, heads = (getattr(args, f"encoder_{name}", None) for name in ("embed_dim", "attention_heads"))
    if width and heads and width % heads:
        raise CheckpointError(
            f"{width} dimensions (encoder_embed_dim) cannot be shared by {heads} encoder_attention_heads"
        )
    dictionary = fairseq_dictionary(start.tokenizer)
    task = SimpleNamespace(source_dictionary=dictionary, max_positions=lambda: args.max_positions)
    with nullcontext() if start.state is None else _WithoutDrawing():
        model = RobertaModel.build_model(args, task)
    model.register_classification_head(HEAD, num_classes=num_outputs)
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):  # BERT's; fairseq's own value is the default of its modules
            module.eps = getattr(args, "layer_norm_eps", module.eps)
    if start.state is not None:
        model.encoder.lm_head.apply(init_bert_params)  # a checkpoint may lack it
        load_encoder(model, start.state)
    for name, parameter in model.encoder.lm_head.named_parameters():
        if name != "weight":  # tied to the token embeddings
            parameter.requires_grad_(False)
    model.runs_unpadded = unpadded.supports(model)
    return model


def positions(model: RobertaModel) -> int:
    """Tokens of the longest row the model has positions for; its table has ``padding_idx + 1`` rows more."""
    return int(min(model.max_positions(), model.encoder.sentence_encoder.max_positions()))


def drops_layers(model: RobertaModel) -> bool:
    """Whether training leaves out layers at random (LayerDrop), whose parameters then have no gradient."""
    return bool(model.encoder.sentence_encoder.encoder_layerdrop)


def token_limit(model: RobertaModel, asked: int) -> int:
    """The length that examples are cut to: ``data.max_tokens``, or the model's positions where these are fewer.

    Raises:
        UserError: more than the default was asked for, and more than the model has.
    """
    held = positions(model)
    if min(asked, held) < _LEAST_TOKENS or (asked > held and asked != MAX_TOKENS):
        raise ConfigError(
            f"data.max_tokens={asked}, but the model has {held} positions; expected {_LEAST_TOKENS} to {held}"
        )
    return min(asked, held)


def load_encoder(model: RobertaModel, state: dict[str, torch.Tensor]) -> None:
    """Copy the encoder (and lm_head, where there is one) of a fairseq state dict; classification heads stay new.

    Raises:
        UserError: the state dict is another model's, or no model's at all.
    """
    upgraded = {name: tensor for name, tensor in state.items() if not name.startswith("classification_heads.")}
    model.upgrade_state_dict_named(upgraded, "")
    embeddings = "encoder.sentence_encoder.embed_tokens.weight"
    if embeddings not in upgraded:
        raise CheckpointError(
            f"checkpoint is no RoBERTa: it has no {embeddings}; found {', '.join(map(str, [*state][:3]))}"
        )
    upgraded.setdefault("encoder.lm_head.weight", upgraded[embeddings])
    current = model.state_dict()
    for name in sorted(upgraded.keys() & current.keys()):
        tensor = upgraded[name]
        if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided or not tensor.is_floating_point():
            raise CheckpointError(f"checkpoint entry {name} is no plain tensor of floating-point numbers")
        if tensor.shape != current[name].shape:
            raise CheckpointError(
                f"checkpoint tensor {name} has shape {tuple(tensor.shape)}, the model expects "
                f"{tuple(current[name].shape)}: another architecture, or a dictionary of another tokenizer"
            )
    missing, unexpected = torch.nn.Module.load_state_dict(model, upgraded, strict=False)
    missing = [name for name in missing if not name.startswith("encoder.lm_head.") and not name.endswith("version")]
    if missing or unexpected:
        raise CheckpointError(f"checkpoint does not fit the model: missing {missing[:3]}, unexpected {unexpected[:3]}")


def head_names(layer: str) -> list[str]:
    """Names in the state dict of a linear layer (``dense``, ``out_proj``) of the head."""
    return [f"classification_heads.{HEAD}.{layer}.{kind}" for kind in ("weight", "bias")]


def with_outputs(state: dict[str, torch.Tensor], order: list[int]) -> dict[str, torch.Tensor]:
    """The state dict with the head's outputs in another order: output i is what output ``order[i]`` was."""
    return state | {name: state[name][order] for name in head_names("out_proj")}


def logits(model: RobertaModel, batch: Packed, read: int | None = None) -> torch.Tensor:
    """Head outputs (examples, classes), of the first ``read`` examples or of all."""
    if not model.runs_unpadded:
        return stock_logits(model, batch, read)
    return model.classification_heads[HEAD](unpadded.features(model, batch, read)[:, None])


def stock_logits(model: RobertaModel, batch: Packed, read: int | None = None) -> torch.Tensor:
    """The same through fairseq's own forward, for models that :mod:`unpadded` does not know."""
    return model(padded(batch), features_only=True, classification_head_name=HEAD)[0][:read]


def task_loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Per-example loss (batch,): cross-entropy, or squared error for one output.

    The terms fairseq's ``criterions/sentence_prediction.py`` sums, computed in float32 as there.
    """
    outputs = outputs.float()
    if outputs.shape[-1] == 1:
        return torch.nn.functional.mse_loss(outputs.squeeze(-1), targets.float(), reduction="none")
    return torch.nn.functional.cross_entropy(outputs, targets, reduction="none")
