"""The forward of a model that is not trained meanwhile, on a CPU: it takes less time, and in float32 the answer to a
row does not depend, to the last bit, on the rows beside it.

Weights are put into oneDNN's own layout once, and cast once where products are in bf16; the rest is computed in float32
as under autocast. In that layout oneDNN sums a row of a product in the same order however many rows there are; plain
``torch.nn.functional.linear`` does not. Attention sees rows of one padded length at a time, which the row alone
decides: torch's kernel cuts its blocks by that length.

So rows may be computed in any company, and each core computes some of its own: cores that share each product wait for
the slowest of them a thousand times a second.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from threading import Barrier
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_glue.data.batching import Packed, split_rows
from lightning_glue.model.cpu_attention import attend
from lightning_glue.utils.processor import cpu_has_bf16

if TYPE_CHECKING:
    from fairseq.models.roberta import RobertaModel
    from fairseq.models.transformer.transformer_encoder import TransformerEncoderBase
    from fairseq.modules.transformer_layer import TransformerEncoderLayerBase

_TOKEN_STEP = 32  # products have few shapes, for each of which oneDNN makes a kernel and keeps it
_LENGTH_STEP, _LEAST_LENGTH = 8, 16  # shorter rows and other lengths take kernels that look at the number of rows
_QUERIES = 2  # of the last layer: one alone takes a kernel that looks at the number of rows
_ROWS = 2  # at least, of a product: of one alone, 1536 numbers and more are summed in another order
_ROWS_PACKED_FOR = 2048  # a hint; the layout does not depend on it
_LEAST_TOKENS, _MOST_TOKENS = 256, 2048  # that a core is given; what its caches hold


@dataclass(frozen=True)
class _Linear:
    """A linear layer in oneDNN's layout. Attributes: after: "none" or "gelu", computed where the product is."""

    weight: Tensor
    bias: Tensor
    after: str = "none"

    @classmethod
    def of(cls, dtype: torch.dtype, *layers: nn.Linear, after: str = "none") -> _Linear:
        """Of one layer, or of several that read the same input, their outputs one after the other."""
        weight = torch.cat([layer.weight.detach().to(dtype) for layer in layers])
        bias = torch.cat([layer.bias.detach().to(dtype) for layer in layers])
        return cls(torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS_PACKED_FOR), bias, after)

    def __call__(self, x: Tensor) -> Tensor:
        algorithm = "none" if self.after == "gelu" else ""  # the exact one, of erf
        rows = x.to(self.bias.dtype).expand(max(len(x), _ROWS), -1)
        found: Tensor = torch.ops.mkldnn._linear_pointwise(rows, self.weight, self.bias, self.after, [], algorithm)
        return found[: len(x)]


@dataclass(frozen=True)
class _Group:
    """Neighbouring rows of one padded length.

    Attributes:
        tokens, rows: where they stand in the batch.
        shape: (rows, padded length)
        padded: (rows * length,) index of each among the tokens; at padding that of the row's first token, whose weight
            is exactly 0: finite, and cheaper than zeros to copy into.
        real: (rows * length,) index of each token among the padded ones.
        mask: (rows, 1, 1, length) 0, and -inf at padding.
    """

    tokens: slice
    rows: slice
    shape: tuple[int, int]
    padded: Tensor
    real: Tensor
    mask: Tensor


class _Layer:
    """A post-norm encoder layer.

    Args:
        last: of which the first token of each row is all that is wanted.
    """

    def __init__(self, layer: TransformerEncoderLayerBase, last: bool, dtype: torch.dtype) -> None:
        attention = layer.self_attn
        self.heads: int = attention.num_heads
        self.query = _Linear.of(dtype, attention.q_proj) if last else None
        parts = [*([] if last else [attention.q_proj]), attention.k_proj, attention.v_proj]
        self.projections = _Linear.of(dtype, *parts)
        self.out = _Linear.of(dtype, attention.out_proj)
        fused = layer.activation_fn.__name__ == "gelu"
        self.fc1 = _Linear.of(dtype, layer.fc1, after="gelu" if fused else "none")
        self.activation: Callable[[Tensor], Tensor] | None = None if fused else layer.activation_fn
        self.fc2 = _Linear.of(dtype, layer.fc2)
        self.norms: tuple[nn.Module, nn.Module] = layer.self_attn_layer_norm, layer.final_layer_norm

    def __call__(self, x: Tensor, groups: list[_Group], first: Tensor) -> Tensor:
        """(tokens, width) -> (tokens, width), or (rows, width) of the ``first`` token of each row."""
        parts = self.projections(x)
        if self.query is None:
            found = [self._attend(parts[group.tokens], group) for group in groups]
            attended = F.pad(torch.cat(found), (0, 0, 0, len(x) - groups[-1].tokens.stop))
        else:
            queries = self.query(x.index_select(0, (first[:, None] + torch.arange(_QUERIES)).flatten()))
            queries = queries.view(len(first), _QUERIES, self.heads, -1).transpose(1, 2)
            found = [self._attend(parts[group.tokens], group, queries[group.rows]) for group in groups]
            x, attended = x.index_select(0, first), torch.cat(found)
        x = self.norms[0](x + self.out(attended))
        hidden = self.fc1(x)
        return self.norms[1](x + self.fc2(self.activation(hidden) if self.activation else hidden))

    def _attend(self, parts: Tensor, group: _Group, queries: Tensor | None = None) -> Tensor:
        """Projections (tokens, 2 or 3 widths) -> (tokens, width); with ``queries`` (rows, heads, some, width / heads)
        (rows, width) of the first of them."""
        padded = parts.index_select(0, group.padded).view(*group.shape, 3 if queries is None else 2, self.heads, -1)
        *q, k, v = padded.permute(2, 0, 3, 1, 4).unbind(0)
        mask = group.mask.to(k.dtype)
        found = attend(q[0] if queries is None else queries, k, v, mask)
        if queries is not None:
            return found[:, :, 0].flatten(1)
        return found.transpose(1, 2).reshape(len(group.padded), -1).index_select(0, group.real)


