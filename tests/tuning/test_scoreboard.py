"""What a study shows on the terminal."""

from __future__ import annotations

import io
from datetime import datetime, timedelta

import optuna
import pytest
from optuna.distributions import FloatDistribution
from optuna.trial import FrozenTrial, TrialState
from rich.console import Console

from lightning_glue.tuning.controller import Running
from lightning_glue.tuning.scoreboard import Scoreboard, describe, seconds_left, short


def trial(
    number: int, state: TrialState, value: float | None = None, seconds: float = 60, **attrs: object
) -> FrozenTrial:
    made = optuna.trial.create_trial(
        state=state, value=value, params={"optimizer.lr": 2e-5}, user_attrs=attrs,
        distributions={"optimizer.lr": FloatDistribution(1e-6, 1e-3)},
    )  # fmt: skip
    made.number = number
    made.datetime_start = datetime.now() - timedelta(seconds=seconds)
    made.datetime_complete = datetime.now() if state.is_finished() else None
    return made


@pytest.fixture
def trials() -> list[FrozenTrial]:  # made for each test: running ones count from now
    return [
        trial(0, TrialState.COMPLETE, 0.7),
        trial(1, TrialState.COMPLETE, 0.9),
        trial(2, TrialState.PRUNED, 0.5, collapsed=1),
        trial(3, TrialState.FAIL, reason="process 0 was ended by SIGKILL"),
        trial(4, TrialState.RUNNING, seconds=15),
        trial(5, TrialState.RUNNING, seconds=30),
        trial(6, TrialState.WAITING),
    ]


def test_time_left_counts_what_runs_and_what_waits(trials: list[FrozenTrial]) -> None:
    assert seconds_left(trials, groups=2) == pytest.approx((45 + 30 + 60) / 2, abs=2)
    assert seconds_left(trials[3:], groups=2) is None


def test_the_table_counts_every_state_and_names_the_best(trials: list[FrozenTrial]) -> None:
    board = Scoreboard("dev/accuracy", groups=2)
    running = Running(4, 4, {"optimizer.lr": 2e-5, "data.batch_size": 16}, 4, last=(2, 0.81234))
    out = io.StringIO()
    Console(file=out, width=200).print(board._table(trials, [running]))
    row = next(line for line in out.getvalue().splitlines() if "trial 1" in line)
    cells = [cell.strip() for cell in row.strip("│ ").split("│")]
    assert cells[:7] == ["2", "2", "1", "1", "1", "1", "0.9000 (trial 1)"]
    assert "trial 4  00:00:00  evaluation 2: 0.8123  lr 2e-05  batch_size 16" in out.getvalue()


def test_a_finished_trial_is_a_line_that_stays(trials: list[FrozenTrial], capsys: pytest.CaptureFixture[str]) -> None:
    board = Scoreboard("dev/accuracy", groups=1)
    for one in trials[1:4]:
        board.finished(one)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "trial 1 done 0.9000  lr 2e-05",
        "trial 2 pruned 0.5000  lr 2e-05  (1 collapsed)",
        "trial 3 failed  lr 2e-05  (process 0 was ended by SIGKILL)",
    ]


def test_parameters_are_short() -> None:
    assert short({"optimizer.lr": 1.23456e-5, "trainer.max_epochs": 3}) == "lr 1.23e-05  max_epochs 3"


def test_a_trial_at_work_says_for_how_long_and_how_far_it_is() -> None:
    running = Running(trial_id=0, number=7, parameters={"optimizer.lr": 2e-5}, first=7, since=100.0)
    assert describe(running, 3765.4) == "trial 7  01:01:05  no evaluation yet  lr 2e-05"
