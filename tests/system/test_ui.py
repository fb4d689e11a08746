"""Plain ``mlflow ui`` on two real runs, seen through a real browser."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import mlflow
import pytest
from helpers import browser
from helpers.project import run

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

pytestmark = pytest.mark.skipif(browser.missing() is not None, reason=browser.missing() or "")

_IMAGE = "return [...document.images].filter(i => i.alt.includes(arguments[0])).map(i => i.naturalWidth)[0] || 0"


def eventually(driver: Chrome, condition: Callable[[], object]) -> None:
    from selenium.common.exceptions import StaleElementReferenceException
    from selenium.webdriver.support.wait import WebDriverWait

    WebDriverWait(driver, 90, ignored_exceptions=[StaleElementReferenceException]).until(lambda _: condition())


def text(driver: Chrome) -> str:
    return driver.execute_script("return document.body.innerText")


def count(driver: Chrome, selector: str) -> int:
    return driver.execute_script("return document.querySelectorAll(arguments[0]).length", selector)


@pytest.fixture(scope="module")
def ui(cache: Path, bpe_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Chrome, str, str, list]]:
    """A browser, the address of the UI, the experiment's id, and two runs of it."""
    project = tmp_path_factory.mktemp("project")
    flags = ["--task", "WNLI", "--data", "sample", "--model", "tiny", "--gpus", "0", "trainer.max_epochs=2"]
    for seed in (1, 2):
        command = ["lightning_glue.train", *flags, f"seed={seed}", f"tracking.run_name=seed {seed}"]
        run(*command, cwd=project, ROBERTA_BPE_DIR=str(bpe_dir))
    store = mlflow.MlflowClient(f"sqlite:///{project / 'mlflow.db'}")
    experiment_id = store.get_experiment_by_name("glue-wnli").experiment_id
    runs = [found.info.run_id for found in store.search_runs([experiment_id], order_by=["attributes.run_name"])]
    with browser.mlflow_ui(project) as address, browser.chromium() as driver:
        yield driver, address, experiment_id, runs


def test_both_runs_are_listed_with_their_charts(ui: tuple) -> None:
    driver, address, experiment_id, runs = ui
    assert len(runs) == 2
    driver.get(browser.charts(address, experiment_id))
    eventually(driver, lambda: {"seed 1", "seed 2", "dev/accuracy"} <= set(text(driver).split("\n")))
    eventually(driver, lambda: count(driver, ".js-plotly-plot .trace.scatter path.js-line") >= 2)


def test_two_runs_are_compared(ui: tuple) -> None:
    driver, address, experiment_id, runs = ui
    driver.get(browser.comparison(address, experiment_id, runs))
    eventually(driver, lambda: "Comparing 2 Runs from 1 Experiment" in text(driver))
    eventually(driver, lambda: all(run_id in text(driver) for run_id in runs))
    eventually(driver, lambda: count(driver, ".js-plotly-plot") >= 1)
    eventually(driver, lambda: "best/dev/accuracy" in text(driver))


def test_the_confusion_matrix_is_shown(ui: tuple) -> None:
    driver, address, experiment_id, runs = ui
    name = "dev_confusion_matrix.png"
    driver.get(f"{address}/#/experiments/{experiment_id}/runs/{runs[0]}/artifacts/figures/{name}")
    eventually(driver, lambda: driver.execute_script(_IMAGE, name) > 100)