def supports(model: RobertaModel, dtype: torch.dtype) -> bool:
    """Whether it is a model that :mod:`~lightning_glue.model.unpadded` knows, on a CPU in float32, torch has oneDNN and
    this processor products of ``dtype``."""
    weight = model.encoder.sentence_encoder.embed_tokens.weight
    here = weight.device.type == "cpu" and weight.dtype == torch.float32
    has = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    multiplies = dtype == torch.float32 or (dtype == torch.bfloat16 and cpu_has_bf16())
    return here and has and multiplies and bool(model.runs_unpadded)


class Frozen:
    """Head outputs of a model as it is now; what is done to its weights later is not seen.

    Args:
        model: one that :func:`supports` says yes to.
        head: its classification head.
        dtype: of the products.
    """

    def __init__(self, model: RobertaModel, head: Any, dtype: torch.dtype) -> None:
        self._encoder: TransformerEncoderBase = model.encoder.sentence_encoder
        layers = self._encoder.layers
        self._layers = [_Layer(layer, i == len(layers) - 1, dtype) for i, layer in enumerate(layers)]
        self._dense, self._out = _Linear.of(dtype, head.dense), _Linear.of(dtype, head.out_proj)
        self._activation: Callable[[Tensor], Tensor] = head.activation_fn
        self._threads = torch.get_num_threads()

    def __call__(self, batch: Packed) -> Tensor:
        """(rows, classes) in the order of the batch, which is sorted by length."""
        parts = self._parts(batch)
        if len(parts) > 1:
            return torch.cat([*self._cores.map(self._outputs, parts)])
        torch.set_num_threads(self._threads)  # a thread begins with what was set last anywhere
        return self._outputs(batch)

    def _parts(self, batch: Packed) -> list[Packed]:
        """As many for each core, where tokens are enough for all."""
        tokens = len(batch["tokens"])
        each = -(-tokens // (_MOST_TOKENS * self._threads))
        return split_rows(batch, max(1, min(each * self._threads, tokens // _LEAST_TOKENS)))

    @cached_property
    def _cores(self) -> ThreadPoolExecutor:
        """Threads that compute by themselves."""
        pool, begun = ThreadPoolExecutor(self._threads, "frozen"), Barrier(self._threads)

        def begin(_: int) -> None:
            torch.set_num_threads(1)
            begun.wait()  # so that each task has a thread of its own

        list(pool.map(begin, range(self._threads)))
        torch.set_num_threads(self._threads)
        return pool

    @torch.inference_mode()
    def _outputs(self, batch: Packed) -> Tensor:
        lengths, count = batch["lengths"], len(batch["tokens"])
        groups, columns = _groups(lengths)
        x = self._embed(F.pad(batch["tokens"], (0, -count % _TOKEN_STEP)), F.pad(columns, (0, -count % _TOKEN_STEP)))
        first = lengths.cumsum(0) - lengths
        for layer in self._layers:
            x = layer(x, groups, first)
        return self._out(self._activation(self._dense(x)))

    def _embed(self, tokens: Tensor, columns: Tensor) -> Tensor:
        encoder = self._encoder
        positions = columns + encoder.padding_idx + 1
        x = encoder.embed_scale * F.embedding(tokens, encoder.embed_tokens.weight)
        x = x + F.embedding(positions, encoder.embed_positions.weight)
        return x if encoder.layernorm_embedding is None else encoder.layernorm_embedding(x)


def padded_length(length: int) -> int:
    """Tokens that attention pads a row to."""
    return max(_LEAST_LENGTH, length + -length % _LENGTH_STEP)


def _groups(lengths: Tensor) -> tuple[list[_Group], Tensor]:
    """Runs of rows of one padded length, and the index of each token in its row."""
    found: list[_Group] = []
    columns: list[Tensor] = []
    sizes = lengths.tolist()
    begin = tokens = 0
    while begin < len(sizes):
        longest = padded_length(sizes[begin])
        end = begin + 1
        while end < len(sizes) and padded_length(sizes[end]) == longest:
            end += 1
        count = sum(sizes[begin:end])
        group, column = _group(lengths[begin:end], longest, slice(tokens, tokens + count), slice(begin, end))
        found.append(group)
        columns.append(column)
        begin, tokens = end, tokens + count
    return found, torch.cat(columns)


def _group(lengths: Tensor, longest: int, tokens: slice, rows: slice) -> tuple[_Group, Tensor]:
    """A group, and the index of each token in its row."""
    column = torch.arange(longest)
    real = column < lengths[:, None]
    padded = (lengths.cumsum(0) - lengths)[:, None] + column * real
    mask = torch.zeros(real.shape).masked_fill_(~real, float("-inf"))[:, None, None, :]
    places = real.flatten().nonzero().squeeze(-1)
    return _Group(tokens, rows, (len(lengths), longest), padded.flatten(), places, mask), places % longest
