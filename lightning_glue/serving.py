"""A fine-tuned model behind MLflow's pyfunc: rows of text in, label and probabilities (or a score) out.

MLflow imports this module for a model that :mod:`lightning_glue.registry` describes and calls :func:`_load_pyfunc`. The
weights are those of the exported fairseq directory; nothing is unpickled.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from lightning_glue.checkpoint import load_fine_tuned
from lightning_glue.data import TokenizedSplit, join_parts
from lightning_glue.errors import UserError
from lightning_glue.predict import predict
from lightning_glue.tasks import Task

TEXTS = ("text", "text_pair")
_EVAL_TOKENS, _MAX_TOKENS = 2048, 512


def input_columns(task: Task) -> tuple[str, ...]:
    return TEXTS[: task.num_texts]


class TextModel:
    """Predicts for the columns ``text`` and, for tasks on pairs, ``text_pair``."""

    def __init__(self, folder: str) -> None:
        self.fine_tuned = load_fine_tuned(folder, None)

    def predict(self, frame: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """``label`` and ``probability_<label>`` of every row, or ``score`` on the task's scale for regression."""
        task = self.fine_tuned.task
        missing = [name for name in input_columns(task) if name not in frame]
        if missing:
            raise UserError(f"{task.name}: no column {missing[0]!r}; expected {', '.join(input_columns(task))}")
        encode = self.fine_tuned.tokenizer.encode
        parts = [encode([text.strip() for text in frame[name]]) for name in input_columns(task)]
        tokens, lengths, _ = join_parts(parts, _MAX_TOKENS)
        outputs = predict(self.fine_tuned.model, TokenizedSplit("rows", tokens, lengths, None), _EVAL_TOKENS)
        if task.is_regression:
            scores = (outputs.squeeze(-1).double() * task.label_scale).clamp(0, task.label_scale)
            return pd.DataFrame({"score": scores.numpy()}, index=frame.index)
        shares = outputs.double().softmax(-1).numpy()
        columns = {f"probability_{label}": shares[:, i] for i, label in enumerate(task.labels)}
        return pd.DataFrame({"label": [task.labels[i] for i in shares.argmax(-1)], **columns}, index=frame.index)


def _load_pyfunc(path: str) -> TextModel:
    return TextModel(str(Path(path)))
