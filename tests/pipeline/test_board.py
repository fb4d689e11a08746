"""What is said of the jobs at work."""

from __future__ import annotations

import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lightning_glue.execution.place import Place
from lightning_glue.pipeline.board import Board
from lightning_glue.pipeline.disk import work_folder
from lightning_glue.pipeline.graph import TRAIN
from lightning_glue.pipeline.progress import Progress, write_progress

NAME = "RTE/seed-1/train"


def running(folder: Path, since: float, kind: str = TRAIN) -> Any:
    group = SimpleNamespace(
        place=Place(0, 1, (), 1), log=folder / "worker-0.log", processes=[SimpleNamespace(pid=4711)]
    )
    node = SimpleNamespace(name=NAME, kind=kind, task="RTE", cost=1.0)
    return SimpleNamespace(node=node, team=SimpleNamespace(name="0", group=group), since=since)


@pytest.mark.parametrize(
    ("kind", "begun", "step", "word", "said"),
    [
        (TRAIN, 1000, None, None, True),
        (TRAIN, 1000, 950, 940, True),
        (TRAIN, 1000, 950, 5, False),  # the log has grown
        (TRAIN, 1000, 5, 950, False),  # a step was done
        (TRAIN, 800, None, None, False),
        ("report", 1000, None, None, False),
    ],
)
def test_a_training_that_may_hang_is_told_once(
    kind: str, begun: float, step: float | None, word: float | None, said: bool, tmp_path: Path, capsys: Any
) -> None:
    now = time.time()
    job = running(tmp_path, now - begun, kind)
    if step is not None:
        work_folder(tmp_path, NAME).mkdir(parents=True)
        write_progress(work_folder(tmp_path, NAME), Progress(3, 9, 5.0, None, now - step))
    if word is not None:
        job.team.group.log.write_text("a word")
        os.utime(job.team.group.log, (now - word, now - word))
    board = Board(tmp_path, {}, SimpleNamespace(), 1)  # type: ignore[arg-type]
    for _ in range(2):
        board.update([job])
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == said
    if said:
        assert lines[0].startswith(f"{NAME} on slot 0 gives no sign of life for 0:1")
        assert "kill -9 4711, and it is tried again from its checkpoint" in lines[0]
