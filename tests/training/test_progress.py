"""What a training shows of itself while it is at work."""

from __future__ import annotations

import io
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from lightning_glue import config as configuration
from lightning_glue.tasks import TASKS
from lightning_glue.training.build import build
from lightning_glue.training.callbacks import BestEvaluation, EvaluationLine, TrainingMonitor
from lightning_glue.training.messages import counted, run_length, scores
from lightning_glue.training.module import Evaluation
from lightning_glue.training.progress import RunProgress, Standing, seconds_left
from lightning_glue.training.trainer import make_trainer
from lightning_glue.utils.console import clock

SMALL = ["trainer.gpus=0", "data.batch_size=32", "trainer.accumulate=2", "trainer.log_every=4", "trainer.max_epochs=9"]


class Losses(pl.Callback):
    """The loss of each micro-batch; and each time the line of an evaluation is printed, what it should say."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.expected: list[float] = []

    def on_train_batch_end(self, trainer: pl.Trainer, _: Any, outputs: Any, *more: Any) -> None:
        self.losses.append(float(outputs["loss"]) * trainer.accumulate_grad_batches)

    def on_validation_end(self, *_: Any) -> None:
        self.expected.append(sum(self.losses) / len(self.losses))
        self.losses.clear()


def test_a_training_without_a_terminal_says_where_it_is(
    cache: Path,
    bpe_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """10 steps an epoch of two micro-batches each, evaluated every 6 steps; ended by max_steps in the third epoch."""
    monkeypatch.chdir(tmp_path)
    given = [f"data.bpe_dir={bpe_dir}", *SMALL, "trainer.max_steps=23"]
    config = configuration.compose(given, task="WNLI", model="tiny", data="sample")
    module, data, _ = build(config)
    losses, best, monitor = Losses(), BestEvaluation("dev/accuracy"), TrainingMonitor(4)
    shown = RunProgress(monitor, best, draws=False, every=0)
    trainer = make_trainer(config, [losses, best, EvaluationLine(monitor), monitor, shown], False, 12)  # type: ignore[arg-type]
    with caplog.at_level(logging.INFO, "lightning_glue"):
        trainer.fit(module, data)
    printed = capsys.readouterr().out.splitlines()
    places = [re.match(r"epoch ([\d.]+)/2.3  step (\d+)  train/loss (\S+)  dev/accuracy", line) for line in printed]
    assert [place and (place[1], int(place[2])) for place in places] == [("0.6", 6), ("1.6", 16)], printed
    assert [float(place[3]) for place in places if place] == pytest.approx(losses.expected, abs=6e-5)
    lines = [record.getMessage() for record in caplog.records if "left" in record.getMessage()]
    assert len(lines) > 23
    training = [line for line in lines if line.startswith("step")]
    found = [
        re.match(r"step (\d+)/23  epoch (\d)/3  loss 0\.\d{4}  lr \S+  [\d,]+ examples/s", line) for line in training
    ]
    assert all(found), training
    steps, epochs = zip(*((int(one[1]), int(one[2])) for one in found if one))
    assert list(steps) == sorted(steps) and steps[-1] == 23
    assert dict(zip(steps, epochs)).items() >= {2: 1, 9: 1, 12: 2, 19: 2, 23: 3}.items()
    assert training[-1].endswith("0:00:00 left")
    assert "best dev/accuracy" not in training[0]
    assert f"best dev/accuracy {best.values['dev/accuracy']:.4f}" in training[-1]
    assert any(line.startswith("evaluating 100%") for line in lines)


number = st.floats(0, 1e6)


@settings(deadline=None)
@given(
    st.builds(
        Standing,
        step=st.integers(0, 99_999),
        steps=st.integers(1, 99_999),
        epoch=st.integers(1, 99),
        epochs=st.integers(1, 99),
        lr=st.floats(0, 1),
        loss=st.none() | st.floats(),
        rate=st.none() | number,
        best=st.none() | st.tuples(st.just("dev_matched/accuracy"), st.floats(0, 1)),
        left=st.none() | number,
    ),
    st.integers(20, 200),
)
def test_the_picture_is_two_lines_of_any_terminal(standing: Standing, width: int) -> None:
    screen = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    screen.print(standing.picture("evaluating 100%"))
    lines = screen.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert len(lines) == 2
    assert all(len(line) <= width for line in lines)
    if width >= 80:
        assert all(part in lines[0] for part in [*standing.place, *standing.time_left])
    if width >= 80 and not (standing.rate or 0) >= 1e5 and not abs(standing.loss or 0) > 99:
        assert all(part in lines[1] for part in standing.values)


def test_the_time_left_is_that_of_the_whole_run() -> None:
    assert seconds_left((110.0, 30), (100.0, 10), 230) == 100.0
    assert seconds_left((100.0, 10), (100.0, 10), 230) is None
    assert [clock(seconds) for seconds in (0.4, 59.6, 3600, 100 * 3600)] == [
        "0:00:00",
        "0:01:00",
        "1:00:00",
        "100:00:00",
    ]


@pytest.mark.parametrize(
    ("epochs", "steps", "examples", "said"),
    [
        (1, -1, 640, "1 epoch"),
        (10, -1, 640, "10 epochs"),
        (10, 200, 67349, "200 steps (0.1 epochs)"),
        (10, 1, 640, "1 step (0.05 epochs)"),
        (10, 30, 640, "30 steps (1.5 epochs)"),
        (2, 41, 640, "2 epochs"),
    ],
)
def test_the_length_of_a_run_in_words(epochs: int, steps: int, examples: int, said: str) -> None:
    config = configuration.compose([f"trainer.max_epochs={epochs}", f"trainer.max_steps={steps}"], task="SST-2")
    assert run_length(config, examples) == said
    assert [counted(n, "batch", "batches") for n in (0, 1, 2)] == ["0 batches", "1 batch", "2 batches"]


def test_a_score_stands_beside_that_of_one_answer_for_all() -> None:
    best = BestEvaluation("dev/accuracy")
    targets = torch.tensor([1, 1, 1, 0])
    best.values = {"dev/f1": 0.5, "dev/accuracy": 0.5, "dev/loss": 0.7}
    best.evaluations = {"dev": Evaluation(torch.zeros(4, 2), targets)}
    assert [" ".join(line.split()) for line in scores(TASKS["MRPC"], best)] == [
        "dev/accuracy 0.5000 (majority class 0.7500)",
        "dev/f1 0.5000 (majority class 0.8571)",  # the class is "1"
        "dev/loss 0.7000",
    ]
    best.values = {"dev/pearson": 0.5}
    best.evaluations = {"dev": Evaluation(torch.zeros(4, 1), targets.float())}
    assert "(one score for all 0.0000)" in scores(TASKS["STS-B"], best)[0]
