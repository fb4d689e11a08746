"""``make ui`` on two real runs, seen through a real browser, at the addresses that their trainings print."""

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

pytestmark = [
    pytest.mark.torture,
    pytest.mark.skipif(browser.missing() is not None, reason=browser.missing() or ""),
]

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
def ui(
    cache: Path, bpe_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Chrome, str, str, list[str], dict[str, str]]]:
    """A browser, the address of the UI, the experiment's id, two runs of it, and what the second said to do next."""
    project = tmp_path_factory.mktemp("project")
    flags = ["--task", "WNLI", "--data", "sample", "--model", "tiny", "--gpus", "0", "trainer.max_epochs=2"]
    for seed in (1, 2):
        command = ["lightning_glue.train", *flags, f"seed={seed}", f"tracking.run_name=seed {seed}"]
        printed = run(*command, cwd=project, ROBERTA_BPE_DIR=str(bpe_dir)).stdout
    lines = printed.partition("next:\n")[2].splitlines()
    steps = {purpose.strip(): what.strip() for what, purpose in zip(lines[::2], lines[1::2])}
    store = mlflow.MlflowClient(f"sqlite:///{project / 'mlflow.db'}")
    experiment_id = store.get_experiment_by_name("glue-wnli-sample").experiment_id
    runs = [found.info.run_id for found in store.search_runs([experiment_id], order_by=["attributes.run_name"])]
    processes: list[int] = []
    with browser.make_ui(project, processes) as address, browser.chromium() as driver:
        assert len(processes) <= 3  # with MLflow's job runners and its usual workers there are some fifteen
        yield driver, address, experiment_id, runs, steps


def test_both_runs_are_listed_with_their_charts(ui: tuple) -> None:
    driver, address, experiment_id, runs, _ = ui
    assert len(runs) == 2
    driver.get(browser.charts(address, experiment_id))
    eventually(driver, lambda: {"seed 1", "seed 2", "dev/accuracy"} <= set(text(driver).split("\n")))
    eventually(driver, lambda: count(driver, ".js-plotly-plot .trace.scatter path.js-line") >= 2)


def test_the_printed_addresses_open_on_the_trainings(ui: tuple) -> None:
    """In a browser that has never been there: by itself MLflow opens a view in which there are none."""
    driver, address, _, _, steps = ui
    assert steps["compare runs"].startswith("http://127.0.0.1:5000/#/")
    driver.get(steps["compare runs"].replace("http://127.0.0.1:5000", address))
    eventually(driver, lambda: {"seed 1", "seed 2", "2 matching runs"} <= set(text(driver).split("\n")))
    driver.get(steps["this run"].replace("http://127.0.0.1:5000", address))
    eventually(driver, lambda: {"seed 2", "best/dev/accuracy", "task.name"} <= set(text(driver).split("\n")))


def test_two_runs_are_compared(ui: tuple) -> None:
    driver, address, experiment_id, runs, _ = ui
    driver.get(browser.comparison(address, experiment_id, runs))
    eventually(driver, lambda: "Comparing 2 Runs from 1 Experiment" in text(driver))
    eventually(driver, lambda: all(run_id in text(driver) for run_id in runs))
    eventually(driver, lambda: count(driver, ".js-plotly-plot") >= 1)
    eventually(driver, lambda: "best/dev/accuracy" in text(driver))


def test_the_confusion_matrix_is_shown(ui: tuple) -> None:
    driver, address, experiment_id, runs, _ = ui
    name = "dev_confusion_matrix.png"
    driver.get(f"{address}/#/experiments/{experiment_id}/runs/{runs[0]}/artifacts/figures/{name}")
    eventually(driver, lambda: driver.execute_script(_IMAGE, name) > 100)
