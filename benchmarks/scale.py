"""What tracking and searching cost where there is much already: records of a journal, trials of a study, old journals.

    python benchmarks/scale.py [watcher] [trials] [journals]

Times are CPU seconds of the process that does the work, so that a busy machine does not count; the delay is wall time.
"""

from __future__ import annotations

import os
import sqlite3
import statistics
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from contextlib import chdir
from pathlib import Path
from typing import Any

import optuna
from common import describe_machine
from optuna.distributions import FloatDistribution
from optuna.trial import FrozenTrial, create_trial
from records import keep

from lightning_glue.execution.job import Job, Outcome
from lightning_glue.tuning.space import Space

HERE = Path(__file__).resolve().parent
RECORDS, CALLS, SECONDS = 50_000, 5.0, 15.0  # a journal's length; calls a second, and for how long
MANY, SOME, MEASURED = 3000, 10, 25  # trials
JOURNALS = 200
SPACE: Space = {"x": FloatDistribution(0.0, 1.0)}


def objective(job: Any, report: Callable[[int, float], bool], tell_run: Callable[[str], None]) -> Outcome:
    """A trial that does nothing but report twice, as a worker calls it."""
    for step in (1, 2):
        report(step, job.config["x"])
    return Outcome(job.config["x"], data={"train": "same"})


def silent(job: Any, report: Callable[[int, float], bool], tell_run: Callable[[str], None]) -> Outcome:
    """A trial that does nothing at all: what it costs to dispatch one, and to take down what came of it."""
    return Outcome(job.config["x"], data={"train": "same"})


def start_of(name: str, system_metrics: float | None) -> dict[str, Any]:
    return {
        "id": name, "uri": None, "experiment": "scale", "name": name, "run_id": None, "time": 1_700_000_000_000,
        "params": {f"p{number}": "1" for number in range(50)}, "tags": {}, "config": {},
        "system_metrics": system_metrics,
    }  # fmt: skip


def write_journal(folder: Path, records: int, status: str, system_metrics: float | None = None) -> str:
    """A journal of so many records that counts as delivered; its run's id."""
    from lightning_glue.tracking.courier import Courier
    from lightning_glue.tracking.journal import Journal, encode
    from lightning_glue.tracking.state import State

    folder.mkdir(parents=True)
    journal = Journal(folder)
    journal.append({"start": start_of(folder.name, system_metrics)})
    Courier(folder).deliver()
    with open(journal.path, "ab") as file:
        for step in range(records):
            points = [[f"m/{one}", (step * 0.37 + one) % 7.31, 1_700_000_000_000 + step, step] for one in range(8)]
            file.write(encode({"metrics": points}))
        file.write(encode({"status": [status, 1_700_000_100_000]}))
    state, size = State(folder), journal.path.stat().st_size
    state.offset = state.uploads = size
    state.prefix = state.uploads_prefix = journal.checksum(0, size, None)
    state.save()
    state.save_uploads()
    Courier(folder).client.set_terminated(str(state.run_id), status)
    return str(state.run_id)


