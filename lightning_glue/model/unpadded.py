"""The forward of fairseq's RobertaModel on real tokens only: the same parameters, outputs and gradients, less work.

GLUE batches are mostly padding. Here embeddings, linear layers and LayerNorms see the tokens of a batch one after the
other, without padding; only attention, a few per cent of the work at GLUE's lengths, puts them into rows again where
its kernel needs that. The head reads the first token alone, so the last layer computes nothing else beyond its keys and
values. Dropout acts in the places where fairseq has it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_glue.data.batching import Packed
from lightning_glue.model import dropout, packed_attention, row_gradients
from lightning_glue.model.cpu_attention import attend
from lightning_glue.model.fairseq_import import import_fairseq
from lightning_glue.utils.processor import has_triton

import_fairseq()
from fairseq.models.transformer.transformer_encoder import TransformerEncoderBase  # noqa: E402
from fairseq.modules import MultiheadAttention  # noqa: E402
from fairseq.modules.learned_positional_embedding import LearnedPositionalEmbedding  # noqa: E402
from fairseq.modules.transformer_layer import TransformerEncoderLayerBase  # noqa: E402

if TYPE_CHECKING:
    from fairseq.models.roberta import RobertaModel
    from fairseq.modules.fairseq_dropout import FairseqDropout

# On the CPU oneDNN makes a kernel for each shape it meets, which takes milliseconds, and keeps it. Products of batches
# rounded up to these have few shapes: a seventh more examples a second, and memory that stays as it is.
_TOKEN_STEP, _LENGTH_STEP = 32, 8
_GELU = ("gelu", "gelu_accurate")


@dataclass(frozen=True)
class Rows:
    """Where the tokens of a batch stand. Nothing here waits for the device.

    Attributes:
        real: (batch, length) bool, False at padding.
        places: (tokens,) index of each token in the flattened batch; on the CPU a few of the first token follow,
            which are computed but never read.
        columns: (tokens,) index of each of them in its row.
        count: real tokens.
        first: (read,) index of the first token among the real ones, of each row that is read.
        bounds: (batch + 1,) int32, cumulative lengths.
        longest: at least the tokens of any row.
    """

    real: Tensor
    places: Tensor
    columns: Tensor
    count: int
    first: Tensor
    bounds: Tensor
    longest: int

    @classmethod
    def of(cls, lengths: Tensor, count: int, longest: int, read: int | None = None) -> Rows:
        """Of rows with these ``lengths`` (batch,), their sum and at least their maximum; ``read`` of them are read."""
        if not lengths.is_cuda:
            longest += -longest % _LENGTH_STEP
        bounds = F.pad(lengths.cumsum(0), (1, 0))
        row = torch.repeat_interleave(lengths, output_size=count)
        columns = torch.arange(count, device=lengths.device) - bounds.index_select(0, row)
        places = row * longest + columns
        if not lengths.is_cuda:
            places, columns = (F.pad(index, (0, -count % _TOKEN_STEP)) for index in (places, columns))
        real = torch.arange(longest, device=lengths.device) < lengths[:, None]
        return cls(real, places, columns, count, bounds[:-1][:read], bounds.to(torch.int32), longest)

    @property
    def each(self) -> Tensor:
        """As :attr:`bounds`, where each row that is read has one token: of queries at the first tokens alone."""
        return torch.arange(len(self.bounds), dtype=torch.int32, device=self.bounds.device).clamp(max=len(self.first))

    @cached_property
    def padded(self) -> Tensor:
        """(batch * length,) index among the tokens; at padding that of the row's first one."""
        column = torch.arange(self.real.shape[1], device=self.real.device)
        found = self.bounds[:-1, None] + column * self.real
        return found.flatten().clamp(max=len(self.places) - 1)  # a row may have no token

    def pad(self, packed: Tensor) -> Tensor:
        """(tokens, width) to (batch, length, width), at padding the row's first token. What is made of that must not
        count: gradients of padding are taken to be 0."""
        padded: Tensor = _Pad.apply(packed, self.padded, self.places, self.count)
        return padded.view(*self.real.shape, -1)

    def pack(self, padded: Tensor) -> Tensor:
        """The inverse of :meth:`pad`."""
        return padded.flatten(0, 1).index_select(0, self.places)


class _Pad(torch.autograd.Function):
    """A copy by index either way: to copy tokens into zeros takes eight times as long, and autograd's way back four."""

    @staticmethod
    def forward(ctx: Any, packed: Tensor, padded: Tensor, places: Tensor, count: int) -> Tensor:
        ctx.save_for_backward(places)
        ctx.count = count
        return packed.index_select(0, padded)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        found = gradients[0].index_select(0, *ctx.saved_tensors)
        found[ctx.count :] = 0  # tokens that are never read
        return found, None, None, None


def supports(model: RobertaModel) -> bool:
    """Whether the encoder is RoBERTa as published: post-norm, learned positions, no layerdrop or quantisation noise."""
    encoder = model.encoder.sentence_encoder
    return (
        isinstance(encoder, TransformerEncoderBase)
        and encoder.layer_norm is None
        and encoder.quant_noise is None
        and encoder.encoder_layerdrop == 0
        and isinstance(encoder.embed_positions, LearnedPositionalEmbedding)
        and not encoder.return_fc
        and all(map(_plain_layer, encoder.layers))
    )


