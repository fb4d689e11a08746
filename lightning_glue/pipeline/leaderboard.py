"""The files of a leaderboard submission: which task and split each is of, and how many rows the official data has.

Names, header and labels are those of https://gluebenchmark.com/faq and of jiant's writer (jiant/scripts/benchmarks/
benchmarks.py), which ends lines with a carriage return and a line feed; ours end with a line feed. Both are accepted.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from lightning_glue.tasks import TASKS, Split, Task

HEADER = ("index", "prediction")
DECIMALS = 3  # of a score


@dataclass(frozen=True)
class LeaderboardFile:
    """Attributes: rows: of the official test file."""

    name: str
    task: Task
    split: Split
    rows: int

    @property
    def model_task(self) -> str:
        """The task whose model predicts the file."""
        return self.task.name if self.task.train else "MNLI"


_ROWS = {
    "CoLA.tsv": 1063,
    "SST-2.tsv": 1821,
    "MRPC.tsv": 1725,
    "STS-B.tsv": 1379,
    "QQP.tsv": 390965,
    "MNLI-m.tsv": 9796,
    "MNLI-mm.tsv": 9847,
    "QNLI.tsv": 5463,
    "RTE.tsv": 3000,
    "WNLI.tsv": 146,
    "AX.tsv": 1104,
}


def files_of(tasks: Iterable[Task]) -> dict[str, LeaderboardFile]:
    """By name; a task added to ``conf/task/`` has none."""
    return {
        name: LeaderboardFile(name, task, split, _ROWS[name])
        for task in tasks
        for split, name in zip(task.test, task.submission_files, strict=True)
        if name in _ROWS
    }


FILES = files_of(TASKS.values())
