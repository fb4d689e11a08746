"""A greedy soup: the average of those fine-tuned weights that together score no worse than fewer of them.

After Wortsman et al. 2022 (arXiv 2203.05482, recipe 1): models by falling dev score; each is averaged with those that
were kept so far, and kept where the average scores no worse. It is one model, and costs what one costs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lightning_glue.errors import UserError
from lightning_glue.pipeline.outputs import data_of, predicted, score, store_config, write_predicted
from lightning_glue.utils.files import make_folder, new_file, new_folder
from lightning_glue.utils.logs import log
from lightning_glue.utils.redact import first_line

if TYPE_CHECKING:
    from mlflow.entities import Run

    from lightning_glue.inference.finetuned import FineTuned

_FILE = "soup.json"  # beside the soup's outputs
_START = "lineage.start_sha256"  # tag of a run: SHA-256 of the weights that it started from
_RANDOM = "random weights"  # no two starts of this kind are the same


@dataclass(frozen=True)
class Soup:
    """What became of the runs.

    Attributes:
        members: the runs whose weights are averaged, the best one first.
        scores: of the average on the dev splits, by name.
        left_out: runs that were not tried, and why.
    """

    members: list[str]
    scores: dict[str, float]
    left_out: dict[str, str] = field(default_factory=dict)


def greedy_soup(runs: Sequence[str], uri: str | None, out: Path, export: Path | None = None) -> Soup:
    """Average the exported models of a task's runs greedily by the metric that selects the task's checkpoints.

    One model is in memory beside the average; the others are read from their files. Runs that did not start from the
    weights of the best one are left out. So a soup never scores less than the best run alone, on the split that it is
    selected on.

    Args:
        runs: MLflow run ids.
        uri: of the tracking store; None: MLFLOW_TRACKING_URI, else MLflow's default.
        out: folder for the soup's outputs, ``<benchmark>/outputs/<TASK>/soup``; those of AX go beside it, as
            :func:`~lightning_glue.pipeline.outputs.predict_run` has it.
        export: a new folder for the soup as ``lightning_glue.load`` and fairseq read it.

    Raises:
        UserError: a run is none of the task, not finished, or without an exported model.
    """
    from lightning_glue.inference.finetuned import fine_tuned_weights
    from lightning_glue.tracking.artifacts import locate
    from lightning_glue.training import evaluation

    ordered, left_out = _candidates(runs, uri)
    config = store_config(uri)
    loaded = evaluation.load(ordered[0], config, set(), None)
    fine_tuned = loaded.fine_tuned
    datasets = list(data_of(fine_tuned, config))
    setting, data = datasets[0]
    selection = data.task.selection_metric
    others = ((run, fine_tuned_weights(locate(run, uri), data.task)) for run in ordered[1:])

    def dev_scores() -> dict[str, float]:
        return {name: value for found in predicted(fine_tuned.model, setting, data, dev=True)
                for name, value in score(found).items()}  # fmt: skip

    kept = greedy_average(fine_tuned.model, others, lambda: dev_scores()[selection])
    scores: dict[str, float] = {}
    for setting, data in datasets:
        scores |= write_predicted(fine_tuned, setting, data, out)
    soup = Soup([ordered[0], *kept], scores, left_out)
    write_soup(soup, out)
    if export:
        _export(fine_tuned, export)
    return soup


def greedy_average(
    model: torch.nn.Module, others: Iterable[tuple[str, Mapping[str, torch.Tensor]]], score: Callable[[], float]
) -> list[str]:
    """Average a model with others, in place; the names of those that were kept.

    Args:
        model: the best one; what it holds afterwards scores no less.
        others: name and weights of each, by falling score.
        score: of what the model holds now.
    """
    average = {name: value.detach().clone() for name, value in model.state_dict().items()}
    best, kept = score(), list[str]()
    for name, weights in others:
        _mix(model, average, weights, len(kept) + 1)
        found = score()
        if found >= best:
            best = found
            kept.append(name)
            _copy(model.state_dict(), average)
    _copy(average, model.state_dict())
    return kept


@torch.no_grad()
def _mix(
    model: torch.nn.Module, average: Mapping[str, torch.Tensor], weights: Mapping[str, torch.Tensor], count: int
) -> None:
    """Put the average of ``count`` models and one more into ``model``, tensor by tensor, computed in float64."""
    for name, target in model.state_dict().items():
        if target.is_floating_point():
            mixed = average[name].double() * count + weights[name].to(target.device).double()
            target.copy_(mixed / (count + 1))


@torch.no_grad()
def _copy(source: Mapping[str, torch.Tensor], target: Mapping[str, torch.Tensor]) -> None:
    for name, value in target.items():
        value.copy_(source[name])


def _candidates(runs: Sequence[str], uri: str | None) -> tuple[list[str], dict[str, str]]:
    """The runs by falling dev score, as far as they started from the weights of the best; and why others did not."""
    from mlflow.exceptions import MlflowException

    from lightning_glue.errors import TrackingError
    from lightning_glue.tasks import get_task
    from lightning_glue.tracking.client import open_store
    from lightning_glue.tracking.journals import delivered_run
    from lightning_glue.tracking.registry import selection_value

    client, address = open_store(uri)
    try:
        found = [(run, client.get_run(delivered_run(run))) for run in dict.fromkeys(runs)]
    except (MlflowException, OSError) as error:
        raise TrackingError(f"MLflow at {address}: {first_line(error)}") from None
    tasks = {one.data.params.get("task.name", "no task") for _, one in found}
    if len(tasks) != 1:
        raise UserError(f"a soup of {', '.join(sorted(tasks)) or 'no runs'}; expected runs of one task")
    task = get_task(tasks.pop())
    found.sort(key=lambda pair: -selection_value(pair[1], task))
    (best, first), *rest = found
    left_out = {run: why for run, other in rest if (why := _other_start(first, other))}
    for run, why in left_out.items():
        log.info("run %s is not tried for the soup: %s", run, why)
    return [best, *(run for run, _ in rest if run not in left_out)], left_out


def _other_start(best: Run, other: Run) -> str:
    """Why the weights of two runs have nothing in common to average; empty where they have."""
    one, two = (run.data.tags.get(_START, "") for run in (best, other))
    if not one or one == _RANDOM or not two or two == _RANDOM:
        return "it or the best run did not start from pretrained weights"
    return "" if one == two else f"it started from weights {two[:12]}, the best run from {one[:12]}"


def _export(fine_tuned: FineTuned, folder: Path) -> None:
    from lightning_glue.export.fairseq import export
    from lightning_glue.tracking import model_card
    from lightning_glue.training.card_facts import of_model

    task = fine_tuned.task
    with new_folder(folder) as part:
        export(fine_tuned.model.cpu(), task, fine_tuned.tokenizer, list(task.labels), 0, part, fine_tuned.settings)
        model_card.write(part, of_model(fine_tuned, f"soup of {task.name}"), "fairseq")


def write_soup(soup: Soup, folder: Path) -> None:
    make_folder(folder, "outputs")
    with new_file(folder / _FILE) as file:
        json.dump(asdict(soup), file, indent=2)


def read_soup(folder: Path) -> Soup | None:
    """What became of a soup whose outputs are in a folder; None where none was made, or its note cannot be read."""
    try:
        return Soup(**json.loads((folder / _FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
