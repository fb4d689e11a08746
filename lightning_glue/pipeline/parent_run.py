"""A benchmark in MLflow: one run, written by all its drivers, the trainings nested below it."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_glue.errors import UserError
from lightning_glue.tasks import get_task
from lightning_glue.tracking import provenance
from lightning_glue.utils.logs import log
from lightning_glue.utils.redact import first_line, hide_secrets

if TYPE_CHECKING:
    from mlflow.entities import Run

    from lightning_glue.pipeline.ledger import Ledger
    from lightning_glue.pipeline.request import Benchmark

BENCHMARK_TAG = "lightning_glue.benchmark"  # of each training: the benchmark's id
JOB_TAG = "lightning_glue.job"  # of each training: its job
PARENT_TAG = "lightning_glue.benchmark_run"  # of the benchmark's run: the benchmark's id
_PAGE = 1000
_SHOWN = 250  # characters of a parameter's value that are compared


def as_parent(benchmark: str) -> dict[str, str]:
    """What tells the run of the benchmark with this id."""
    return {"tag": PARENT_TAG, "value": benchmark}


class ParentRun:
    """This driver's part of the benchmark's run.

    Args:
        alone: whether no other driver is at work; then the run is this one's to create, if it is not there.
    """

    def __init__(self, benchmark: Benchmark, *, alone: bool) -> None:
        from lightning_glue.pipeline.request import asked_as_parameters
        from lightning_glue.tracking.logger import MLflowTracker
        from lightning_glue.training.lightning_internals import speak_as

        speak_as(0)  # whatever SLURM calls this process: a driver is nobody's second
        journal = benchmark.any_config["tracking.journal"]
        self.tracker = MLflowTracker(benchmark.uri, benchmark.experiment, f"benchmark {benchmark.name}", journal)
        self.tracker.shared = {**as_parent(benchmark.id), "create": alone}
        tags = {
            "mlflow.source.name": provenance.command_line(),
            "mlflow.source.type": "LOCAL",
            "mlflow.user": provenance.user(),
        }
        asked = {key: hide_secrets(str(value)) for key, value in asked_as_parameters(benchmark).items()}
        self.tracker.start(asked, tags, None)

    def trained(self, task: str, seed: int, metrics: dict[str, float]) -> None:
        """A training has come to its end; its scores, by task, the seed as the step."""
        name = get_task(task).selection_metric
        if name in metrics:
            self.tracker.log_metrics({f"{task}/{name}": metrics[name]}, step=seed)

    def attach(self, files: Iterable[Path]) -> None:
        """Put what came out beside the run."""
        there = [path for path in files if path.is_file()]
        try:
            with self.tracker.artifact_folder("benchmark") as folder:
                for path in there:
                    shutil.copyfile(path, folder / path.name)
        except (OSError, UserError) as error:
            log.warning("the benchmark's run lacks its report: %s", first_line(error))

    def close(self, status: str) -> None:
        self.tracker.finish(status)


def recorded_runs(benchmark: Benchmark) -> dict[str, list[Run]] | None:
    """The trainings of a benchmark that MLflow has, by job, the finished ones first; None where it cannot be asked."""
    from lightning_glue.tracking.client import connect, is_missing, store_uri

    try:
        if is_missing(store_uri(benchmark.uri)):
            return {}
        client = connect(benchmark.uri, retries=2)
        experiment = client.get_experiment_by_name(benchmark.experiment)
        found: dict[str, list[Run]] = {}
        token: str | None = None
        while experiment:
            condition = f"tags.`{BENCHMARK_TAG}` = '{benchmark.id}'"
            page = client.search_runs([experiment.experiment_id], condition, max_results=_PAGE, page_token=token)
            for run in page:
                found.setdefault(run.data.tags.get(JOB_TAG, ""), []).append(run)
            token = page.token
            if not token:
                break
    except UserError:
        raise
    except Exception as error:  # of MLflow, or of a database's driver
        log.warning("MLflow cannot be asked for the benchmark's runs, the ledger is believed: %s", first_line(error))
        return None
    for runs in found.values():
        runs.sort(key=lambda run: (run.info.status != "FINISHED", -run.info.start_time))
    return found


def compare_with_store(benchmark: Benchmark, ledger: Ledger, trainings: Iterable[str]) -> None:
    """Make the ledger say what MLflow has: trainings that it lacks are done, those that MLflow has lost are not."""
    from lightning_glue.pipeline.jobs import best_of
    from lightning_glue.tracking.journals import find_journal

    jobs = list(trainings)
    recorded = recorded_runs(benchmark)
    if recorded is None:
        return
    root = Path(benchmark.any_config["tracking.journal"])
    for job in jobs:
        entry, runs = ledger.entry(job), recorded.get(job, [])
        if entry.done:
            known = {run.info.run_id for run in runs}
            if entry.run_id not in known and not _is_known(find_journal(root, entry.run_id), known):
                log.info("%s is trained again: MLflow has lost its run %s", job, entry.run_id)
                ledger.append(job, "lost", message="MLflow has lost its run")
        elif runs and runs[0].info.status == "FINISHED" and _same_config(benchmark, runs[0]):
            log.info("%s is done: MLflow has its run %s", job, runs[0].info.run_id)
            _adopt(ledger, job, runs[0], best_of(runs[0].data.metrics))


def _is_known(journal: Path | None, runs: set[str]) -> bool:
    """Whether the run of a journal is among these, or the server has not had it yet."""
    from lightning_glue.tracking.state import State

    run_id = State(journal).run_id if journal else None
    return journal is not None and (run_id is None or run_id in runs)


def _same_config(benchmark: Benchmark, run: Run) -> bool:
    """Whether a run was made with what the benchmark's trainings of its task are made with."""
    params, stored = run.data.params, benchmark.stored["configs"].get(run.data.params.get("task.name", ""), {})
    return all(params.get(key, str(value))[:_SHOWN] == str(value)[:_SHOWN] for key, value in stored.items())


def _adopt(ledger: Ledger, job: str, run: Run, metrics: dict[str, float]) -> None:
    """Write that a training is done, unless it started from another model of MNLI than the one there is."""
    start, source = run.data.params.get("init_from", "None"), f"MNLI/{job.split('/')[1]}/train"
    if start != "None" and ledger.entry(source).run_id != start:
        return
    of = {source: ledger.ids(source)} if start != "None" else {}
    seconds = max(0.0, ((run.info.end_time or 0) - run.info.start_time) / 1000)
    ledger.append(job, "done", id=uuid.uuid4().hex, of=of, run_id=run.info.run_id, metrics=metrics, seconds=seconds)
