"""A fine-tuned model as ONNX: a plain padded RoBERTa with the same weights, for any runtime.

Inputs are ``input_ids`` and ``attention_mask`` (batch, length) int64 as transformers and optimum name them, the output
is ``logits`` (batch, classes); batch and length are free. fairseq's own modules and the forward on real tokens only do
not trace, so :class:`Plain` computes the same from the weights as transformers names them.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_glue.data import huggingface_tokenizer
from lightning_glue.data.tokenizer import PAD, Tokenizer
from lightning_glue.errors import UserError
from lightning_glue.export import huggingface as folder
from lightning_glue.export.fairseq import model_args
from lightning_glue.model import huggingface
from lightning_glue.model.roberta import RobertaModel, token_limit
from lightning_glue.tasks import Task
from lightning_glue.utils.console import command
from lightning_glue.utils.files import new_file

MODEL, INT8 = "model.onnx", "model_quantized.onnx"
_MODULES = ("onnx", "onnxscript", "onnxruntime")
_OPSET = 18
_ONE_FILE = 1_900_000_000  # bytes of weights: a file of protobuf holds less than 2 GiB


def check_installed() -> None:
    """Raise UserError where the extra ``onnx`` is not installed, without importing it."""
    if missing := [name for name in _MODULES if importlib.util.find_spec(name) is None]:
        install = command("python", "-m", "pip", "install", "lightning-glue[onnx]")
        raise UserError(f"writing ONNX needs {', '.join(missing)}, which is not installed; run {install}")


class Plain(nn.Module):
    """RoBERTa with a classification head, of padded rows; the weights are transformers' by name."""

    def __init__(self, weights: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
        super().__init__()
        epsilon, heads = config["layer_norm_eps"], config["num_attention_heads"]
        top = "roberta.embeddings."
        self.words = nn.Embedding.from_pretrained(weights[f"{top}word_embeddings.weight"])
        self.positions = nn.Embedding.from_pretrained(weights[f"{top}position_embeddings.weight"])
        self.norm = _norm(weights, f"{top}LayerNorm", epsilon)
        self.layers = nn.ModuleList(
            Layer(weights, f"roberta.encoder.layer.{i}.", heads, epsilon) for i in range(config["num_hidden_layers"])
        )
        self.dense, self.out = _linear(weights, "classifier.dense"), _linear(weights, "classifier.out_proj")

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits (batch, classes). The head reads the first token alone, so the last layer has no other query."""
        places = attention_mask.cumsum(1) * attention_mask + PAD
        x = self.norm(self.words(input_ids) + self.positions(places))
        real = attention_mask[:, None, None, :] > 0
        *layers, last = self.layers
        for layer in layers:
            x = layer(x, x, real)
        x = last(x[:, :1], x, real)
        return self.out(torch.tanh(self.dense(x[:, 0])))


class Layer(nn.Module):
    """A post-norm encoder layer."""

    def __init__(self, weights: Mapping[str, Tensor], prefix: str, heads: int, epsilon: float) -> None:
        super().__init__()
        self.heads = heads
        parts = ("query", "key", "value")
        self.query, self.key, self.value = (_linear(weights, f"{prefix}attention.self.{part}") for part in parts)
        self.mixed = _linear(weights, f"{prefix}attention.output.dense")
        self.first_norm = _norm(weights, f"{prefix}attention.output.LayerNorm", epsilon)
        self.inner, self.outer = (_linear(weights, f"{prefix}{part}.dense") for part in ("intermediate", "output"))
        self.last_norm = _norm(weights, f"{prefix}output.LayerNorm", epsilon)

    def _split(self, x: Tensor) -> Tensor:
        """(batch, length, width) to (batch, heads, length, width / heads)."""
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)

    def forward(self, asking: Tensor, x: Tensor, real: Tensor) -> Tensor:
        """The layer's output at ``asking`` (batch, queries, width), which attends to the real tokens of ``x``."""
        q, k, v = self._split(self.query(asking)), self._split(self.key(x)), self._split(self.value(x))
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=real)
        hidden = self.first_norm(asking + self.mixed(attended.transpose(1, 2).flatten(2)))
        return self.last_norm(hidden + self.outer(F.gelu(self.inner(hidden))))


def _linear(weights: Mapping[str, Tensor], name: str) -> nn.Linear:
    weight = weights[f"{name}.weight"]
    linear = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    linear.weight, linear.bias = nn.Parameter(weight), nn.Parameter(weights[f"{name}.bias"])
    return linear


def _norm(weights: Mapping[str, Tensor], name: str, epsilon: float) -> nn.LayerNorm:
    norm = nn.LayerNorm(weights[f"{name}.weight"].shape, eps=epsilon, device="meta")
    norm.weight, norm.bias = nn.Parameter(weights[f"{name}.weight"]), nn.Parameter(weights[f"{name}.bias"])
    return norm


def plain(model: RobertaModel, tokens: int) -> Plain:
    """``model`` as :class:`Plain`, in float32.

    Args:
        tokens: rows of the token embeddings, see :func:`lightning_glue.model.huggingface.to_huggingface`.

    Raises:
        CheckpointError: its architecture is another one.
    """
    folder.check(model)
    args, state = model_args(model), model.state_dict()
    weights = huggingface.to_huggingface(state, args["encoder_layers"], tokens)
    config = huggingface.make_config(args, state, tokens)
    return Plain({name: tensor.float() for name, tensor in weights.items()}, config).eval()


def export(
    model: RobertaModel, task: Task, tokenizer: Tokenizer, out: Path, settings: Mapping[str, Any], *, int8: bool
) -> None:
    """Write ``model.onnx``, with ``int8`` ``model_quantized.onnx`` as well, and the tokenizer into ``out``."""
    names = huggingface_tokenizer.token_names(tokenizer)
    traced = plain(model, len(names))
    example = (torch.full((2, 5), 4), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]))
    free = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length", max=len(traced.positions.weight) - PAD - 1)}
    size = sum(parameter.numel() * 4 for parameter in traced.parameters())
    with _quietly(), torch.no_grad():
        torch.onnx.export(
            traced,
            example,
            out / MODEL,
            input_names=["input_ids", "attention_mask"],
            output_names=["logits"],
            dynamic_shapes=(free, free),
            opset_version=_OPSET,
            dynamo=True,
            external_data=size > _ONE_FILE,
            verbose=False,
        )
        if int8:
            from onnxruntime.quantization import QuantType, quantize_dynamic

            quantize_dynamic(out / MODEL, out / INT8, weight_type=QuantType.QInt8)
    config = huggingface.make_config(model_args(model), model.state_dict(), len(names))
    with new_file(out / "config.json") as file:
        whole = config | folder.task_config(task, settings) | {"dtype": "float32"}
        file.write(json.dumps(whole, indent=2, ensure_ascii=False) + "\n")
    huggingface_tokenizer.write(tokenizer, out, token_limit(model, settings.get("data.max_tokens", 512)))


@contextmanager
def _quietly() -> Iterator[None]:
    """Within, the exporter and the quantizer say nothing: what they advise is for who writes the model."""
    was = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(was)
