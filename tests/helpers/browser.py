"""The MLflow UI in a real headless Chromium; as a script, the README's picture of two runs side by side.

python tests/helpers/browser.py PROJECT EXPERIMENT PICTURE.png     # PROJECT holds mlflow.db and mlruns/
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

_SWITCHES = "--headless=new --no-sandbox --disable-gpu --disable-quic --disable-dev-shm-usage --no-first-run"
_SWITCHES += " --disable-background-networking --disable-component-update --disable-sync --hide-scrollbars"


def missing() -> str | None:
    """Why no browser can be started here, or None."""
    absent = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
    return f"{' and '.join(absent)} not found (Debian: apt-get install chromium chromium-driver)" if absent else None


@contextmanager
def chromium(width: int = 1400, height: int = 1500) -> Iterator[Chrome]:
    """A headless Chromium with a profile of its own."""
    from selenium import webdriver

    with tempfile.TemporaryDirectory(prefix="lightning-glue-browser-", ignore_cleanup_errors=True) as profile:
        options = webdriver.ChromeOptions()
        options.binary_location = shutil.which("chromium")
        for switch in [*_SWITCHES.split(), f"--user-data-dir={profile}", f"--window-size={width},{height}"]:
            options.add_argument(switch)
        driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
        try:
            yield driver
        finally:
            driver.quit()


@contextmanager
def make_ui(project: Path, processes: list[int] | None = None) -> Iterator[str]:
    """``make ui`` in a project folder, on a free port; yields its address.

    Args:
        processes: gets the ids of the server's processes.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    makefile = Path(__file__).resolve().parents[2] / "Makefile"
    programs = [f"BIN={Path(sys.executable).parent}", "-o", ".venv/.installed"]  # those of this Python
    command = ["make", "-f", str(makefile), *programs, "ui", f"ARGS=--port {port}"]
    with tempfile.TemporaryFile() as log:
        server = subprocess.Popen(command, cwd=project, stdout=log, stderr=log, start_new_session=True)
        try:
            for _ in range(300):
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1)
                    break
                except (urllib.error.URLError, OSError):
                    time.sleep(0.2)
            else:
                log.seek(0)
                raise RuntimeError(log.read().decode())
            if processes is not None:
                processes += [one.pid for one in psutil.Process(server.pid).children(recursive=True)]
            yield f"http://127.0.0.1:{port}"
            os.killpg(server.pid, signal.SIGINT)  # as Ctrl-C does
            server.wait(timeout=30)
            log.seek(0)
            assert "Traceback" not in (said := log.read().decode()), said
        finally:
            with suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGTERM)
            server.wait()


def comparison(address: str, experiment_id: str, runs: list[str]) -> str:
    """Address of the UI's page that compares runs."""
    return f"{address}/#/compare-runs?runs={json.dumps(runs)}&experiments={json.dumps([experiment_id])}"


def charts(address: str, experiment_id: str) -> str:
    """Address of the UI's page that draws every metric of an experiment's runs."""
    return f"{address}/#/experiments/{experiment_id}/runs?compareRunsMode=CHART"


def tidy(driver: Chrome) -> None:
    """Close the UI's assistant, which takes a quarter of the page, and hide the charts' tool bars."""
    from selenium.webdriver.common.by import By

    for button in driver.find_elements(By.CSS_SELECTOR, "button[aria-label='Close']"):
        button.click()
    driver.execute_script("document.head.insertAdjacentHTML('beforeend', '<style>.modebar{display:none}</style>')")


def main() -> None:
    import mlflow
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.wait import WebDriverWait

    project, name, picture = Path(sys.argv[1]).resolve(), sys.argv[2], Path(sys.argv[3])
    store = mlflow.MlflowClient(f"sqlite:///{project / 'mlflow.db'}")
    with make_ui(project) as address, chromium() as driver:
        driver.get(charts(address, store.get_experiment_by_name(name).experiment_id))
        drawn = lambda browser: len(browser.find_elements(By.CSS_SELECTOR, ".js-plotly-plot .trace.scatter")) >= 6
        WebDriverWait(driver, 120).until(drawn)
        tidy(driver)
        time.sleep(3)  # the charts take the room that the assistant had
        driver.save_screenshot(str(picture))


if __name__ == "__main__":
    main()
