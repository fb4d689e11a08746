"""A fine-tuned model at its fastest on this machine: encoding apart from computing, real tokens in batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from lightning_glue.data.batching import EvalSampler, evaluation_tokens, moved
from lightning_glue.data.datamodule import TokenizedSplit, join_parts
from lightning_glue.inference.predict import autocast, scoring
from lightning_glue.inference.text_model import Model
from lightning_glue.model.frozen import Frozen
from lightning_glue.utils.processor import cpu_has_bf16

PRECISIONS = ("auto", "32-true", "bf16-mixed", "16-mixed")


def resolve_precision(asked: str, trained: str | None, device: torch.device) -> str:
    """``auto`` is what the run computed with, where this processor does it natively; else 32-true."""
    if asked != "auto":
        return asked
    if trained == "64-true":
        return trained
    if not (trained or "").endswith("-mixed"):
        return "32-true"
    native = torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda" else cpu_has_bf16()
    if native or (trained == "16-mixed" and device.type == "cuda"):
        return str(trained)
    return "32-true"


class Scorer:
    """Head outputs of texts.

    On a CPU in float32 they are the same, to the last bit, whatever other texts are computed with them
    (:mod:`lightning_glue.model.frozen`).

    Attributes:
        precision: Lightning's name of it, in force.
    """

    def __init__(self, model: Model, precision: str = "auto") -> None:
        self.model = model
        trained = model.fine_tuned.settings.get("trainer.precision")
        self.precision = resolve_precision(precision, trained, model.device)
        network = model.fine_tuned.model.eval()
        if self.precision == "64-true":
            network.double()
        self._forward = scoring(network, self.precision)
        self.frozen = isinstance(self._forward, Frozen)

    def encode(self, columns: Sequence[Sequence[str]]) -> TokenizedSplit:
        """Texts, one or two columns of the same length, as tokens; the tokenizer's threads need no GIL."""
        tokenizer = self.model.fine_tuned.tokenizer
        parts = [tokenizer.encode([text.strip() for text in column]) for column in columns]
        tokens, lengths, truncated = join_parts(parts, self.model.max_tokens)
        return TokenizedSplit("rows", tokens, lengths, None, truncated)

    @torch.inference_mode()
    def outputs(self, rows: TokenizedSplit, advance: Callable[[int], None] = lambda count: None) -> np.ndarray:
        """(rows, classes) float32, in their order; computed in batches of similar length.

        Args:
            advance: called with the number of rows behind each batch.
        """
        found = torch.empty(len(rows), self.model.task.num_outputs)
        with autocast(self.precision, self.model.device):
            for batch in EvalSampler(rows.lengths, evaluation_tokens(self.model.device.type)) if len(rows) else ():
                part = rows[batch]
                found[part["rows"]] = self._forward(moved(part, self.model.device)).float().cpu()
                advance(len(part["rows"]))
        return found.numpy()
