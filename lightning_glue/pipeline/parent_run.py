"""A benchmark in MLflow: one run, written by all its drivers, the trainings nested below it."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_glue.errors import UserError
from lightning_glue.pipeline.disk import EXPORT_TAG, read_run, work_folder
from lightning_glue.pipeline.graph import PREDICT
from lightning_glue.tasks import get_task
from lightning_glue.tracking import provenance
from lightning_glue.tracking.stored_runs import BENCHMARK_TAG, best_scores, search
from lightning_glue.utils.logs import log
from lightning_glue.utils.redact import first_line, hide_secrets

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

    from lightning_glue.pipeline.ledger import Ledger
    from lightning_glue.pipeline.request import Benchmark

JOB_TAG = "lightning_glue.job"  # of each training: its job
PARENT_TAG = "lightning_glue.benchmark_run"  # of the benchmark's run: the benchmark's id
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


def _runs(benchmark: Benchmark, condition: str) -> tuple[MlflowClient, list[Run]] | None:
    """What MLflow has of the benchmark; None where there is no store yet.

    Raises:
        UserError: the store cannot be used.
        Exception: of MLflow, or of a database's driver.
    """
    from lightning_glue.tracking.client import connect, is_missing, store_uri

    if is_missing(store_uri(benchmark.uri)):
        return None
    client = connect(benchmark.uri, retries=2)
    experiment = client.get_experiment_by_name(benchmark.experiment)
    return client, list(search(client, [experiment.experiment_id], condition)) if experiment else []


def tell_finished(benchmark: Benchmark) -> None:
    """Give the run of a benchmark that is through its true status: a driver may have died right after the last job."""
    try:
        asked = _runs(benchmark, f"tags.`{PARENT_TAG}` = '{benchmark.id}'")
        client, runs = asked or (None, [])
        for run in runs:
            if client and run.info.status != "FINISHED":
                client.set_terminated(run.info.run_id, "FINISHED", end_time=run.info.end_time)
    except UserError:
        raise
    except Exception as error:
        log.warning("the benchmark's run could not be told that it is through: %s", first_line(error))


def recorded_runs(benchmark: Benchmark) -> dict[str, list[Run]] | None:
    """The trainings of a benchmark that MLflow has, by job, the finished ones first; None where it cannot be asked."""
    try:
        asked = _runs(benchmark, f"tags.`{BENCHMARK_TAG}` = '{benchmark.id}'")
    except UserError:
        raise
    except Exception as error:
        log.warning("MLflow cannot be asked for the benchmark's runs, the ledger is believed: %s", first_line(error))
        return None
    found: dict[str, list[Run]] = {}
    for run in asked[1] if asked else ():
        found.setdefault(run.data.tags.get(JOB_TAG, ""), []).append(run)
    for runs in found.values():
        runs.sort(key=lambda run: (run.info.status != "FINISHED", -run.info.start_time))
    return found


def compare_with_store(benchmark: Benchmark, ledger: Ledger, trainings: Iterable[str]) -> set[str]:
    """Make the ledger say what MLflow has: trainings that it lacks are done, those that MLflow has lost are not.

    Returns:
        The trainings whose run MLflow has lost, done or not: they begin anew.
    """
    jobs, recorded = list(trainings), recorded_runs(benchmark)
    gone = set[str]()
    for job in jobs if recorded is not None else ():
        entry, runs = ledger.entry(job), (recorded or {}).get(job, [])
        run_id = entry.run_id or read_run(work_folder(benchmark.folder, job))
        if run_id and not _is_known(benchmark, run_id, {run.info.run_id for run in runs}):
            gone.add(job)
        if entry.done and job in gone:
            log.info("%s is trained again: MLflow has lost its run %s", job, run_id)
            ledger.append(job, "lost", message="MLflow has lost its run")
        if not entry.done and runs and runs[0].info.status == "FINISHED" and _same_config(benchmark, runs[0]):
            _adopt(benchmark, ledger, job, runs[0])
    return gone


def _is_known(benchmark: Benchmark, run: str, known: set[str]) -> bool:
    """Whether a run, or that of the journal of this id, is among those that MLflow has, or on its way there."""
    from lightning_glue.tracking.journals import find_journal
    from lightning_glue.tracking.state import State

    if run in known:
        return True
    journal = find_journal(Path(benchmark.any_config["tracking.journal"]), run)
    delivered = State(journal).run_id if journal else None
    return journal is not None and (delivered is None or delivered in known)


def _same_config(benchmark: Benchmark, run: Run) -> bool:
    """Whether a run was made with what the benchmark's trainings of its task are made with."""
    params, stored = run.data.params, benchmark.stored["configs"].get(run.data.params.get("task.name", ""), {})
    return all(params.get(key, str(value))[:_SHOWN] == str(value)[:_SHOWN] for key, value in stored.items())


def _adopt(benchmark: Benchmark, ledger: Ledger, job: str, run: Run) -> None:
    """Write that a training is done, unless it started from another model of MNLI than the one there is.

    Where its model was deleted, what it said of every split must be there still, and need not be asked again.
    """
    task, seed, _ = job.split("/")
    start, source = run.data.params.get("init_from", "None"), f"MNLI/{seed}/train"
    dropped, there = EXPORT_TAG in run.data.tags, any((benchmark.folder / "outputs" / task / seed).glob("*.npz"))
    if (start != "None" and ledger.entry(source).run_id != start) or (dropped and not there):
        return
    log.info("%s is done: MLflow has its run %s", job, run.info.run_id)
    scores = best_scores(run)
    made: dict[str, Any] = {"id": uuid.uuid4().hex, "of": {source: ledger.ids(source)} if start != "None" else {}}
    seconds = max(0.0, ((run.info.end_time or 0) - run.info.start_time) / 1000)
    ledger.append(job, "done", **made, run_id=run.info.run_id, metrics=scores, seconds=seconds)
    if dropped:
        ledger.append(job, "dropped", run_id=run.info.run_id)
        predicted = {"id": uuid.uuid4().hex, "of": {job: made["id"]}}
        ledger.append(f"{task}/{seed}/{PREDICT}", "done", **predicted, run_id="", metrics=scores)
