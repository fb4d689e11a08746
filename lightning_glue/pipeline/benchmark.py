"""A benchmark from its request to its report: reads from top to bottom."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_glue.execution.engines import Engine, count_gpus, open_engine
from lightning_glue.pipeline.benchmark_folder import LEDGER
from lightning_glue.pipeline.disk import (
    check_disk,
    check_starts,
    clear_checkpoints,
    tidy,
    work_folder,
)
from lightning_glue.pipeline.drivers import Driver as Worker
from lightning_glue.pipeline.drivers import at_work, claim, working
from lightning_glue.pipeline.graph import (
    ENSEMBLE,
    PREDICT,
    REPORT,
    SOUP,
    SUBMISSION,
    TRAIN,
    Graph,
    Node,
    make_graph,
    standing,
    train_name,
)
from lightning_glue.pipeline.ledger import Ledger
from lightning_glue.pipeline.request import Benchmark, Request, compose_benchmark, find_data, settle
from lightning_glue.utils.quick_imports import quick_imports
from lightning_glue.utils.redact import hide_secrets

if TYPE_CHECKING:
    from lightning_glue.execution.job import Job
    from lightning_glue.pipeline.board import Board
    from lightning_glue.pipeline.driver import Running
    from lightning_glue.pipeline.parent_run import ParentRun
    from lightning_glue.pipeline.teams import Team

_FILES = ("report.md", "report.html", "submission.zip")


@dataclass(frozen=True)
class Finished:
    """What came of a benchmark.

    Attributes:
        failed: jobs that did, with the reason.
        lost: jobs that are not done because of these.
        stopped_by: the signal that ended it, if one did.
    """

    benchmark: Benchmark
    failed: dict[str, str]
    lost: list[str]
    stopped_by: signal.Signals | None = None


def run(request: Request, *, shows: bool = True) -> Finished:
    """Do what is missing of a benchmark.

    Args:
        shows: what is done and what came out, on the terminal.

    Raises:
        UserError: a mistake in the request; data or disk are missing; another driver is at work.
    """
    with open_engine(request.engine, request.address) as engine:
        return _run(request, engine, shows)


def _run(request: Request, engine: Engine, shows: bool) -> Finished:
    benchmark = compose_benchmark(request, count_gpus(request.gpus, engine))
    roots = find_data(benchmark)
    benchmark.folder.mkdir(parents=True, exist_ok=True)
    with working(benchmark.folder, join=request.join) as (this, others):
        benchmark = settle(benchmark)
        ledger = Ledger(benchmark.folder / LEDGER, this.session, this.id)
        ledger.refresh()
        graph = plan(benchmark, ledger, roots)
        look_at_store(benchmark, graph, ledger, alone=not others)
        check_starts(graph, ledger, request.keep)
        left = standing(graph, ledger.done(graph), ledger.failed(graph)).open
        if left:
            return carry_on(benchmark, engine, graph, ledger, this, left, alone=not others, shows=shows)
        tidy(benchmark, graph, ledger)
        if not others:
            from lightning_glue.pipeline.parent_run import tell_finished

            tell_finished(benchmark)
        if shows:
            print(f"benchmark {benchmark.name}: nothing is missing ({len(graph)} jobs done), see {benchmark.folder}")
        return Finished(benchmark, {}, [])


def plan(benchmark: Benchmark, ledger: Ledger, roots: dict[str, Path]) -> Graph:
    """The jobs: of the tasks and seeds that are asked for, and of those that are there already."""
    from lightning_glue.pipeline.cost import training_cost

    costs = {task: training_cost(config, roots[task]) for task, config in benchmark.configs.items()}
    pairs = {(task, seed) for task in benchmark.tasks for seed in benchmark.seeds}
    stored = {(task, seed) for task in benchmark.stored["tasks"] for seed in benchmark.stored["seeds"]}
    there = {(task, seed) for task, seed in stored - pairs if ledger.entry(train_name(task, seed)).done}
    usual = min(costs.values())
    costs |= {task: usual for task, _ in there if task not in costs}
    return make_graph(pairs | there, benchmark.stored["transfer"], costs)


def look_at_store(benchmark: Benchmark, graph: Graph, ledger: Ledger, *, alone: bool) -> None:
    """Bring ledger and MLflow to one, and clear away what a driver left that was killed."""
    from lightning_glue.pipeline.parent_run import compare_with_store

    with claim(benchmark.folder, "store") as free:
        if not (alone and free):
            return
        trainings = [name for name, node in graph.items() if node.kind == TRAIN]
        gone = compare_with_store(benchmark, ledger, trainings)
        for name in {*gone, *ledger.done(graph)} & {*trainings}:
            clear_checkpoints(benchmark.folder, name, run=name in gone)


def carry_on(
    benchmark: Benchmark,
    engine: Engine,
    graph: Graph,
    ledger: Ledger,
    this: Worker,
    left: set[str],
    *,
    alone: bool,
    shows: bool,
) -> Finished:
    """Work on the jobs that are left."""
    from lightning_glue.model.fairseq_import import check_fairseq
    from lightning_glue.pipeline.teams import make_teams
    from lightning_glue.tracking.watcher import watch

    check_fairseq()  # else every training would say so
    teams = make_teams(benchmark, engine, shows=shows)
    slots = sum(team.suits == "one" for team in teams)
    said = check_disk(benchmark, graph, left, slots)
    if shows:
        where = hide_secrets(str(benchmark.uri or "MLflow's default store"))
        print(f"benchmark {benchmark.name} in {benchmark.folder}, runs in {where}: {len(left)} of {len(graph)} jobs "
              f"to do, {slots} at a time\n{said}", flush=True)  # fmt: skip
    watch()  # it gets ready meanwhile
    with quick_imports():
        from lightning_glue.pipeline.board import Board
        from lightning_glue.pipeline.driver import Driver
        from lightning_glue.pipeline.parent_run import ParentRun

    parent = ParentRun(benchmark, alone=alone)
    board = Board(benchmark.folder, graph, ledger, slots, shows=shows)
    driver = Driver(
        benchmark.folder, graph, ledger, teams, lambda node, team: make_job(benchmark, graph, ledger, node, team),
        _Observer(benchmark, ledger, board, parent), retries=benchmark.request.retries,
    )  # fmt: skip
    status = "FAILED"
    try:
        with board:
            driver.run()
        if not driver.stopped_by:
            with claim(benchmark.folder, "tidy") as free:
                if free:
                    tidy(benchmark, graph, ledger)
        failed = ledger.failed(graph)
        lost = standing(graph, ledger.done(graph), failed).lost
        status = _status(benchmark, driver.stopped_by, lost, this)
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        parent.close(status)
    if shows and not driver.stopped_by:
        print(f"\nbenchmark {benchmark.name}: {board.counts()}")
        for path in (benchmark.folder / name for name in _FILES):
            if path.is_file():
                print(f"  {path}")
    return Finished(benchmark, failed, [name for name in graph if name in lost - failed.keys()], driver.stopped_by)


def _status(benchmark: Benchmark, stopped: signal.Signals | None, lost: set[str], this: Worker) -> str:
    """Of the benchmark's run: RUNNING where other drivers go on."""
    if any(driver.id != this.id for driver in at_work(benchmark.folder)):
        return "RUNNING"
    return "KILLED" if stopped else "FAILED" if lost else "FINISHED"


