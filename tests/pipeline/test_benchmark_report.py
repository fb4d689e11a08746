"""The report of a benchmark, from real runs and from outputs alone, and in a real browser."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import mlflow
import numpy as np
import pytest
from helpers import browser
from helpers.big_store import Row, add_runs

from lightning_glue.errors import UserError
from lightning_glue.pipeline.benchmark_folder import read_benchmark
from lightning_glue.pipeline.benchmark_report import make_report, write_report
from lightning_glue.pipeline.outputs import Outputs, write_outputs
from lightning_glue.tracking.report_text import markdown

from .conftest import Trained, write_benchmark


def rows(text: str) -> dict[str, dict[str, str]]:
    """Of a Markdown report's first table, by task; of a single one by model."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    end = next((i for i, row in enumerate(cells[1:], 1) if row[0] == ""), len(cells))
    return {row[0]: dict(zip(cells[0], row)) for row in cells[2:end]}


def made_up(task: str, seed: int, score: float, **more: object) -> Row:
    params = {"task.name": task, "model.name": "roberta.base", "model.source": "roberta.base", "seed": seed,
              "data.source": "glue", "optimizer.lr": 2e-5, "optimizer.weight_decay": 0.1}  # fmt: skip
    tags = {"lightning_glue.benchmark": "b0", "mlflow.parentRunId": "x", "majority": "0.5", "resolved.gpus": "1"}
    metric = {"STS-B": "dev/pearson"}.get(task, "dev/accuracy")
    return {"id": f"{task}{seed}".encode().hex().ljust(32, "0"), "params": params, "tags": tags, "start": 10**12 + seed,
            "metrics": {f"best/{metric}": score}, "data": {"dev": "d"}, **more}  # fmt: skip


@pytest.fixture
def benchmark(new_store: Callable[[Path], None], tmp_path: Path) -> Path:
    """RTE above and MRPC below what is published, one seed of SST-2, STS-B on a dev set that is not whole."""
    new_store(tmp_path)
    runs = [made_up("RTE", seed, value, minutes=30) for seed, value in enumerate((0.80, 0.81, 0.82), 1)]
    runs += [made_up("MRPC", seed, value, rows=408) for seed, value in enumerate((0.85, 0.86, 0.902), 1)]
    runs += [made_up("SST-2", 1, 0.4, rows=872), made_up("STS-B", 1, 0.9, rows=100), made_up("STS-B", 2, 0.9, rows=100)]
    for run in runs[:3]:
        run["metrics"] |= {f"system/gpu_{i}_power_usage_watts": 1.0 for i in (0, 1)}
    add_runs(tmp_path / "mlflow.db", [*runs, made_up("RTE", 4, 0.99, status="KILLED"), made_up("RTE", 9, 0.1, tags={})])
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    for run in runs[:3]:
        client.log_metric(run["id"], "system/gpu_1_power_usage_watts", 100.0, timestamp=run["start"] + 1000)
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    folder = write_benchmark(tmp_path / "b", ["RTE", "MRPC", "SST-2", "STS-B", "CoLA"], [1, 2, 3], uri=uri, data="glue")
    event = {"time": 1, "job": "CoLA/seed-1/train", "state": "failed", "message": "cannot reach http://u:secret@host"}
    (folder / "ledger.jsonl").write_text(json.dumps(event) + '\n{"torn')
    targets = np.array([0, 1, 1, 0])
    for member in ("ensemble", "soup"):
        write_outputs(Outputs("RTE", "dev", np.eye(2, dtype=np.float32)[targets], targets, None),
                      folder / "outputs" / "RTE" / member)  # fmt: skip
    return folder


