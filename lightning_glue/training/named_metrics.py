"""Metrics of torchmetrics by name, for tasks of one's own: ``cohen_kappa``, ``MulticlassAUROC``, ``recall_macro``."""

from __future__ import annotations

import difflib
import math
import warnings
from functools import cache
from typing import Any

import torch
from torch import Tensor

from lightning_glue.errors import ConfigError
from lightning_glue.tasks import Task

_AVERAGES = ("macro", "micro", "weighted")
_GROUPS = ("binary", "multiclass", "multilabel")
_SYNONYMS = {"f1": "f1score", "mse": "meansquarederror", "mae": "meanabsoluteerror", "r2": "r2score"}
_EXAMPLES = 32  # of random outputs that a metric is tried with


def _plain(name: str) -> str:
    return name.replace("_", "").replace(" ", "").casefold()


@cache
def _classes(regression: bool) -> dict[str, type[Any]]:
    """torchmetrics' classes by small letters."""
    from torchmetrics import classification
    from torchmetrics import regression as of_scores

    module = of_scores if regression else classification
    return {_plain(name): getattr(module, name) for name in module.__all__}


def make_metric(task: Task, name: str) -> Any:
    """torchmetrics' metric of that name for the task's outputs, new.

    Of classification the one for the kind of task is taken: ``Binary...`` of two classes, ``Multiclass...``,
    ``Multilabel...``; a name that says one of these itself is taken at its word. ``_macro``, ``_micro`` or
    ``_weighted`` at the end is the average over classes.

    Raises:
        ConfigError: there is none, or it is of another kind of task.
    """
    words, average = name, None
    for ending in _AVERAGES:
        if _plain(name).endswith(ending):
            words, average = name[: -len(ending)].rstrip("_ "), ending
        elif _plain(name).startswith(ending):
            words, average = name[len(ending) :].lstrip("_ "), ending
    plain = _SYNONYMS.get(_plain(words), _plain(words))
    known = _classes(task.is_regression)
    group, options = "", {}
    if not task.is_regression:
        group, plain = _group(task, name, plain, average, known)
        options = _options(task, group)
    if plain == "matthewscorrcoef" and not task.multilabel:
        raise ConfigError(f"metrics: {name!r} of torchmetrics is not 0 for a constant prediction; say matthews")
    if group + plain not in known:
        raise ConfigError(f"metrics: no metric {name!r} for {_kind(task)}; {_near(task, plain)}")
    if average:
        options["average"] = average
    try:
        return known[group + plain](**options, sync_on_compute=False)
    except (TypeError, ValueError, ImportError) as error:
        raise ConfigError(f"metrics: {name!r} cannot be used: {str(error).splitlines()[0]}") from None


def _group(task: Task, name: str, plain: str, average: str | None, known: dict[str, type[Any]]) -> tuple[str, str]:
    """``multiclass`` and the rest of the name, or the like."""
    said = next((one for one in _GROUPS if plain.startswith(one)), "")
    two = len(task.labels) == 2
    fitting = ["multilabel"] if task.multilabel else ["binary", "multiclass"] if two else ["multiclass"]
    if said and said not in fitting:
        raise ConfigError(f"metrics: {name!r} is not for {_kind(task)}; expected one of {', '.join(fitting)}")
    if said:
        return said, plain.removeprefix(said)
    fitting = [one for one in fitting if not (average and one == "binary")]
    return next((one for one in fitting if one + plain in known), fitting[0]), plain


def _options(task: Task, group: str) -> dict[str, Any]:
    if group == "binary":
        return {}
    return {"num_classes" if group == "multiclass" else "num_labels": len(task.labels)}


def _kind(task: Task) -> str:
    if task.is_regression:
        return "a regression"
    return "any number of labels" if task.multilabel else f"{len(task.labels)} classes"


def _near(task: Task, plain: str) -> str:
    """The names that are like one that is none."""
    group = "" if task.is_regression else "Multilabel" if task.multilabel else "Multiclass"
    names = [kind.__name__.removeprefix(group) for kind in _classes(task.is_regression).values()
             if kind.__name__.startswith(group)]  # fmt: skip
    near = difflib.get_close_matches(plain, map(str.casefold, names), n=3, cutoff=0.6)
    found = sorted(group + name for name in names if name.casefold() in near)
    return f"did you mean {' or '.join(found)}?" if found else f"torchmetrics has {', '.join(sorted(names))}"


def named_value(task: Task, name: str, outputs: Tensor, targets: Tensor) -> float:
    """A metric of probabilities and label ids, or of scores on the task's own scale; 0 where it is not a number.

    Some raise where there is nothing to count: of one row, or of one class.
    """
    if outputs.isnan().any():
        return 0.0
    metric = make_metric(task, name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # classes without an example count as 0
        try:
            metric.update(*_arguments(task, metric, outputs.double(), targets))
            value = metric.compute()
        except (ValueError, IndexError):
            return 0.0
    number = float(value) if isinstance(value, Tensor) and value.numel() == 1 else math.nan
    return number if math.isfinite(number) else 0.0


def _arguments(task: Task, metric: Any, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    if task.is_regression:
        scores, labels = outputs.squeeze(-1), targets.double()
        return scores * task.label_scale + task.label_offset, labels * task.label_scale + task.label_offset
    if task.multilabel:
        return outputs.sigmoid(), targets.long()
    shares = outputs.softmax(-1)
    return (shares[:, 1] if type(metric).__name__.startswith("Binary") else shares), targets


def check_metric(task: Task, name: str, *, selects: bool) -> None:
    """Try a metric on random outputs.

    Args:
        selects: whether the best checkpoint is the one where it is highest.

    Raises:
        ConfigError: there is no such metric, it is no single number, or better the lower and selects.
    """
    metric = make_metric(task, name)
    if selects and metric.higher_is_better is not True:
        raise ConfigError(
            f"metrics: {name} is not better the higher it is; the first metric selects the checkpoint: put one before "
            "it that is"
        )
    generator = torch.Generator().manual_seed(1)
    outputs = torch.rand(_EXAMPLES, task.num_outputs, generator=generator)
    targets = torch.arange(_EXAMPLES) % max(len(task.labels), 1)
    if task.multilabel:
        targets = torch.randint(0, 2, outputs.shape, generator=generator)
    if task.is_regression:
        targets = torch.rand(_EXAMPLES, generator=generator)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            metric.update(*_arguments(task, metric, outputs.double(), targets))
            value = metric.compute()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"metrics: {name!r} cannot be computed here: {str(error).splitlines()[0]}") from None
    if not isinstance(value, Tensor) or value.numel() != 1:
        raise ConfigError(f"metrics: {name!r} is no single number; add _macro, _micro or _weighted, or choose another")