def _plain_layer(layer: TransformerEncoderLayerBase) -> bool:
    if not isinstance(layer, TransformerEncoderLayerBase) or layer.normalize_before:
        return False
    attention = layer.self_attn
    linears = (attention.q_proj, attention.k_proj, attention.v_proj, attention.out_proj, layer.fc1, layer.fc2)
    return (
        isinstance(attention, MultiheadAttention)
        and attention.bias_k is None
        and not attention.add_zero_attn
        and not attention.use_xformers
        and all(type(linear) is nn.Linear and linear.bias is not None for linear in linears)
    )


def features(model: RobertaModel, batch: Packed, read: int | None = None) -> Tensor:
    """Last layer's output (examples, width) at the first token of each example.

    Args:
        read: of how many examples, the first ones of the batch; None: of all.
    """
    encoder = model.encoder.sentence_encoder
    rows = Rows.of(batch["lengths"], len(batch["tokens"]), batch["longest"], read)
    x = half = _embed(encoder, batch["tokens"], rows)
    *layers, last = encoder.layers
    for layer in layers:
        x, half = _layer(layer, x, half, rows, first_only=False)
    return _layer(last, x, half, rows, first_only=True)[0]


def _embed(encoder: TransformerEncoderBase, tokens: Tensor, rows: Rows) -> Tensor:
    """(tokens, width). Positions count from padding_idx + 1, as fairseq's ``utils.make_positions``."""
    tokens = F.pad(tokens, (0, len(rows.columns) - len(tokens)))
    positions = rows.columns + encoder.padding_idx + 1
    x = encoder.embed_scale * row_gradients.embedding(encoder.embed_tokens, tokens)
    x = x + F.embedding(positions, encoder.embed_positions.weight, encoder.embed_positions.padding_idx)
    if encoder.layernorm_embedding is not None:
        x = encoder.layernorm_embedding(x)
    return _dropout(encoder.dropout_module, x)


def _dropout(module: FairseqDropout, x: Tensor) -> Tensor:
    """fairseq's FairseqDropout."""
    return dropout.dropout(x, _rate(module), training=True)


def _rate(module: FairseqDropout) -> float:
    return module.p if module.training or module.apply_during_inference else 0.0


def _layer(
    layer: TransformerEncoderLayerBase, x: Tensor, half: Tensor, rows: Rows, first_only: bool
) -> tuple[Tensor, Tensor]:
    """Post-norm encoder layer (tokens, width) -> (tokens, width), or (batch, width) of the first tokens alone.

    Args:
        x, half: the same, for sums and for products; see :func:`_residual_norm`.
    """
    attended = _attention(layer.self_attn, half, rows, first_only)
    residual = x.index_select(0, rows.first) if first_only else x
    dropped = layer.dropout_module
    x, half = _residual_norm(layer.self_attn.out_proj, attended, residual, layer.self_attn_layer_norm, dropped)
    hidden = layer.fc1(half)
    # fairseq's gelu goes through float32; torch's kernel computes in float32 whatever its type.
    hidden = F.gelu(hidden) if layer.activation_fn.__name__ == "gelu" else layer.activation_fn(hidden)
    hidden = _dropout(layer.activation_dropout_module, hidden)
    return _residual_norm(layer.fc2, hidden, x, layer.final_layer_norm, dropped)


def _residual_norm(
    linear: nn.Linear, inner: Tensor, residual: Tensor, norm: nn.LayerNorm, dropped: FairseqDropout
) -> tuple[Tensor, Tensor]:
    """``norm(residual + dropout(linear(inner)))`` twice: for sums, and in the type of products where that is cheap."""
    if has_triton() and inner.is_cuda and residual.dtype == torch.float32:
        from lightning_glue.model import fused_norm

        if fused_norm.supports(inner.dtype, residual.shape[-1]):
            product = F.linear(inner, linear.weight)
            return fused_norm.residual_norm(product, linear.bias, residual, norm, _rate(dropped))
    x = norm(residual + _dropout(dropped, linear(inner)))
    return x, x


def _attention(attention: MultiheadAttention, x: Tensor, rows: Rows, first_only: bool) -> Tensor:
    """Multi-head self-attention within each row, (tokens, width) -> (tokens or batch, width), before its projection."""
    projections = [attention.q_proj, attention.k_proj, attention.v_proj]
    if first_only:
        query = projections.pop(0)(x.index_select(0, rows.first))
    weight = torch.cat([projection.weight for projection in projections])
    bias = torch.cat([projection.bias for projection in projections])
    parts = F.linear(x, weight, bias)
    heads, width = attention.num_heads, x.shape[-1]
    p = attention.dropout_module.p if attention.dropout_module.training else 0.0
    if packed_attention.supports(parts, width // heads):
        if not first_only:
            return packed_attention.self_attention(parts, rows.bounds, heads, rows.longest, p)
        k, v = parts.chunk(2, -1)
        return packed_attention.attention(query, k, v, (rows.each, rows.bounds), (1, rows.longest), heads, p)
    batch, length = rows.real.shape
    padded = rows.pad(parts).view(batch, length, -1, heads, width // heads).permute(2, 0, 3, 1, 4).unbind(0)
    if first_only:
        k, v = (part[: len(query)] for part in padded)
        q, real = query.view(len(query), 1, heads, -1).transpose(1, 2), rows.real[: len(query)]
    else:
        (q, k, v), real = padded, rows.real
    attended = _attend(q, k, v, real[:, None, None, :], p).transpose(1, 2).reshape(len(q), -1, width)
    return attended.squeeze(1) if first_only else rows.pack(attended)


def _attend(q: Tensor, k: Tensor, v: Tensor, real: Tensor, p: float) -> Tensor:
    if q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=real, dropout_p=p)
    return attend(q, k, v, q.new_zeros(real.shape).masked_fill_(~real, float("-inf")), p)