def cpu_of(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure_watcher(records: int, system_metrics: float | None) -> tuple[float, float, float]:
    """The watcher's share of a core, the delay until a point can be queried (median, s), and the resume's CPU s."""
    from lightning_glue.tracking import watcher
    from lightning_glue.tracking.logger import MLflowTracker

    root = Path("mlruns/.journal").resolve()
    run_id = write_journal(root / uuid.uuid4().hex, records, "KILLED", system_metrics)
    tracker = MLflowTracker(None, "scale", "run")
    before = time.process_time()
    tracker.start({}, {}, None, resume=run_id)
    resumed = time.process_time() - before
    process = watcher._process
    assert process
    time.sleep(5)  # what it does on arrival
    database = sqlite3.connect(f"file:{Path.cwd() / 'mlflow.db'}?mode=ro", uri=True, timeout=60)
    query = "SELECT 1 FROM metrics WHERE run_uuid = ? AND key = 'm/0' AND step = ? LIMIT 1"
    delays = []
    begin, used = time.perf_counter(), cpu_of(process.pid)
    for call in range(int(SECONDS * CALLS)):
        step, logged = records + call, time.perf_counter()
        tracker.log_metrics({f"m/{one}": 1.0 for one in range(8)}, step)
        if call % 10 == 0:
            while not database.execute(query, (run_id, step)).fetchone():
                time.sleep(0.005)
            delays.append(time.perf_counter() - logged)
        time.sleep(max(0.0, begin + (call + 1) / CALLS - time.perf_counter()))
    share = (cpu_of(process.pid) - used) / (time.perf_counter() - begin)
    database.close()
    tracker.finish("KILLED")
    return share, statistics.median(delays), resumed


def show_watcher() -> dict[str, float]:
    found = {}
    print(f"\nwatcher, {CALLS:g} calls of 8 scalars a second, SQLite; records already in the journal:")
    for seconds in (5.0, None):
        for records in (0, RECORDS):
            share, delay, resumed = measure_watcher(records, seconds)
            print(
                f"  {records:>6} records, system metrics {seconds or 'off'}: {share:.1%} of a core, "
                f"queryable after {delay:.2f} s; resuming took {resumed:.2f} CPU s; load {os.getloadavg()[0]:.1f}"
            )
            found[f"watcher, {records} records, system metrics {seconds or 'off'}: share of a core"] = share
    return found


def done_trial(number: int) -> FrozenTrial:
    x = (number * 0.618) % 1
    attributes = {"heartbeat": "h 1 1", "slot": number, "collapsed": 0, "runs": ["0" * 32]}
    return create_trial(
        params={"x": x}, distributions=dict(SPACE), value=x, intermediate_values={1: x, 2: x}, user_attrs=attributes
    )


def measure_trials(storage: str, name: str, finished: int, total: int, objective: str = "objective") -> float:
    """CPU ms of the controller per trial, from the second trial on, with all that a search tells of its trials."""
    from lightning_glue.execution.local import groups
    from lightning_glue.execution.place import Division, places
    from lightning_glue.tracking.logger import MLflowTracker
    from lightning_glue.tuning.controller import Controller, Running, study_folder
    from lightning_glue.tuning.results import best_trial
    from lightning_glue.tuning.scoreboard import Scoreboard
    from lightning_glue.tuning.storage import open_storage
    from lightning_glue.tuning.strategy import make_sampler
    from lightning_glue.tuning.study import SharedStudy
    from lightning_glue.tuning.study_run import StudyTracking

    study = SharedStudy(
        name, open_storage(storage), make_sampler("random", seed=1), optuna.pruners.NopPruner(),
        {"space": {"x": "0 to 1"}}, heartbeat=30.0, retries=2,
    )  # fmt: skip
    study.study.add_trials([done_trial(number) for number in range(finished)])
    study.fill_queue(total, [])
    stamps: list[float] = []
    board = Scoreboard("x", 1, shows=False)
    tracking = StudyTracking(MLflowTracker(None, "scale", f"study {name}"), study, {}, "x", alone=True)
    tracking._next = float("inf")  # plots have a thread's time of their own

    class Observer:
        best: float = -1.0

        def changed(self, running: list[Running]) -> None:
            """As the observer of a search, where there is no terminal."""

        def finished(self, trial: FrozenTrial, runs: list[str]) -> None:
            board.finished(trial)
            tracking.finished(trial, runs)
            if trial.value is not None and trial.value > self.best and (best := best_trial(study)):
                self.best = best.value or 0.0
            stamps.append(time.process_time())
            if len(stamps) > MEASURED:
                controller.stopped_by = controller.stopped_by or signal_of_the_end()

    where = places(Division(workers=1))
    executors = groups(where, f"scale:{objective}", study_folder(study.name, study.id))
    controller = Controller(
        study, SPACE, lambda running, seed, folder: Job(running.parameters, {}, str(folder)), executors, Observer()
    )
    controller.run()
    tracking.close("KILLED")
    return (stamps[-1] - stamps[0]) / (len(stamps) - 1) * 1000


def measure_optuna(storage: str) -> float:
    """CPU ms of a trial that Optuna's own loop asks for, draws, reports twice and tells, and nothing more."""
    from lightning_glue.tuning.storage import open_storage

    study = optuna.create_study(
        study_name="alone", storage=open_storage(storage), sampler=optuna.samplers.RandomSampler(1)
    )

    def trial(asked: optuna.Trial) -> float:
        x = asked.suggest_float("x", 0.0, 1.0)
        for step in (1, 2):
            asked.report(x, step)
        return x

    study.optimize(trial, 1)
    before = time.process_time()
    study.optimize(trial, MEASURED)
    return (time.process_time() - before) / MEASURED * 1000


def signal_of_the_end() -> Any:
    import signal

    return signal.SIGTERM


def show_trials() -> dict[str, float]:
    ratios: dict[str, float] = {}
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    sys.path.insert(0, str(HERE.parent / "tests"))
    storages = {"sqlite": f"sqlite:///{Path.cwd() / 'study.db'}", "journal file": str(Path.cwd() / "study.journal")}
    server = None
    try:
        from helpers.postgres import Postgres

        server = Postgres()
        storages["postgresql"] = server.new_database("scale")
    except (ImportError, OSError) as error:
        print(f"no PostgreSQL here: {error}")
    print(f"\ntrials that do nothing, one worker: CPU ms of the controller per trial, {MEASURED} trials each")
    try:
        for kind, storage in storages.items():
            few = measure_trials(storage, "few", 0, MEASURED + SOME)
            queued = measure_trials(storage, "queued", 0, MANY)
            finished = measure_trials(storage, "finished", MANY, MANY + MEASURED + SOME)
            quiet = measure_trials(storage, "silent", MANY, MANY + MEASURED + SOME, "silent")
            alone = measure_optuna(storage)
            print(
                f"  {kind}: {few:.1f} with {SOME} queued, {queued:.1f} with {MANY} queued ({queued / few:.2f}x), "
                f"{finished:.1f} with {MANY} finished ({finished / few:.2f}x), "
                f"{quiet:.1f} without reports; Optuna alone {alone:.1f} "
                f"({few / alone:.2f}x); load {os.getloadavg()[0]:.1f}"
            )
            ratios |= {f"trial, {kind}: {MANY} queued / {SOME}": queued / few}
            ratios |= {f"trial, {kind}: {MANY} finished / {SOME} queued": finished / few}
            ratios |= {f"trial, {kind}: a search / Optuna alone": few / alone}
    finally:
        if server:
            server.remove()
    return ratios


def show_journals() -> dict[str, float]:
    """Old journals are names of one file, which so stays in memory: the disk does not count."""
    from lightning_glue.tracking.known_runs import unfinished_runs
    from lightning_glue.tracking.sync import sync_all

    root = Path("old").resolve()
    first = {status: root / f"{status.lower()}-0" for status in ("FINISHED", "KILLED")}
    for status, folder in first.items():
        write_journal(folder, RECORDS, status)
    size = (first["KILLED"] / "records").stat().st_size
    for number in range(1, JOURNALS // 2):
        for folder in first.values():
            copy = folder.with_name(folder.name.replace("-0", f"-{number}"))
            copy.mkdir()
            os.link(folder / "records", copy / "records")
            for name in ("delivery.json", "uploads.json"):
                (copy / name).write_bytes((folder / name).read_bytes())
    print(f"\n{JOURNALS} old journals of {RECORDS} records ({size / 1e6:.0f} MB each), half of them of finished runs")
    actions: dict[str, Callable[[], object]] = {
        "--resume auto": lambda: unfinished_runs(root, None, "scale", "digest"),
        "sync": lambda: sync_all(root, [], None),
        "sync again": lambda: sync_all(root, [], None),
    }
    for name, action in actions.items():
        begin, used = time.perf_counter(), time.process_time()
        action()
        seconds, wall = time.process_time() - used, time.perf_counter() - begin
        print(f"  {name}: {seconds:.1f} CPU s ({wall:.1f} s); load {os.getloadavg()[0]:.1f}", flush=True)
    left = sum((folder / "records").stat().st_size > size // 2 for folder in root.iterdir())
    print(f"  {left} of {JOURNALS} journals are still whole")
    return {"journals that are still whole / all": left / JOURNALS}


def main() -> None:
    parts = {"watcher": show_watcher, "trials": show_trials, "journals": show_journals}
    chosen = sys.argv[1:] or list(parts)
    os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    print(describe_machine())
    memory = Path("/dev/shm")  # so that a busy disk does not count
    where = memory if memory.is_dir() else None
    with tempfile.TemporaryDirectory(prefix="lightning-glue-", dir=where) as folder, chdir(folder):
        ratios: dict[str, float] = {}
        for name in chosen:
            ratios |= parts[name]()
    keep(ratios)


if __name__ == "__main__":
    main()
