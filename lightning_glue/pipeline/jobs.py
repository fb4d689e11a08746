"""What a worker makes of a job of a benchmark: a tracked training that goes on where it was, or what follows from some.

{"kind": "train"}                            the training of ``Job.config``
{"kind": "predict", "run", "out"}            what its model says
{"kind": "ensemble", "outputs", "seeds", "task"}
{"kind": "soup", "runs", "out"}
{"kind": "report", "benchmark"}              {"kind": "submission", "benchmark", "chosen"}
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_glue import config as configuration
from lightning_glue.config import Config
from lightning_glue.errors import UserError
from lightning_glue.execution.job import Fitted, Job, Report, TrainingFailed
from lightning_glue.execution.train_job import WorkerCaller, attempt
from lightning_glue.execution.train_job import preload as preload
from lightning_glue.pipeline.disk import read_run
from lightning_glue.pipeline.drivers import lock
from lightning_glue.training.build import Warm
from lightning_glue.utils.files import new_file
from lightning_glue.utils.launch import is_distributed_child
from lightning_glue.utils.logs import log

if TYPE_CHECKING:
    from lightning_glue.training.resume import Resume
    from lightning_glue.training.run import Training

_HELD_SECONDS = 90.0  # for the process that had the job before, whose driver is gone, to come to its orderly end
_warm = Warm()  # of the last training in this process


def carry_out(job: Job, report: Report, tell_run: Callable[[str], None]) -> Fitted:
    """Carry out a job, alone at it among all processes of the benchmark.

    Raises:
        UserError: so it would end again.
        TrainingFailed: something hindered it.
    """
    if job.config["trainer.gpus"] == "0":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a slot of the CPU, also for what asks for no device
    if is_distributed_child():
        return _train(job, tell_run)
    folder = Path(job.checkpoints)
    deadline = time.monotonic() + _HELD_SECONDS
    while True:
        with lock(folder / "busy.lock") as free:
            if free:
                return _train(job, tell_run) if job.todo["kind"] == "train" else _KINDS[job.todo["kind"]](job)
        if time.monotonic() > deadline:
            raise TrainingFailed(f"another process is still at it and holds {folder / 'busy.lock'}")
        time.sleep(0.2)


class BenchmarkCaller(WorkerCaller):
    """Goes on with the run that the job has, from its last checkpoint if it got that far."""

    def __init__(self, job: Job, tell_run: Callable[[str], None]) -> None:
        self.folder, self.tell_run, self.shows = Path(job.checkpoints), tell_run, job.shows
        self.tags, self.parent, self.warm = job.tags, job.parent, _warm
        self.checkpoints = self.folder / "checkpoints"

    def find(self, config: Config) -> Resume | None:
        from lightning_glue.training.distributed import decided_by_leader

        return decided_by_leader(lambda: self._find(config))

    def _find(self, config: Config) -> Resume | None:
        from lightning_glue.tracking.journal import Journal
        from lightning_glue.tracking.journals import find_journal
        from lightning_glue.training.resume import Resume, check_config, find, read_checkpoint

        run_id = read_run(self.folder)
        if not run_id:
            return None
        last = self.folder / "checkpoints" / "last.ckpt"
        try:
            found: Resume | None = read_checkpoint(last) if last.is_file() else None
            if found is None and (journal := find_journal(Path(config.tracking.journal), run_id)):
                start = Journal(journal).start()
                found = Resume(run_id, None, start) if start else find(run_id, config)
            if found:
                check_config(found, config)
        except UserError as error:
            log.warning("run %s cannot be gone on with, the training begins anew: %s", run_id, error)
            return None
        return found

    def built(self, training: Training) -> None:
        from lightning_glue.pipeline.pulse import Pulse
        from lightning_glue.training.resume import check_data

        if training.found:
            check_data(training.found, training.data.prepared.splits)
        self.callbacks = [Pulse(self.folder, training.module.task.selection_metric, training.config.data.batch_size)]
        self.begun = True

    def started(self, training: Training) -> None:
        run_id = training.tracker.run_id
        with new_file(self.folder / "run") as file:
            file.write(run_id)
        self.tell_run(run_id)


def _train(job: Job, tell_run: Callable[[str], None]) -> Fitted:
    if not is_distributed_child() and (finished := _finished(job)):
        return finished
    # A registered model is a run's export, which may not stay: the best one is registered when all is done.
    training = attempt(configuration.unflatten(job.config), BenchmarkCaller(job, tell_run))
    assert training.best
    return Fitted(training.tracker.run_id, dict(training.best.values), None)


def _finished(job: Job) -> Fitted | None:
    """What a training came to whose process died after its end, before that was told."""
    from lightning_glue.tracking.journal import Journal
    from lightning_glue.tracking.journals import find_journal

    run_id, config = read_run(Path(job.checkpoints)), configuration.unflatten(job.config)
    journal = find_journal(Path(config.tracking.journal), run_id) if run_id else None
    if not journal or Journal(journal).status() != "FINISHED":
        return None
    return Fitted(run_id, best_metrics(run_id, config.tracking.uri), None)


def best_metrics(run_id: str, uri: str | None) -> dict[str, float]:
    """The scores of a finished run's best evaluation, from the store."""
    from lightning_glue.tracking.client import open_store
    from lightning_glue.tracking.stored_runs import best_scores

    client, _ = open_store(uri)
    return best_scores(client.get_run(run_id))


def _predict(job: Job) -> Fitted:
    from lightning_glue.pipeline.outputs import predict_run

    scores = predict_run(job.todo["run"], job.config["tracking.uri"], Path(job.todo["out"]))
    return Fitted("", scores, None)


def _ensemble(job: Job) -> Fitted:
    """Of a task's seeds, into ``ensemble/`` beside them; for MNLI of AX, too."""
    from lightning_glue.pipeline.ensemble import ensemble
    from lightning_glue.pipeline.outputs import read_outputs, score, write_outputs

    scores: dict[str, float] = {}
    task = job.todo["task"]
    for name in (task, "AX") if task == "MNLI" else (task,):
        folder = Path(job.todo["outputs"]) / name
        members = [read_outputs(folder / f"seed-{seed}") for seed in job.todo["seeds"]]
        for split in members[0]:
            together = ensemble([member[split] for member in members])
            write_outputs(together, folder / "ensemble")
            scores |= score(together)
    return Fitted("", scores, None)


def _soup(job: Job) -> Fitted:
    from lightning_glue.pipeline.soup import greedy_soup

    soup = greedy_soup(job.todo["runs"], job.config["tracking.uri"], Path(job.todo["out"]))
    return Fitted("", soup.scores, None)


def _report(job: Job) -> Fitted:
    from lightning_glue.pipeline.benchmark_report import write_report

    write_report(Path(job.todo["benchmark"]), job.config["tracking.uri"])
    return Fitted("", {}, None)


def _submission(job: Job) -> Fitted:
    from lightning_glue.pipeline.submission import write_submission

    benchmark = Path(job.todo["benchmark"])
    written = write_submission(benchmark, job.todo["chosen"], benchmark / "submission.zip")
    for name, why in written.absent.items():
        log.info("%s is not in the submission: %s", name, why)
    return Fitted("", {}, None)


_KINDS: Mapping[str, Callable[[Job], Any]] = {
    "predict": _predict, "ensemble": _ensemble, "soup": _soup, "report": _report, "submission": _submission,
}  # fmt: skip
