"""A fine-tuned model that takes texts and gives labels and probabilities, or scores."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch

from lightning_glue.data.batching import evaluation_tokens
from lightning_glue.data.datamodule import TokenizedSplit, join_parts
from lightning_glue.errors import CheckpointError, DataError
from lightning_glue.inference.finetuned import FineTuned
from lightning_glue.inference.predict import on_scale, predict, present_labels
from lightning_glue.model.roberta import MAX_TOKENS, token_limit
from lightning_glue.tasks import Task


@dataclass(frozen=True)
class Predictions:
    """What a model says of n examples, in their order.

    Attributes:
        labels: (n,) the most probable class of each, a name of ``classes``; where an example has any number of labels
            a tuple of those above 0.5; empty for regression.
        probabilities: (n, classes) float64, each row sums to 1; of any number of labels each is from 0 to 1 by itself;
            (n, 0) for regression.
        scores: (n,) float64 on the task's own scale (STS-B: 0 to 5); empty for classification.
        classes: names of the columns of ``probabilities``; empty for regression.
    """

    labels: list[str] | list[tuple[str, ...]]
    probabilities: np.ndarray = field(repr=False)
    scores: np.ndarray
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return max(len(self.labels), len(self.scores))


class Model:
    """A fine-tuned model, in float32 on ``device``; texts are cut to the length that its run cut them to.

    Attributes:
        task: what it was trained on; ``task.labels`` are the classes.
        max_tokens: the longest example in tokens, special ones included.
        temperature: what the outputs of a classification are divided by before they become probabilities.

    Args:
        calibrated: take the temperature that was fitted on the run's dev set; else it is 1.
    """

    def __init__(self, fine_tuned: FineTuned, device: str = "cpu", *, calibrated: bool = False) -> None:
        self.fine_tuned, self.device = fine_tuned, torch.device(device)
        self.task: Task = fine_tuned.task
        asked = fine_tuned.settings.get("data.max_tokens", MAX_TOKENS)
        self.max_tokens = token_limit(fine_tuned.model, asked)
        fine_tuned.model.to(self.device)
        self.temperature = _temperature(fine_tuned) if calibrated else 1.0

    def __repr__(self) -> str:
        return f"<Model of {self.task.name}: {self.fine_tuned.path} on {self.device}>"

    def predict(self, texts: str | Iterable[str], pairs: str | Iterable[str] | None = None) -> Predictions:
        """Labels and probabilities of texts, or scores where the task is a regression.

        Texts may be of any length and number: they are stripped, cut to ``max_tokens``, and predicted in batches of
        similar length. One string is one example.

        Args:
            texts: (n,) first or only text of each example.
            pairs: (n,) second text, for tasks on pairs (RTE, MNLI, QNLI, MRPC, QQP, STS-B, WNLI); None for the others.

        Returns:
            :class:`Predictions` of n examples.

        Raises:
            DataError: the task takes another number of texts, there are not as many of one as of the other, or one of
                them is no text; names its position.

        >>> import lightning_glue as lg
        >>> run = lg.fit("RTE", model="tiny", data="sample", max_steps=2)
        >>> answer = lg.load(run).predict(["A man sleeps.", "It rains."], ["Somebody is asleep.", "It is dry."])
        >>> answer.probabilities.shape, answer.classes
        ((2, 2), ('entailment', 'not_entailment'))
        >>> all(label in answer.classes for label in answer.labels)
        True
        """
        columns = [_listed("texts", texts)] + ([] if pairs is None else [_listed("pairs", pairs)])
        if len(columns) != self.task.num_texts:
            wanted = "predict(texts, pairs)" if self.task.num_texts == 2 else "predict(texts)"
            raise DataError(f"{self.task.name}: {len(columns)} texts an example; expected {wanted}")
        if len({len(column) for column in columns}) > 1:
            counts = " and ".join(str(len(column)) for column in columns)
            raise DataError(f"{self.task.name}: {counts} texts; expected a pair for each text")
        for name, column in zip(("texts", "pairs"), columns):
            check_texts(self.task, column, partial("{}[{}]".format, name), "take it out")
        return self.answer(columns)

    def answer(self, columns: Sequence[Sequence[str]]) -> Predictions:
        """:meth:`predict` of texts that were checked: one or two columns of the same length."""
        return self.answered(self.outputs(columns))

    def answered(self, outputs: torch.Tensor) -> Predictions:
        """What head outputs (examples, classes) say."""
        task, outputs = self.task, outputs.double()
        if task.is_regression:
            return Predictions([], np.empty((len(outputs), 0)), on_scale(task, outputs.squeeze(-1)).numpy(), ())
        outputs = outputs / self.temperature
        if task.multilabel:
            return Predictions(present_labels(task, outputs), outputs.sigmoid().numpy(), np.empty(0), task.labels)
        shares = outputs.softmax(-1).numpy()
        return Predictions([task.labels[i] for i in shares.argmax(-1)], shares, np.empty(0), task.labels)

    def outputs(self, columns: Sequence[Sequence[str]]) -> torch.Tensor:
        """Head outputs (examples, classes) float32 on the CPU, the classes in the order of ``task.labels``."""
        if not columns[0]:
            return torch.empty(0, self.task.num_outputs)
        parts = [self.fine_tuned.tokenizer.encode([text.strip() for text in column]) for column in columns]
        tokens, lengths, _ = join_parts(parts, self.max_tokens)
        split = TokenizedSplit("rows", tokens, lengths, None)
        return predict(self.fine_tuned.model, split, evaluation_tokens(self.device.type))


def _temperature(fine_tuned: FineTuned) -> float:
    found = fine_tuned.settings.get("temperature")
    if not isinstance(found, float) or not 0 < found < float("inf"):
        raise CheckpointError(f"{fine_tuned.path} has no temperature: its run fitted none; leave calibrated out")
    return found


def _listed(name: str, texts: str | Iterable[str]) -> list[str]:
    if isinstance(texts, str):
        return [texts]
    try:
        return list(texts)
    except TypeError:
        raise DataError(f"{name} is {texts!r}; expected a text or a list of texts") from None


def check_texts(task: Task, texts: Iterable[object], place: Callable[[int], str], remedy: str) -> None:
    """Raise DataError where one of them is missing, no text, or cannot be encoded.

    Args:
        place: how to call the text of a position.
        remedy: what to do about one that is missing.
    """
    for position, text in enumerate(texts):
        if not isinstance(text, str):
            raise DataError(f"{task.name}: {place(position)} holds {text!r}, expected a text; fill it in or {remedy}")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise DataError(f"{task.name}: {place(position)} holds half a character: {text!r}") from None
