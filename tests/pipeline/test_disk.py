"""What a benchmark needs of the disk, and what it gives back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import mlflow
import pytest

from lightning_glue.errors import UserError
from lightning_glue.pipeline.disk import (
    EXPORT_TAG,
    bytes_needed,
    check_disk,
    check_starts,
    chosen_seeds,
    superfluous,
    tidy,
    work_folder,
)
from lightning_glue.pipeline.graph import Graph, make_graph
from lightning_glue.pipeline.ledger import Ledger
from lightning_glue.pipeline.parent_run import JOB_TAG, compare_with_store
from lightning_glue.tracking.stored_runs import BENCHMARK_TAG

GRAPH = make_graph({(task, seed) for task in ("MNLI", "RTE") for seed in (1, 2, 3)}, True, {"MNLI": 9.0, "RTE": 1.0})
VALUES = {1: 0.5, 2: 0.9, 3: 0.7}


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "ledger.jsonl", "s1", "d1")


def finish(ledger: Ledger, graph: Graph = GRAPH, without: str = "no") -> None:
    for job, node in graph.items():
        if without not in job:
            name = "dev_matched/accuracy" if node.task == "MNLI" else "dev/accuracy"
            metrics = {name: VALUES.get(node.seed, 0.0)}
            ledger.append(job, "done", id=f"{job} 1", of=ledger.inputs(graph, job), run_id=f"r {job}", metrics=metrics)


@pytest.mark.parametrize(
    ("values", "best", "median"),
    [({1: 0.5, 2: 0.9, 3: 0.7}, 2, 3), ({1: 0.5, 2: 0.9}, 2, 1), ({3: 0.5, 2: 0.5}, 2, 2), ({4: 0.1}, 4, 4)],
)
def test_the_best_or_the_median_seed_stays(values: dict[int, float], best: int, median: int) -> None:
    assert chosen_seeds(values, "best") == {best} and chosen_seeds(values, "median") == {median}
    assert chosen_seeds(values, "all") == set(values) and not chosen_seeds({}, "best")


def test_models_go_once_everything_that_reads_them_is_done(ledger: Ledger) -> None:
    finish(ledger, without="report")
    assert not superfluous(GRAPH, ledger, "best")
    finish(ledger)
    names = [f"{task}/seed-{seed}/train" for task in ("MNLI", "RTE") for seed in (1, 3)]
    assert [node.name for node in superfluous(GRAPH, ledger, "best")] == names
    assert [node.seed for node in superfluous(GRAPH, ledger, "median")] == [1, 2, 1, 2]
    assert not superfluous(GRAPH, ledger, "all")


def test_a_model_stays_for_a_training_that_is_to_start_from_it(ledger: Ledger) -> None:
    """Though all that could be done is, and the report exists."""
    lost = ("RTE/seed-3/train", "RTE/seed-3/predict")
    for job in (job for job in GRAPH if job not in lost):
        metrics = {"dev_matched/accuracy": VALUES.get(GRAPH[job].seed, 0.0)}
        ledger.append(job, "done", id=job, of=ledger.inputs(GRAPH, job), run_id=job, metrics=metrics)
    assert "MNLI/seed-3/train" not in [node.name for node in superfluous(GRAPH, ledger, "best")]
    assert "MNLI/seed-1/train" in [node.name for node in superfluous(GRAPH, ledger, "best")]
    ledger.append("MNLI/seed-3/train", "dropped")
    with pytest.raises(UserError, match="RTE/seed-3/train starts from the model of MNLI/seed-3/train, which was del"):
        check_starts(GRAPH, ledger, "best")


def test_too_small_a_disk_is_said_before_anything_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert bytes_needed(100, 45, 4, remote=False) - bytes_needed(100, 45, 4, remote=True) == 4100
    config = {"model.source": "roberta.base", "model.architecture": {}}
    request = SimpleNamespace(keep="best")
    benchmark = SimpleNamespace(folder=tmp_path, any_config=config, uri=None, request=request)
    left = [job for job in GRAPH if job.endswith("train")]
    free = 1 << 40
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=free))
    said = check_disk(benchmark, GRAPH, left, 2)
    assert said.startswith(
        "disk: 6 trainings to do, 0.5 GiB of weights each, need up to 9.4 GiB, 0.9 GiB once the report exists"
    )
    free = 1 << 33
    with pytest.raises(UserError, match="8.0 GiB free; free space"):
        check_disk(benchmark, GRAPH, left, 2)


@pytest.fixture
def store(tmp_path: Path, new_store: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch):
    """A client, and a benchmark whose runs are in its store."""
    monkeypatch.chdir(tmp_path)
    new_store(tmp_path)
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    config = {"tracking.journal": str(tmp_path / "journal"), "tracking.register": False}
    benchmark = SimpleNamespace(
        id="b1", uri=uri, experiment="glue", folder=tmp_path, any_config=config, configs={"MNLI": config},
        request=SimpleNamespace(keep="best"), stored={"configs": {"RTE": {"optimizer.lr": 1e-3}}},
    )  # fmt: skip
    return mlflow.MlflowClient(uri), benchmark


def training(client: mlflow.MlflowClient, job: str, lr: str = "0.001", status: str = "FINISHED", init: str = "None"):
    """A run as a training of a benchmark leaves it, with an exported model; its id."""
    known = client.get_experiment_by_name("glue")
    experiment = known.experiment_id if known else client.create_experiment("glue")
    run = client.create_run(experiment, tags={BENCHMARK_TAG: "b1", JOB_TAG: job})
    params = {"task.name": job.split("/")[0], "optimizer.lr": lr, "init_from": init}
    for key, value in params.items():
        client.log_param(run.info.run_id, key, value)
    client.log_metric(run.info.run_id, "best/dev/accuracy", 0.5)
    export = Path(run.info.artifact_uri.removeprefix("file://")) / "fairseq"
    export.mkdir(parents=True)
    (export / "checkpoint_best.pt").touch()
    client.set_terminated(run.info.run_id, status)
    return run.info.run_id, export


def test_what_mlflow_has_is_done_and_what_it_has_lost_is_not(store, ledger: Ledger, caplog) -> None:
    client, benchmark = store
    jobs = [f"RTE/seed-{seed}/train" for seed in (1, 2, 3, 4)] + ["RTE/seed-5/train"]
    first, _ = training(client, jobs[0])
    training(client, jobs[1], lr="0.5")  # of another configuration
    training(client, jobs[2], status="KILLED")
    ledger.append(jobs[3], "done", id="x", of={}, run_id="0" * 32, metrics={})
    (work_folder(ledger.path.parent, jobs[4])).mkdir(parents=True)
    (work_folder(ledger.path.parent, jobs[4]) / "run").write_text("1" * 32)
    assert compare_with_store(benchmark, ledger, jobs) == set(jobs[3:])
    assert [bool(ledger.entry(job).done) for job in jobs] == [True, False, False, False, False]
    assert ledger.entry(jobs[0]).run_id == first and ledger.metrics(jobs[0]) == {"dev/accuracy": 0.5}
    assert f"{jobs[3]} is trained again: MLflow has lost its run" in caplog.text
    client.delete_run(first)
    assert jobs[0] in compare_with_store(benchmark, ledger, jobs) and not ledger.entry(jobs[0]).done


def test_a_training_whose_model_was_deleted_is_done_if_its_outputs_are_there(store, ledger: Ledger) -> None:
    client, benchmark = store
    job = "RTE/seed-1/train"
    run_id, _ = training(client, job)
    client.set_tag(run_id, EXPORT_TAG, "deleted, keep=best")
    compare_with_store(benchmark, ledger, [job])
    assert not ledger.entry(job).done
    (ledger.path.parent / "outputs" / "RTE" / "seed-1").mkdir(parents=True)
    (ledger.path.parent / "outputs" / "RTE" / "seed-1" / "dev.npz").touch()
    compare_with_store(benchmark, ledger, [job])
    graph = make_graph({("RTE", 1)}, False, {"RTE": 1.0})
    assert ledger.done(graph) == {job, "RTE/seed-1/predict"} and ledger.entry(job).dropped


def test_what_is_not_kept_is_deleted_and_the_run_says_so(store, ledger: Ledger, caplog) -> None:
    client, benchmark = store
    graph = make_graph({("RTE", 1), ("RTE", 2)}, False, {"RTE": 1.0})
    runs = {seed: training(client, f"RTE/seed-{seed}/train") for seed in (1, 2)}
    for job, node in graph.items():
        metrics = {"dev/accuracy": VALUES.get(node.seed, 0.0)}
        run_id = runs[node.seed][0] if node.seed else ""
        ledger.append(job, "done", id=job, of=ledger.inputs(graph, job), run_id=run_id, metrics=metrics)
    tidy(benchmark, graph, ledger)
    assert (runs[1][1].exists(), runs[2][1].exists()) == (False, True)
    assert client.get_run(runs[1][0]).data.tags[EXPORT_TAG] == "deleted, keep=best"
    assert EXPORT_TAG not in client.get_run(runs[2][0]).data.tags
    assert ledger.entry("RTE/seed-1/train").dropped
    size = ledger.path.stat().st_size
    tidy(benchmark, graph, ledger)
    assert ledger.path.stat().st_size == size and not caplog.text
