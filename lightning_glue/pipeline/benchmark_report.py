"""The report of a benchmark: each task's seeds, what was made of them together, and what is missing."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_glue.errors import TrackingError, UserError
from lightning_glue.pipeline.benchmark_folder import BenchmarkFolder, read_benchmark
from lightning_glue.pipeline.outputs import read_outputs, score
from lightning_glue.pipeline.soup import read_soup
from lightning_glue.tasks import get_task
from lightning_glue.tracking.comparison import (
    Group,
    Section,
    Table,
    group_runs,
    in_common,
    majority_note,
    repeated_note,
    scored_splits,
)
from lightning_glue.tracking.energy import energy
from lightning_glue.tracking.report_text import Report, save
from lightning_glue.tracking.stored_runs import BENCHMARK_TAG, Scored, fetch, is_training, scored_run
from lightning_glue.utils.redact import hide_secrets

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

_TOGETHER = ("ensemble", "soup")


def write_report(benchmark: Path, uri: str | None = None) -> list[Path]:
    """Write ``report.md`` and ``report.html`` into a benchmark's folder.

    Args:
        benchmark: the folder.
        uri: of the tracking store; None: the one that the benchmark names, else MLFLOW_TRACKING_URI.

    Raises:
        UserError: no benchmark is there, or nothing of it is finished, or its store cannot be read.
    """
    return save(make_report(read_benchmark(benchmark), uri), benchmark)


def make_report(benchmark: BenchmarkFolder, uri: str | None = None) -> Report:
    """What :func:`write_report` writes."""
    from lightning_glue.tracking.client import open_store

    notes, groups, runs, address = list[str](), list[Group](), dict[str, "Run"](), ""
    client: MlflowClient | None = None
    try:
        client, address = open_store(uri or _store(benchmark))
        found = fetch(client, address, None, f"tags.`{BENCHMARK_TAG}` = '{_plain_id(benchmark)}'")
        runs = {run.info.run_id: run for run in found if is_training(run) and run.info.status == "FINISHED"}
    except TrackingError as error:
        notes.append(f"without MLflow, so without costs and links: {error}")
    scored = [one for run in runs.values() if (one := scored_run(run, address)) and one.task in benchmark.tasks]
    scored += _from_ledger(benchmark, scored)
    if not scored:
        raise UserError(f"benchmark {benchmark.name!r} in {benchmark.path}: no training of it is finished")
    tasks = {run.run_id: run.task for run in scored}
    for task in benchmark.tasks:
        for group in group_runs([run for run in scored if run.task == task], tasks):
            together = {name: value for name in _TOGETHER if (value := _selection(benchmark, task, name)) is not None}
            full = replace(group, together=together)
            if client and all(run.run_id in runs for run in group.runs):
                full = replace(full, energy=_energy(client, [runs[run.run_id] for run in group.runs]))
            groups.append(full)
    table = Section("Tasks", groups, [*notes, *_notes(groups), in_common(scored)])
    return Report(_title(benchmark), [table, *_details(benchmark, groups)], _missing(benchmark))


def _from_ledger(benchmark: BenchmarkFolder, known: list[Scored]) -> list[Scored]:
    """The trainings that the ledger says are done and MLflow does not have yet, with the scores of their outputs."""
    found = []
    events = benchmark.last_events()
    for task in benchmark.tasks:
        there = {run.seed: run for run in known if run.task == task}
        usual = next(iter(there.values())).params if there else _as_params(benchmark, task)
        for seed in benchmark.seeds(task):
            event = events.get(f"{task}/seed-{seed}/train", {})
            scores = _scores(benchmark, task, f"seed-{seed}")
            name = get_task(task).selection_metric
            if str(seed) in there or event.get("state") != "done" or name not in scores:
                continue
            run_id, minutes = str(event.get("run_id", "")), float(event.get("seconds", 0)) / 60
            params = usual | {"seed": str(seed)}
            found.append(Scored(run_id, "", task, str(seed), params, {}, scores[name], scores, 0, minutes, metric=name))
    return found


def _as_params(benchmark: BenchmarkFolder, task: str) -> dict[str, str]:
    """What benchmark.json says that the trainings of a task were made with, as a run has it."""
    asked = benchmark.asked
    configs = asked.get("configs", {}).get(task, {})
    return {"model.name": str(asked.get("model", "")), "data.source": str(asked.get("data", "glue"))} | {
        str(key): str(value) for key, value in configs.items()
    }


def _store(benchmark: BenchmarkFolder) -> str | None:
    """The address that is noted, unless it had a password, which is noted nowhere."""
    return None if "***" in (benchmark.uri or "") else benchmark.uri


def _plain_id(benchmark: BenchmarkFolder) -> str:
    if not benchmark.id.isalnum():
        raise UserError(f"{benchmark.path}: {benchmark.id[:60]!r} is no id of a benchmark; restore benchmark.json")
    return benchmark.id


def _title(benchmark: BenchmarkFolder) -> str:
    data = ", generated sample" if benchmark.asked.get("data") == "sample" else ""
    return (
        f"Benchmark {benchmark.name}: {benchmark.asked.get('model', '')}, {len(benchmark.asked['seeds'])} seeds{data}"
    )


def _selection(benchmark: BenchmarkFolder, task: str, member: str) -> float | None:
    return _scores(benchmark, task, member).get(get_task(task).selection_metric)


def _scores(benchmark: BenchmarkFolder, task: str, member: str) -> dict[str, float]:
    """The dev scores of a member's outputs, by name; none where there are no outputs."""
    dev = [split.name for split in get_task(task).dev]
    return {name: value for one in read_outputs(benchmark.outputs(task, member), dev).values()
            for name, value in score(one).items()}  # fmt: skip


