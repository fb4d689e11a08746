"""A fine-tuned model behind MLflow's pyfunc: rows of text in, label and probabilities (or a score) out.

MLflow imports it, by the name ``lightning_glue.serving``, for a model that :mod:`lightning_glue.tracking.registry`
describes, and calls :func:`_load_pyfunc`. The weights are those of the exported directory; nothing is unpickled.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lightning_glue.errors import DataError
from lightning_glue.inference.finetuned import load_fine_tuned
from lightning_glue.inference.text_model import Model, check_texts
from lightning_glue.tasks import Task, input_columns
from lightning_glue.utils.console import no_bars


class TextModel:
    """Predicts for the columns ``text`` and, for tasks on pairs, ``text_pair``, in float32.

    Texts are cut to the length that the model's run cut them to.
    """

    def __init__(self, folder: str) -> None:
        self.model = Model(load_fine_tuned(Path(folder)))

    def predict(self, frame: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """``label`` and ``probability_<label>`` of every row, or ``score`` on the task's scale for regression.

        Where an example has any number of labels, ``labels`` is a list of those above 0.5.
        """
        task = self.model.task
        columns = [_texts(frame, name, task) for name in input_columns(task)]
        with no_bars():  # a server's log has no use for one with each request
            answer = self.model.answer(columns)
        if task.is_regression:
            return pd.DataFrame({"score": answer.scores}, index=frame.index)
        shares = {f"probability_{label}": answer.probabilities[:, i] for i, label in enumerate(task.labels)}
        if task.multilabel:
            labels = pd.Series([list(names) for names in answer.labels], index=frame.index, dtype=object)
            return pd.DataFrame({"labels": labels, **shares}, index=frame.index)
        return pd.DataFrame({"label": np.array(answer.labels, dtype=object), **shares}, index=frame.index)


def _texts(frame: pd.DataFrame, name: str, task: Task) -> list[str]:
    """A column's texts.

    Raises:
        DataError: the column or a text in it is missing, or is no text.
    """
    if name not in frame:
        raise DataError(f"{task.name}: no column {name!r}; expected {', '.join(input_columns(task))}")
    rows = list(frame.index)
    check_texts(task, frame[name], lambda i: f"column {name!r}, row {rows[i]!r}", "leave the row out")
    return list(frame[name])


def _load_pyfunc(path: str) -> TextModel:
    return TextModel(str(Path(path)))