def test_each_task_has_a_row_with_what_is_known_of_it(benchmark: Path) -> None:
    written = write_report(benchmark)
    assert written == [benchmark / "report.md", benchmark / "report.html"]
    text = written[0].read_text()
    found = rows(text)
    assert list(found) == ["SST-2", "MRPC", "STS-B", "RTE"]  # in the leaderboard's order
    rte = found["RTE"]
    assert (rte["median"], rte["spread"], rte["seeds"], rte["best"]) == ("0.8100", "0.8000 to 0.8200", "3", "0.8200")
    assert (rte["published"], rte["seed noise"]) == ("0.787", "above (0.8000 to 0.8200)")
    assert (rte["ensemble"], rte["soup"], rte["majority"]) == ("1.0000", "1.0000", "0.5000")
    assert (rte["device min"], rte["energy Wh"]) == ("90.0", "150.0")  # 100 W of its own GPU for 1.5 h
    assert found["MRPC"]["seed noise"] == "within (0.8500 to 0.9020)"
    assert found["SST-2"]["seed noise"] == "cannot tell from one seed"
    assert (found["STS-B"]["published"], found["STS-B"]["energy Wh"]) == ("-", "-")
    assert "dev/accuracy 0.4000 is no better than the majority class (0.5000)" in text
    assert "in common: weight_decay 0.1" in text
    assert "- failed: CoLA/seed-1/train, cannot reach http://u:***@host\n" in text and "secret" not in text
    assert "0.9900" not in text and "0.1000" not in text


@pytest.mark.torture
def test_real_runs_and_a_store_that_is_away(trained: Trained, tmp_path: Path) -> None:
    folder = write_benchmark(tmp_path / "b", ["RTE"], [1, 2], uri=trained.uri)
    client = mlflow.MlflowClient(trained.uri)
    events = []
    for seed, run in enumerate(trained.rte, 1):
        client.set_tag(run.id, "lightning_glue.benchmark", "b0")
        events.append(
            {
                "time": 1,
                "job": f"RTE/seed-{seed}/train",
                "state": "done",
                "id": run.id,
                "of": {},
                "run_id": run.id,
                "seconds": 6,
            }
        )
        targets = np.array([0, 1])
        said = np.eye(2, dtype=np.float32)[[0, seed - 1]]
        write_outputs(Outputs("RTE", "dev", said, targets, None), folder / "outputs" / "RTE" / f"seed-{seed}")
    (folder / "ledger.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    real = rows(markdown(make_report(read_benchmark(folder))))["tiny"]
    values = [run.metrics["dev/accuracy"] for run in trained.rte]
    assert real["median"] == f"{np.median(values):.4f}" and real["seeds"] == "2" and "published" not in real
    level = json.loads(client.get_run(trained.rte[0].id).data.tags["majority"])
    assert real["majority"] == f"{level:.4f}" and 0.5 <= level < 0.6
    away = markdown(make_report(read_benchmark(folder), "sqlite:////nowhere/mlflow.db"))
    assert "- without MLflow, so without costs and links: no runs: sqlite:////nowhere/mlflow.db does not exist" in away
    assert (rows(away)["tiny"]["median"], rows(away)["tiny"]["device min"]) == ("0.7500", "0.2")


def test_there_is_no_report_of_nothing(new_store: Callable[[Path], None], tmp_path: Path) -> None:
    new_store(tmp_path)
    folder = write_benchmark(tmp_path / "b", ["RTE"], [1], uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    with pytest.raises(UserError, match="no training of it is finished"):
        write_report(folder)
    for damage in ("{", "[]", '{"tasks": ["RTE"], "seeds": []}'):
        (folder / "benchmark.json").write_text(damage)
        with pytest.raises(UserError, match="is no description of a benchmark"):
            write_report(folder)
    shutil.rmtree(folder)
    with pytest.raises(UserError, match="is no folder of a benchmark"):
        write_report(folder)


@pytest.mark.skipif(browser.missing() is not None, reason=str(browser.missing()))
def test_the_page_is_drawn_by_a_browser_and_asks_nobody(benchmark: Path) -> None:
    from selenium.webdriver.common.by import By

    page = write_report(benchmark)[1]
    with browser.chromium() as driver:
        backs = []
        for mode in ("light", "dark"):
            feature = [{"name": "prefers-color-scheme", "value": mode}]
            driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": feature})
            driver.get(page.as_uri())
            backs.append(driver.find_element(By.TAG_NAME, "body").value_of_css_property("background-color"))
        assert backs[0] != backs[1]
        dots = driver.find_elements(By.CSS_SELECTOR, "svg.seeds circle")
        assert len(dots) == 3 + 3 + 1 + 2 and all(dot.size["width"] > 5 for dot in dots)
        assert len(driver.find_elements(By.CSS_SELECTOR, "svg.seeds line.published")) == 3
        loaded = driver.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
        assert loaded == []
        wide = driver.execute_script("return document.documentElement.scrollWidth - window.innerWidth")
        assert wide <= 0
