"""The report over a real tracking store."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import mlflow
import numpy as np
import pytest
from helpers.big_store import add_runs, many_runs
from helpers.project import run
from hypothesis import given, settings
from hypothesis import strategies as st
from mlflow.entities import Dataset, DatasetInput, Metric, Param

from lightning_glue.config.identity import decides
from lightning_glue.config.schema import keys
from lightning_glue.tracking import comparison, energy, seed_noise, stored_runs
from lightning_glue.tracking.published import Published, published
from lightning_glue.tracking.report_text import Report, markdown, page

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


def test_published_scores_are_for_their_models_alone() -> None:
    assert published("RTE", "roberta.base", None, "glue") == Published("RoBERTa base", 0.787)
    assert published("RTE", "roberta.large", "MNLI", "glue") == Published("RoBERTa large from MNLI", 0.91)
    assert published("RTE", "roberta.large.mnli", None, "glue") == Published("RoBERTa large from MNLI", 0.91)
    assert published("CoLA", "roberta.large", None, "glue") == Published("RoBERTa large", 0.68)
    for other in [
        ("WNLI", "roberta.base", None, "glue"),
        ("RTE", "roberta.base", "MNLI", "glue"),
        ("RTE", "roberta.large", "", "glue"),
        ("CoLA", "roberta.large.mnli", None, "glue"),
        ("RTE", "minilm", None, "glue"),
        ("RTE", "roberta.base", None, "sample"),
    ]:
        assert published(*other) is None


@settings(deadline=None, max_examples=30)
@given(st.lists(st.floats(0, 1), min_size=2, max_size=9))
def test_seed_noise_is_an_interval_around_the_median(scores: list[float]) -> None:
    interval = seed_noise.median_interval(scores)
    assert interval is not None and min(scores) <= interval[0] <= np.median(scores) <= interval[1] <= max(scores)
    assert seed_noise.median_interval(scores[::-1]) == interval
    if len(scores) < 6:
        assert interval == (min(scores), max(scores))


def test_what_is_published_is_above_below_or_within_seed_noise() -> None:
    scores = [0.78, 0.79, 0.80, 0.80, 0.81]
    said = [seed_noise.verdict(scores, value) for value in (0.7, 0.7795, 0.787, 0.8105, 0.82)]
    assert [one.split()[0] for one in said] == ["above", "within", "within", "within", "below"]
    assert seed_noise.verdict([0.8], 0.7) == "cannot tell from one seed"


def test_a_seed_counts_once_and_what_is_in_common_is_said(tmp_path: Path, new_store: Callable[[Path], None]) -> None:
    new_store(tmp_path)
    shared = {"task.name": "RTE", "model.name": "roberta.base", "data.source": "glue", "optimizer.weight_decay": 0.1}
    runs = [
        {"id": f"{number:032x}", "params": shared | {"seed": seed, "optimizer.lr": 2e-5}, "data": {"dev": "d"},
         "tags": {"majority": "0.7", "lightning_glue.benchmark": "b", "mlflow.parentRunId": "p"}, "start": number,
         "metrics": {"best/dev/accuracy": value}}
        for number, (seed, value) in enumerate([(1, 0.99), (1, 0.60), (2, 0.61), (3, 0.62)], 1)
    ]  # fmt: skip
    add_runs(tmp_path / "mlflow.db", runs)
    store = STORE.format(tmp_path)
    (section,) = comparison.compare(stored_runs.fetch(mlflow.MlflowClient(store), store, None), store, task=None,
                                    trials=False)  # fmt: skip
    (group,) = section.groups
    assert (group.median, len(group.seeds), len(group.runs)) == (0.61, 3, 4)
    assert group.verdict == "below (0.6000 to 0.6200)"  # of 0.787
    assert section.notes == [
        "in common: weight_decay 0.1",
        "lr 2e-05: seed 1 has 2 runs; the newest counts",
        "RTE, lr 2e-05: dev/accuracy 0.6100 is no better than the majority class (0.7000)",
    ]


def test_thousands_of_runs_take_two_requests(
    tmp_path: Path, new_store: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    new_store(tmp_path)
    add_runs(tmp_path / "mlflow.db", many_runs(1000, params=0))
    store, asked = STORE.format(tmp_path), list[str]()
    client = mlflow.MlflowClient(store)
    inner = client._tracking_client.store
    for name in [name for name in dir(inner) if name.startswith(("get_", "search_"))]:
        call = getattr(inner, name)
        if callable(call):
            monkeypatch.setattr(
                inner, name, lambda *a, _name=name, _call=call, **k: asked.append(_name) or _call(*a, **k)
            )
    runs = stored_runs.fetch(client, store, None)
    report = Report("Runs", comparison.compare(runs, store, task=None, trials=False))
    assert [name for name in asked if name.startswith("search_")] == ["search_experiments", "search_runs"]
    assert not [name for name in asked if name.startswith("get_run")]
    assert sum(len(group.runs) for section in report.sections for group in section.groups) == 990
    assert "left out: 10 runs of another program" in stored_runs.foreign_note(runs)
    assert page(report).count("<tr>") == markdown(report).count("\n| roberta.base") + 4


def test_where_a_run_was_made_tells_no_recipes_apart() -> None:
    placed = [key for key in keys() if not decides(key)]
    assert "trainer.cuda_graphs" in placed
    assert [key for key in placed if not key.startswith(comparison._NOT_RECIPE)] == []


def test_energy_is_power_over_time() -> None:
    hour = 3_600_000
    assert energy.watt_hours([(0, 100.0), (hour, 300.0)], 0, hour) == 200
    assert energy.watt_hours([(hour // 2, 100.0)], 0, hour) == 100
    assert energy.watt_hours([(2 * hour, 100.0)], 0, hour) == 0
