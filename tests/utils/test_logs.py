"""The one logger: where it writes, what it says, and who may speak."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from lightning_glue.utils import console
from lightning_glue.utils.console import ProgressLines, no_bars, progress_bar

SAYS = """
import logging
{before}
from lightning_glue.utils.logs import log
log.info("plain")
logging.getLogger("lightning_glue.data.download").warning("of %s", "postgresql://ann:s3cret@db/runs")
"""


def said(before: str = "", **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", SAYS.format(before=before)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment},
    )
    assert (result.returncode, result.stdout) == (0, ""), result.stderr
    return result.stderr


def test_a_line_each_on_stderr_without_passwords() -> None:
    assert said() == "plain\nwarning: of postgresql://ann:***@db/runs\n"


def test_process_0_alone_speaks() -> None:
    assert said(LOCAL_RANK="1", WORLD_SIZE="2") == ""


def test_it_is_silenced_and_redirected_as_any_logger() -> None:
    assert said("logging.getLogger('lightning_glue').setLevel(logging.ERROR)") == ""
    root = "logging.basicConfig(format='%(levelname)s %(message)s', level=logging.INFO)"
    assert said(root).splitlines()[0] == "INFO plain"
    assert said(root).count("plain") == 1


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Lines of progress with no time between them."""
    monkeypatch.setattr(ProgressLines.__init__, "__defaults__", (0.0,))
    yield


def test_progress_is_lines_where_stderr_is_no_terminal(at_once: None, capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar("tokenize RTE", 2000, "sentences") as advance:
        advance(500)
        advance(500)
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("tokenize RTE: 1,000 sentences of 2,000 sentences, ")
    assert "sentences/s, 00:00:00 left" in lines[-1]


def test_lines_of_progress_come_a_minute_apart(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar("tokenize RTE", 2000, "sentences") as advance:
        for _ in range(2000):
            advance(1)
    assert console.LINE_SECONDS == 60
    assert capsys.readouterr().err == ""


def test_a_rate_counts_only_what_was_done_now(at_once: None, capsys: pytest.CaptureFixture[str]) -> None:
    lines = ProgressLines("the file", lambda size: f"{size:.0f} MB")
    lines.update(600, 650)
    lines.update(600, None)
    first, second = capsys.readouterr().err.splitlines()
    assert first == "the file: 600 MB of 650 MB, 0 MB/s" and second == "the file: 600 MB, 0 MB/s"


def test_bars_can_be_forbidden_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert console.draws_bars()
    with no_bars():
        assert not console.draws_bars()
    assert console.draws_bars()
