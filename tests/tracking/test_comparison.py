"""The report over a real tracking store."""

from __future__ import annotations

from pathlib import Path

import mlflow
import pytest
from helpers.project import run
from mlflow.entities import Dataset, DatasetInput, Metric, Param

from lightning_glue.tracking import comparison, stored_runs

STORE = "sqlite:///{}/mlflow.db"


def add(
    folder: Path, lr: float, seed: int, value: float, *, dev: str = "d1", status: str = "FINISHED", parent: str = ""
) -> str:
    """One run of RTE that took two minutes on two processes."""
    client = mlflow.MlflowClient(STORE.format(folder))
    found = client.get_experiment_by_name("glue-rte")
    experiment_id = found.experiment_id if found else client.create_experiment("glue-rte")
    tags = {"mlflow.parentRunId": parent} if parent else {}
    run_id = client.create_run(experiment_id, start_time=1000, tags=tags).info.run_id
    params = {"task.name": "RTE", "model.name": "minilm", "optimizer.lr": lr, "data.batch_size": 16, "seed": seed}
    params |= {"trainer.gpus": "0", "trainer.procs": 2, "tracking.run_name": f"{lr} {seed}"}
    stored = [Param(key, str(value)) for key, value in params.items()]
    client.log_batch(run_id, metrics=[Metric("best/dev/accuracy", value, 0, 1)], params=stored)
    inputs = [DatasetInput(Dataset(f"RTE/{split}", digest, "local", "{}")) for split, digest in {"dev": dev}.items()]
    client.log_inputs(run_id, datasets=inputs)
    client.set_terminated(run_id, status, end_time=121_000)
    return run_id


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Three seeds of one learning rate, one of another, a trial, a killed run; and the best run's id."""
    folder = tmp_path_factory.mktemp("report")
    add(folder, 1e-5, 1, 0.70)
    best = add(folder, 1e-5, 2, 0.76)
    parent = add(folder, 1e-5, 3, 0.72)
    add(folder, 3e-5, 1, 0.74)
    add(folder, 9e-5, 1, 0.99, parent=parent)
    add(folder, 1e-5, 4, 0.98, status="KILLED")
    study = add(folder, 5e-5, 1, 0.99)  # the run of a search has the best value of its trials
    mlflow.MlflowClient(STORE.format(folder)).log_param(study, "tune.trials", 20)
    return folder, best


def rows(output: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in output.splitlines() if "minilm" in line]


def test_seeds_are_one_row_with_median_spread_and_cost(project: tuple[Path, str]) -> None:
    folder, best = project
    output = run("lightning_glue.report", cwd=folder).stdout
    first, second = rows(output)
    assert first[1:3] == ["lr 3e-05, batch 16", "dev/accuracy"]
    assert first[3:8] == ["0.7400", "-", "0.7400", "1", "4.0"]
    assert second[3:] == ["0.7200", "0.7000 to 0.7600", "0.7600", "3", "12.0", best]
    assert "1 KILLED not scored" in output
    assert "0.98" not in output and "0.99" not in output


def test_trials_are_shown_on_demand(project: tuple[Path, str]) -> None:
    assert rows(run("lightning_glue.report", "--trials", cwd=project[0]).stdout)[0][3] == "0.9900"


def test_runs_come_in_pages(project: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored_runs, "_PAGE", 4)
    uri = STORE.format(project[0])
    found = [entry.info.run_id for entry in stored_runs.fetch(mlflow.MlflowClient(uri), uri, None)]
    assert len(found) == len(set(found)) == 7


def test_files_need_no_network(project: tuple[Path, str], tmp_path: Path) -> None:
    run("lightning_glue.report", "--task", "RTE", "--out", str(tmp_path / "out"), cwd=project[0])
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<td>0.7000 to 0.7600</td>" in page
    assert "http" not in page and "<script" not in page
    assert rows((tmp_path / "out" / "report.md").read_text())[1][3] == "0.7200"


def test_scores_on_other_data_are_kept_apart(tmp_path: Path) -> None:
    add(tmp_path, 1e-5, 1, 0.7, dev="d1")
    add(tmp_path, 1e-5, 2, 0.9, dev="d2")
    output = run("lightning_glue.report", cwd=tmp_path).stdout
    assert sorted(row[3] for row in rows(output)) == ["0.7000", "0.9000"]
    assert "not comparable with RTE, data 1: dev d" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--experiment", "glue-rt"], "did you mean 'glue-rte'?"),
        (["--task", "rte"], "did you mean 'RTE'?"),
        (["--task", "MNLI"], "no runs of MNLI at sqlite:///"),
        (["--uri", "sqlite:////nowhere/mlflow.db"], "sqlite:////nowhere/mlflow.db does not exist"),
        (["--uri", "http://127.0.0.1:9"], "MLflow at http://127.0.0.1:9 cannot be read"),
    ],
)
def test_mistakes_are_one_line(project: tuple[Path, str], arguments: list[str], message: str) -> None:
    result = run("lightning_glue.report", *arguments, cwd=project[0], check=False, MLFLOW_HTTP_REQUEST_MAX_RETRIES="0")
    assert result.returncode == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_runs_of_other_programs_are_passed_over(tmp_path: Path) -> None:
    add(tmp_path, 1e-5, 1, 0.70)
    client = mlflow.MlflowClient(STORE.format(tmp_path))
    for number, params in enumerate(
        (
            {"task.name": "translation"},
            {"task.name": "AX", "model.name": "x"},
            {"task.name": "RTE"},
            {"task.name": "RTE", "model.name": "mini", "trainer.gpus": "-1", "trainer.procs": "all"},
            {"task.name": ""},
            {},
        )
    ):
        found = client.create_run(client.create_experiment(f"foreign {number}"), start_time=1000)
        metrics = [Metric("best/dev/accuracy", 0.9, 0, 1)]
        client.log_batch(found.info.run_id, metrics, [Param(key, value) for key, value in params.items()])
        client.set_terminated(found.info.run_id, "FINISHED", end_time=121_000)
    store = STORE.format(tmp_path)
    sections = comparison.compare(stored_runs.fetch(client, store, None), store, task=None, trials=False)
    assert [(section.title, len(section.groups)) for section in sections] == [("RTE, data 1", 1), ("RTE, data 2", 1)]
    assert {run.params["model.name"] for section in sections for group in section.groups for run in group.runs} == {
        "minilm", "mini"
    }  # fmt: skip
    assert "left out: 5 runs of another program, such as " in stored_runs.foreign_note(
        stored_runs.fetch(client, store, None)
    )
