"""A fine-tuned model behind MLflow's pyfunc: rows of text in, label and probabilities (or a score) out.

MLflow imports it, by the name ``lightning_glue.serving``, for a model that :mod:`lightning_glue.tracking.registry`
describes, and calls :func:`_load_pyfunc`. The weights are those of the exported directory; nothing is unpickled.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from lightning_glue.data.datamodule import TokenizedSplit, join_parts
from lightning_glue.errors import UserError
from lightning_glue.inference.finetuned import load_fine_tuned
from lightning_glue.inference.predict import predict
from lightning_glue.model.roberta import MAX_TOKENS, token_limit
from lightning_glue.tasks import Task, input_columns

_EVAL_TOKENS = 2048  # in a batch, padding included: what a CPU's caches hold


class TextModel:
    """Predicts for the columns ``text`` and, for tasks on pairs, ``text_pair``, in float32.

    Texts are cut to the length that the model's run cut them to.
    """

    def __init__(self, folder: str) -> None:
        self.fine_tuned = load_fine_tuned(Path(folder))
        asked = self.fine_tuned.settings.get("data.max_tokens", MAX_TOKENS)
        self.max_tokens = token_limit(self.fine_tuned.model, asked)

    def predict(self, frame: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """``label`` and ``probability_<label>`` of every row, or ``score`` on the task's scale for regression."""
        task = self.fine_tuned.task
        encode = self.fine_tuned.tokenizer.encode
        parts = [encode(_texts(frame, name, task)) for name in input_columns(task)]
        if not len(frame):
            outputs = torch.empty(0, task.num_outputs)
        else:
            tokens, lengths, _ = join_parts(parts, self.max_tokens)
            outputs = predict(self.fine_tuned.model, TokenizedSplit("rows", tokens, lengths, None), _EVAL_TOKENS)
        if task.is_regression:
            scores = (outputs.squeeze(-1).double() * task.label_scale).clamp(0, task.label_scale)
            return pd.DataFrame({"score": scores.numpy()}, index=frame.index)
        shares = outputs.double().softmax(-1).numpy()
        labels = np.array(task.labels, dtype=object)[shares.argmax(-1)]
        columns = {f"probability_{label}": shares[:, i] for i, label in enumerate(task.labels)}
        return pd.DataFrame({"label": labels, **columns}, index=frame.index)


def _texts(frame: pd.DataFrame, name: str, task: Task) -> list[str]:
    """A column's texts.

    Raises:
        UserError: the column or a text in it is missing, or is no text.
    """
    if name not in frame:
        raise UserError(f"{task.name}: no column {name!r}; expected {', '.join(input_columns(task))}")
    for row, text in zip(frame.index, frame[name]):
        if not isinstance(text, str):
            found = f"column {name!r}, row {row!r} holds {text!r}"
            raise UserError(f"{task.name}: {found}, expected a text; fill it in or leave the row out")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise UserError(f"{task.name}: column {name!r}, row {row!r} holds half a character: {text!r}") from None
    return [text.strip() for text in frame[name]]


def _load_pyfunc(path: str) -> TextModel:
    return TextModel(str(Path(path)))
