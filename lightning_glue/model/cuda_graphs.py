"""Forward and backward of a training step on a GPU, replayed from CUDA graphs.

A step of roberta.base at GLUE's batch sizes is some thousand kernels of a few microseconds each: launched one by one
they take longer than they run. A CUDA graph launches all of them at once, but always on the same shapes and addresses.
So a batch is padded to one of a few token counts with rows that nobody reads, and each count has its two graphs, made
when it first occurs. Weights of linear layers are cast once for a step, all in one go, and so are their gradients.

Dropout draws from torch's generator of the device, whose state every replay reads: masks are those that its seed gives.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lightning_glue.data.batching import Packed
from lightning_glue.model import packed_attention
from lightning_glue.model.roberta import RobertaModel, logits, positions
from lightning_glue.utils.logs import log
from lightning_glue.utils.redact import first_line

_LEAST_STEP = 128  # tokens
_STEPS = 16  # from a power of two to the next: of long batches a thirtieth is padding, in the mean
_LEAST_LENGTH = 32
_MOST = 96  # shapes with graphs of their own


@dataclass(frozen=True)
class Shape:
    """What the batches that share a graph have in common.

    Attributes:
        examples: of the batch.
        tokens: that it is padded to.
        longest: at least the tokens of its longest row, which decides between attention's kernels.
        spare: rows for what is left of the tokens.
    """

    examples: int
    tokens: int
    longest: int
    spare: int

    @classmethod
    def of(cls, batch: Packed, limit: int) -> Shape:
        """Args: limit: the model's positions."""
        tokens = len(batch["tokens"])
        step = max(_LEAST_STEP, (1 << (tokens.bit_length() - 1)) // _STEPS)
        longest = min(limit, max(_LEAST_LENGTH, 1 << (batch["longest"] - 1).bit_length()))
        return cls(len(batch["lengths"]), tokens + -tokens % step, longest, -(-(step - 1) // longest))

    def pad(self, tokens: Tensor) -> Tensor:
        """Tokens (tokens,), and some more behind them."""
        return nn.functional.pad(tokens, (0, self.tokens - len(tokens)))


def supports(model: RobertaModel, dtype: torch.dtype) -> bool:
    """Whether the model is on a GPU, and attends to packed tokens in this type of product."""
    if not model.runs_unpadded:
        return False
    encoder = model.encoder.sentence_encoder
    attention = encoder.layers[0].self_attn
    like = torch.empty(0, dtype=dtype, device=encoder.embed_tokens.weight.device)
    return packed_attention.supports(like, attention.head_dim)


class _Outputs(nn.Module):
    """Head outputs of padded-up batches, as a module whose parameters can be exchanged."""

    def __init__(self, model: RobertaModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, shape: Shape, tokens: Tensor, lengths: Tensor) -> Tensor:
        """(examples, classes) of tokens (padded count,) int64 and lengths (examples,) int64."""
        left = shape.tokens - lengths.sum() - shape.longest * torch.arange(shape.spare, device=lengths.device)
        lengths = torch.cat([lengths, left.clamp(0, shape.longest)])
        return logits(self.model, Packed(tokens=tokens, lengths=lengths, longest=shape.longest), read=shape.examples)


@dataclass
class _Captured:
    """Graphs of one shape. Attributes: all tensors are what every replay reads and writes."""

    tokens: Tensor
    lengths: Tensor
    outputs: Tensor
    gradient: Tensor  # of the outputs
    forward: torch.cuda.CUDAGraph
    backward: torch.cuda.CUDAGraph


class GraphedTraining:
    """Head outputs of a model in training, differentiable with respect to its parameters.

    Gradients are in the same memory after every backward: a step uses them before the next one, as optimizers do, and
    micro-batches that follow within a step are added up elsewhere.

    Args:
        model: one that :func:`supports` says yes to. It stays where it is; its parameters may change in place.
        dtype: of the products, as under autocast.
    """

    def __init__(self, model: RobertaModel, dtype: torch.dtype) -> None:
        self.dtype, self._outputs, self._limit = dtype, _Outputs(model), positions(model)
        linear = {id(p) for m in model.modules() if isinstance(m, nn.Linear) for p in m.parameters(recurse=False)}
        named = {name: p for name, p in self._outputs.named_parameters() if p.requires_grad}
        self.parameters = list(named.values())
        self.gradients = [torch.zeros_like(p) for p in self.parameters]
        leaves = {name: p.detach().to(dtype) if id(p) in linear else p.detach() for name, p in named.items()}
        self._leaves = {name: leaf.requires_grad_() for name, leaf in leaves.items()}
        self._casts = [(leaf, named[name]) for name, leaf in leaves.items() if leaf.dtype != named[name].dtype]
        self._captured: dict[Shape, _Captured] = {}
        self._most = _MOST
        self.pool = torch.cuda.graph_pool_handle()

    def shape(self, batch: Packed) -> Shape:
        """Of the graphs that take the batch."""
        return Shape.of(batch, self._limit)

    def __call__(self, batch: Packed) -> Tensor:
        """(examples, classes)."""
        shape = self.shape(batch)
        captured = self._captured.get(shape) or self._make(shape, batch)
        if captured is None:
            return self._uncaptured(shape, batch)
        tokens = captured.tokens[: len(batch["tokens"])]  # those behind them are of a batch before
        tokens.copy_(batch["tokens"], non_blocking=True)
        captured.lengths.copy_(batch["lengths"], non_blocking=True)
        outputs: Tensor = _Replay.apply(self, captured, *self.parameters)
        return outputs

    def _make(self, shape: Shape, batch: Packed) -> _Captured | None:
        """The graphs of a shape, or None where there are enough; for good, once some could not be made."""
        if len(self._captured) >= self._most:
            return None
        self._keep_sums()  # making graphs writes to the gradients
        try:
            self._captured[shape] = self._capture(shape, batch)
        except RuntimeError as error:
            log.warning("steps are not replayed from CUDA graphs, which takes longer: %s", first_line(error, 160))
            self._captured.clear()
            self._most = 0
        return self._captured.get(shape)

    def _uncaptured(self, shape: Shape, batch: Packed) -> Tensor:
        """The same, kernel by kernel."""
        with torch.autocast(batch["tokens"].device.type, self.dtype):
            outputs: Tensor = self._outputs(shape, shape.pad(batch["tokens"]), batch["lengths"])
        return outputs

    def forward(self, shape: Shape, tokens: Tensor, lengths: Tensor) -> Tensor:
        """What the first graph holds: weights cast, and outputs (examples, classes) of them."""
        with torch.no_grad():
            torch._foreach_copy_([leaf for leaf, _ in self._casts], [weight for _, weight in self._casts])
        with torch.autocast(tokens.device.type, self.dtype, cache_enabled=False):
            outputs: Tensor = functional_call(self._outputs, self._leaves, (shape, tokens, lengths))
        return outputs

    def backward(self, outputs: Tensor, gradient: Tensor) -> None:
        """What the second one holds: ``gradients`` of :meth:`forward`'s outputs."""
        found = torch.autograd.grad(outputs, list(self._leaves.values()), gradient)
        with torch.no_grad():
            torch._foreach_copy_(self.gradients, list(found))

    def _capture(self, shape: Shape, batch: Packed) -> _Captured:
        tokens, lengths = shape.pad(batch["tokens"]), batch["lengths"].clone()
        with _aside(tokens.device), torch.enable_grad():
            outputs = self.forward(shape, tokens, lengths)
            gradient = torch.zeros_like(outputs)
            self.backward(outputs, gradient)  # libraries set themselves up
            del outputs
        return self._record(shape, tokens, lengths, gradient)

    def _record(self, shape: Shape, tokens: Tensor, lengths: Tensor, gradient: Tensor) -> _Captured:
        forward, backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        options: dict[str, Any] = {"pool": self.pool, "capture_error_mode": "thread_local"}
        with torch.enable_grad():
            with torch.cuda.graph(forward, **options):
                outputs = self.forward(shape, tokens, lengths)
            with torch.cuda.graph(backward, **options):
                self.backward(outputs, gradient)
        return _Captured(tokens, lengths, outputs.detach(), gradient, forward, backward)

    def replay_backward(self, captured: _Captured, gradient: Tensor) -> list[Tensor]:
        """The parameters' gradients, in memory that the next call writes to again."""
        self._keep_sums()
        captured.gradient.copy_(gradient)
        captured.backward.replay()
        return self.gradients

    def _keep_sums(self) -> None:
        """Move the gradients of a micro-batch before to where those of the next one do not overwrite them."""
        first = self.parameters[0].grad
        if first is None or first.data_ptr() != self.gradients[0].data_ptr():
            return  # there is none, it is a sum already, or it went where DDP averages
        sums = [torch.empty_like(gradient) for gradient in self.gradients]
        torch._foreach_copy_(sums, self.gradients)
        for parameter, kept in zip(self.parameters, sums):
            parameter.grad = kept


@contextmanager
def _aside(device: torch.device) -> Iterator[None]:
    """What is done within leaves the device's random numbers as they were, and runs beside its current stream."""
    state = torch.cuda.get_rng_state(device)
    current, aside = torch.cuda.current_stream(device), torch.cuda.Stream(device)
    aside.wait_stream(current)
    try:
        with torch.cuda.stream(aside):
            yield
    finally:
        current.wait_stream(aside)
        torch.cuda.set_rng_state(state, device)


class _Replay(torch.autograd.Function):
    """Of the parameters, so that their gradients take the usual way: into ``grad``, and through DDP."""

    @staticmethod
    def forward(ctx: Any, graphs: GraphedTraining, captured: _Captured, *parameters: Tensor) -> Tensor:
        ctx.graphs, ctx.captured = graphs, captured
        captured.forward.replay()
        return captured.outputs.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        found = ctx.graphs.replay_backward(ctx.captured, *gradients)
        return None, None, *[gradient.detach() for gradient in found]  # a view, which autograd takes as it is