def make_job(benchmark: Benchmark, graph: Graph, ledger: Ledger, node: Node, team: Team) -> Job:
    """What a worker is sent: the whole configuration of a training, or what follows from trainings that are done."""
    from lightning_glue.execution.job import Job
    from lightning_glue.pipeline.parent_run import JOB_TAG, as_parent
    from lightning_glue.tracking.stored_runs import BENCHMARK_TAG

    folder = benchmark.folder.resolve()
    config = dict(benchmark.configs.get(node.task, benchmark.any_config)) | team.settings
    if node.kind == TRAIN:
        config["seed"] = node.seed
        config["init_from"] = ledger.entry(node.needs[0]).run_id if node.needs else None
        config["tracking.run_name"] = f"{node.task} seed {node.seed}"
    tags = {BENCHMARK_TAG: benchmark.id, JOB_TAG: node.name}
    todo = {"kind": node.kind, **_todo(benchmark, graph, ledger, node, folder)}
    return Job(config, tags, str(work_folder(folder, node.name)), as_parent(benchmark.id), todo=todo)


def _todo(benchmark: Benchmark, graph: Graph, ledger: Ledger, node: Node, folder: Path) -> dict[str, Any]:
    done = ledger.done(graph)
    seeds = [graph[name].seed for name in node.after if graph[name].kind == PREDICT and name in done]
    runs = [ledger.entry(train_name(node.task, seed)) for seed in seeds]
    match node.kind:
        case "predict":
            return {"run": ledger.entry(node.needs[0]).run_id, "out": _outputs(folder, node, f"seed-{node.seed}")}
        case "ensemble":
            return {"outputs": str(folder / "outputs"), "seeds": seeds, "task": node.task}
        case "soup":
            left = [entry.run_id for entry in runs if not entry.dropped]
            return {"runs": left, "out": _outputs(folder, node, SOUP)}
        case "report":
            return {"benchmark": str(folder)}
        case "submission":
            several = any(one.kind == ENSEMBLE and one.name in done for one in graph.values())
            return {"benchmark": str(folder), "chosen": ENSEMBLE if several else f"seed:{benchmark.seeds[0]}"}
    return {}


def _outputs(folder: Path, node: Node, name: str) -> str:
    return str(folder / "outputs" / node.task / name)


class _Observer:
    """Passes on what the driver tells: to the terminal, to MLflow, to the disk."""

    def __init__(self, benchmark: Benchmark, ledger: Ledger, board: Board, parent: ParentRun) -> None:
        self.benchmark, self.ledger, self.board, self.parent = benchmark, ledger, board, parent

    def looked(self, running: list[Running]) -> None:
        self.board.update(running)

    def started(self, running: Running) -> None:
        self.board.started(running)

    def ended(self, running: Running, state: str, why: str) -> None:
        node, folder = running.node, self.benchmark.folder
        self.board.ended(running, state, why)
        if node.kind == TRAIN and state == "done":
            self.parent.trained(node.task, node.seed, running.outcome["metrics"])
            clear_checkpoints(folder, node.name)
        if node.kind == TRAIN and state == "failed" and not self.ledger.entry(node.name).run_id:
            clear_checkpoints(folder, node.name, run=True)
        if node.kind in (REPORT, SUBMISSION) and state == "done":
            self.parent.attach(folder / name for name in _FILES)
