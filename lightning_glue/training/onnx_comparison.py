"""A model and its ONNX files side by side on the whole dev set: metrics, logits, time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lightning_glue.config import Config
from lightning_glue.data.batching import EvalSampler, padded
from lightning_glue.data.datamodule import TokenizedSplit
from lightning_glue.data.tokenizer import PAD
from lightning_glue.errors import UserError
from lightning_glue.export.onnx import INT8, MODEL
from lightning_glue.tasks import Task
from lightning_glue.training import metrics
from lightning_glue.training.evaluation import make_data, with_own_settings

if TYPE_CHECKING:
    from lightning_glue.inference.finetuned import FineTuned

_EVAL_TOKENS = 2048  # padding included, in a batch
_SINGLE = 100  # rows that are run one by one


@dataclass(frozen=True)
class Result:
    """Of one way to run the model.

    Attributes:
        scores: metrics by ``<dev set>/<metric>``.
        difference: the largest of any logit from the model's own.
        same: share of rows with the same prediction; None for regression.
        batched: milliseconds a row, in batches of similar lengths.
        single: median milliseconds of a row by itself.
    """

    name: str
    scores: dict[str, float]
    difference: float
    same: float | None
    batched: float
    single: float


Run = Callable[[torch.Tensor], np.ndarray]  # token ids (batch, length), padded, to logits (batch, classes)


def compare(fine_tuned: FineTuned, folder: Path, config: Config, given: set[str]) -> list[Result]:
    """Run the dev sets of the model's task through it and through the ONNX models in ``folder``, on the CPU.

    Args:
        given: keys of ``config`` that win over the settings of the model's run.

    Raises:
        UserError: there is no dev set to be had.
    """
    task = fine_tuned.task
    config, _ = with_own_settings(config, task, fine_tuned.settings, given)
    data = make_data(config, task, fine_tuned, predicts=False)
    data.setup("validate")
    splits = [data.splits[split.name] for split in task.dev if split.name in data.splits]
    if not any(len(split) for split in splits):
        raise UserError(f"{task.name} has no dev set with labels here")
    ways = {"torch": _torch(fine_tuned)}
    ways |= {name: _onnx(folder / name) for name in (MODEL, INT8) if (folder / name).is_file()}
    results: list[Result] = []
    own: list[np.ndarray] = []
    for name, run in ways.items():
        found = [_outputs(run, split, task.num_outputs) for split in splits]
        own = own or [outputs for outputs, _ in found]
        seconds, rows = sum(time for _, time in found), sum(map(len, splits))
        scores = {
            f"{split.name}/{metric}": value
            for split, (outputs, _) in zip(splits, found)
            for metric, value in metrics.compute(task, torch.from_numpy(outputs), torch.tensor(split.targets)).items()
        }
        pairs = [(outputs, expected) for (outputs, _), expected in zip(found, own)]
        difference = max(float(np.abs(one - other).max()) for one, other in pairs if len(one))
        single = _single(run, splits[0])
        results.append(Result(name, scores, difference, _same(task, pairs), 1000 * seconds / rows, 1000 * single))
    return results


def _torch(fine_tuned: FineTuned) -> Run:
    from lightning_glue.model.roberta import logits

    def run(tokens: torch.Tensor) -> np.ndarray:
        real = tokens != PAD
        lengths = real.sum(1)
        with torch.inference_mode():
            packed = {"tokens": tokens[real], "lengths": lengths, "longest": int(lengths.max())}
            return logits(fine_tuned.model.float(), packed).numpy()  # type: ignore[arg-type]

    return run


def _onnx(path: Path) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()  # as many as torch has
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run(tokens: torch.Tensor) -> np.ndarray:
        mask = (tokens != PAD).long()
        (found,) = session.run(["logits"], {"input_ids": tokens.numpy(), "attention_mask": mask.numpy()})
        return np.asarray(found)

    return run


def _outputs(run: Run, split: TokenizedSplit, classes: int) -> tuple[np.ndarray, float]:
    """Outputs (rows, classes) in the order of the rows, and the seconds that took."""
    found = np.empty((len(split), classes), dtype=np.float32)
    seconds = 0.0
    for batch in EvalSampler(split.lengths, _EVAL_TOKENS):
        part = split[batch]
        tokens = padded(part)
        begin = time.perf_counter()
        outputs = run(tokens)
        seconds += time.perf_counter() - begin
        found[part["rows"].numpy()] = outputs
    return found, seconds


def _single(run: Run, split: TokenizedSplit) -> float:
    """Median seconds of the first rows, each by itself."""
    taken = []
    for row in range(min(_SINGLE, len(split))):
        begin = split.starts[row]
        tokens = torch.from_numpy(split.tokens[begin : begin + split.lengths[row]].astype(np.int64))[None]
        start = time.perf_counter()
        run(tokens)
        taken.append(time.perf_counter() - start)
    return float(np.median(taken)) if taken else 0.0


def _same(task: Task, pairs: Iterable[tuple[np.ndarray, np.ndarray]]) -> float | None:
    """Share of rows that two ways predict the same of."""
    if task.is_regression:
        return None
    decide: Callable[[np.ndarray], Any] = (lambda x: x > 0) if task.multilabel else (lambda x: x.argmax(1)[:, None])
    equal = [(decide(one) == decide(other)).all(1) for one, other in pairs]
    return float(np.concatenate(equal).mean())


def table(results: list[Result]) -> list[str]:
    """The comparison as lines of text."""
    names = list(results[0].scores)
    head = ["", *names, "logits differ by", "same label", "ms a row in batches", "ms one row alone"]
    rows = [
        [one.name, *(f"{one.scores[name]:.4f}" for name in names), f"{one.difference:.1e}",
         "" if one.same is None else f"{one.same:.2%}", f"{one.batched:.2f}", f"{one.single:.2f}"]
        for one in results
    ]  # fmt: skip
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in [head, *rows]]
