"""The trainings in a tracking store, fetched at once: one request for the experiments, one for each page of runs."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lightning_glue.errors import TrackingError, suggest
from lightning_glue.tracking import registry
from lightning_glue.tracking.own_tasks import is_known, task_of_run
from lightning_glue.tracking.pages import run_page
from lightning_glue.utils.redact import first_line, hide_secrets

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

_PAGE = 5000  # runs a request asks for: 40 MB; a server may take no more than 20 s to answer
_PARENT = "mlflow.parentRunId"
BENCHMARK_TAG = "lightning_glue.benchmark"  # of each training of a benchmark: its id
_BEST = "best/"  # begins the names of the best evaluation's scores
_OURS = "lightning_glue."  # begins the tags of every run of this program


@dataclass(frozen=True)
class Scored:
    """A finished run.

    Attributes:
        seed: what it was drawn with; the run's id where it does not say.
        data: digest of each split.
        score: the metric that selects the task's checkpoints, of the best one.
        best: all dev scores of that, by name.
        started: milliseconds since 1970.
        minutes: wall time times devices.
        dev_rows: of the dev set that selects the task's checkpoints; None where the run does not say.
        majority: the score of saying the most frequent class; None where the run does not say.
        metric: the score's name.
        constant: what the majority score is of, in words.
        link: address of the run's page; empty where the store is no server.
    """

    run_id: str
    link: str
    task: str
    seed: str
    params: dict[str, str]
    data: dict[str, str]
    score: float
    best: dict[str, float]
    started: int
    minutes: float
    majority: float | None = None
    dev_rows: int | None = None
    metric: str = ""
    constant: str = "the majority class"


def fetch(client: MlflowClient, uri: str, experiment: str | None, condition: str = "") -> list[Run]:
    """Every run of an experiment, or of all; a store that cannot be read raises :class:`UserError`.

    Args:
        condition: of MLflow's search, which the runs meet.
    """
    from mlflow.exceptions import MlflowException

    try:
        found = {entry.name: entry.experiment_id for entry in client.search_experiments(max_results=_PAGE)}
        if experiment is not None and experiment not in found:
            raise TrackingError(f"no experiment {experiment!r} at {hide_secrets(uri)}{suggest(experiment, found)}")
        ids = [found[experiment]] if experiment is not None else list(found.values())
        return search(client, ids, condition)
    except (MlflowException, OSError) as error:
        raise TrackingError(f"MLflow at {hide_secrets(uri)} cannot be read: {first_line(error)}") from None


def search(client: MlflowClient, experiments: list[str], condition: str = "") -> list[Run]:
    """Every run of experiments, named by their ids, that meets a condition of MLflow's search; its errors pass."""
    runs: list[Run] = []
    token: str | None = ""
    with _without_collections():
        while token is not None:
            page = client.search_runs(experiments, condition, max_results=_PAGE, page_token=token or None)
            runs, token = runs + list(page), page.token or None
    return runs


def best_scores(run: Run) -> dict[str, float]:
    """The dev scores of a run's best evaluation, by name."""
    return {name.removeprefix(_BEST): value for name, value in run.data.metrics.items() if name.startswith(_BEST)}


@contextmanager
def _without_collections() -> Iterator[None]:
    """Within, no garbage is looked for: among the hundred objects of each run there is none, and it takes 40 % of the
    time."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def is_training(run: Run) -> bool:
    """Whether a run is a training of this program: not a search, nor a benchmark, nor another program's."""
    params = run.data.params
    return is_known(run) and "model.name" in params and "tune.trials" not in params


def is_foreign(run: Run) -> bool:
    """Whether a run is another program's."""
    ours = any(name.startswith(_OURS) for name in run.data.tags) or "tune.trials" in run.data.params
    return not is_training(run) and not ours


def is_trial(run: Run) -> bool:
    """Whether a run is one of a search; those of a benchmark are nested too, but stand for themselves."""
    return _PARENT in run.data.tags and BENCHMARK_TAG not in run.data.tags


def foreign_note(runs: Iterable[Run]) -> str:
    """How many runs are another program's, with an example; empty where none is."""
    found = [run for run in runs if is_foreign(run)]
    if not found:
        return ""
    name, count = (found[0].info.run_name or "without a name")[:60], len(found)
    return f"left out: {count} run{'s' * (count > 1)} of another program, such as {name} ({found[0].info.run_id})"


def scored_run(run: Run, uri: str) -> Scored | None:
    """The run's selection metric and cost; None for a run without one, or of another program."""
    params, info = run.data.params, run.info
    if not is_training(run):
        return None
    task = task_of_run(run)
    value = run.data.metrics.get(f"{_BEST}{task.selection_metric}")
    if value is None or info.end_time is None:
        return None
    link = run_page(uri, info.experiment_id, info.run_id) if uri.startswith("http") else ""
    minutes = (info.end_time - info.start_time) / 60000 * devices(run)
    return Scored(
        info.run_id, hide_secrets(link), params["task.name"], params.get("seed", info.run_id), dict(params),
        registry.dataset_digests(run), value, best_scores(run), info.start_time, minutes,
        registry.majority_of(run), _dev_rows(run), task.selection_metric, task.constant_answer,
    )  # fmt: skip


def _dev_rows(run: Run) -> int | None:
    """Rows of the dev set that a run was selected on, as its data set says."""
    name = task_of_run(run).dev[0].name
    for entry in run.inputs.dataset_inputs if run.inputs else ():
        if entry.dataset.name.rpartition("/")[2] == name:
            with suppress(ValueError, TypeError, KeyError):
                return int(json.loads(entry.dataset.profile or "")["rows"])
    return None


def devices(run: Run) -> int:
    """Devices, or processes on the CPU, that a run was made on."""
    world = run.data.tags.get("resolved.devices", "").partition(" ")[0]
    numbers = [world, *(run.data.params.get(name, "1") for name in ("trainer.gpus", "trainer.procs"))]
    return max([1, *(int(number) for number in numbers if number.isascii() and number.isdecimal())])