def _energy(client: MlflowClient, runs: Iterable[Run]) -> float | None:
    """Watt hours of runs; None unless each tells."""
    found = [energy(client, run) for run in runs]
    told = [value for value in found if value is not None]
    return sum(told) if told and len(told) == len(found) else None


def _notes(groups: list[Group]) -> list[str]:
    said = [note(group) for group in groups for note in (repeated_note, majority_note)]
    for task in dict.fromkeys(group.task for group in groups):
        runs = [run for group in groups if group.task == task for run in group.runs]
        if len({tuple(sorted(scored_splits(run).items())) for run in runs}) > 1:
            said.append(f"{task}: the runs were made on different data and cannot be compared")
    return [*filter(None, said)]


def _details(benchmark: BenchmarkFolder, groups: list[Group]) -> list[Section]:
    """For each task a section with every dev score of every seed, its ensemble and its soup."""
    found = []
    for task in dict.fromkeys(group.task for group in groups):
        lines = [(f"seed {run.seed}", run.best, run.link or run.run_id)
                 for group in groups if group.task == task for run in _by_seed(group)]  # fmt: skip
        for name in _TOGETHER:
            soup = read_soup(benchmark.outputs(task, name)) if name == "soup" else None
            if scores := _scores(benchmark, task, name):
                lines.append((name, scores, f"{len(soup.members)} runs" if soup else ""))
        names = sorted({name for _, scores, _ in lines for name in scores})
        rows = [[who, *(f"{scores[name]:.4f}" if name in scores else "-" for name in names), rest]
                for who, scores, rest in lines]  # fmt: skip
        found.append(Section(task, [], [], Table(["", *names, "run"], rows)))
    return found


def _by_seed(group: Group) -> list[Scored]:
    return sorted(group.seeds, key=lambda run: (len(run.seed), run.seed))


def _missing(benchmark: BenchmarkFolder) -> list[str]:
    """Jobs that failed, and how many trainings are not done."""
    events = benchmark.last_events()
    failed = [f"failed: {job}, {hide_secrets(str(event.get('message', '')))[:200]}" for job, event in events.items()
              if event["state"] == "failed"]  # fmt: skip
    jobs = [f"{task}/seed-{seed}/train" for task in benchmark.tasks for seed in benchmark.asked["seeds"]]
    open_ones = [job for job in jobs if events.get(job, {}).get("state") not in ("done", "failed")]
    if open_ones:
        failed.append(f"not finished: {len(open_ones)} of {len(jobs)} trainings, such as {open_ones[0]}")
    return failed
