"""Options that are each tried alone elsewhere, crossed: every two of their values meet in one real training."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import pytest
import torch
from helpers.checkpoints import write_checkpoint
from helpers.pairwise import pairs, rows
from helpers.project import run, torture

from lightning_glue import train as command
from lightning_glue.training.module import GlueModule

STEPS, EPOCHS = 10, 2  # of 300 rows in batches of 32
OPTIONS: dict[str, list[Any]] = {
    "model": ["tiny", "64 positions", "LayerDrop"],
    "trainer.procs": [1, 2],
    "trainer.gradient_clip_val": [0.5, 0.0],
    "trainer.precision": ["bf16-mixed", "32-true"],
    "trainer.accumulate": [4, 1],
    "trainer.val_check_interval": [0.3, 1.0, 8],  # in micro-batches
    "trainer.early_stopping_patience": [2, None],
    "trainer.checkpoint_every_steps": [2, None],
    "trainer.max_steps": [13, -1],
    "tracking.keep_best": [2, 1],
}
TABLE = rows(OPTIONS)
DROPPING = next(row for row in TABLE if (row["model"], row["trainer.procs"]) == ("LayerDrop", 2))
CHEAP = [DROPPING]  # in `make test`


def name_of(row: dict[str, Any]) -> str:
    return ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in row.items())


def test_every_two_values_meet() -> None:
    met = set().union(*map(pairs, TABLE))
    for one, other in itertools.combinations(OPTIONS, 2):
        for pair in itertools.product(OPTIONS[one], OPTIONS[other]):
            assert tuple(zip((one, other), pair)) in met
    assert len(TABLE) <= 16  # the product has 2304


def arguments(row: dict[str, Any], bpe_dir: Path, folder: Path) -> list[str]:
    """The options of a row, as the command line has them."""
    changes = {"64 positions": {"max_positions": 64}, "LayerDrop": {"encoder_layerdrop": 0.3}}
    model = row["model"]
    if model in changes:
        model = str(write_checkpoint(folder / "model.pt", bpe_dir, **changes[model]))
    given = {key: "null" if value is None else value for key, value in row.items() if key != "model"}
    given |= {"trainer.max_epochs": EPOCHS, "data.batch_size": 32, "optimizer.lr": 1e-3, "trainer.log_every": 3}
    flags = ["--task", "WNLI", "--data", "sample", "--gpus", "0", "--model", model]
    return [
        *flags,
        *(f"{key}={value}" for key, value in given.items()),
        "tracking.system_metrics_seconds=null",
        "tracking.register=false",
    ]


def history(folder: Path) -> tuple[mlflow.entities.Run, dict[str, list[tuple[int, float]]]]:
    client = mlflow.MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    (found,) = client.search_runs([client.get_experiment_by_name("glue-wnli-sample").experiment_id])
    named = {name: client.get_metric_history(found.info.run_id, name) for name in found.data.metrics}
    return found, {name: [(point.step, point.value) for point in points] for name, points in named.items()}


def evaluated(row: dict[str, Any]) -> list[int]:
    """Steps after which the row's training evaluates if nothing stops it early."""
    last = EPOCHS * STEPS if row["trainer.max_steps"] < 0 else row["trainer.max_steps"]
    interval, accumulate = row["trainer.val_check_interval"], row["trainer.accumulate"]
    batches = STEPS * accumulate if interval == 1 else interval if interval > 1 else int(STEPS * accumulate * interval)
    each = math.ceil(batches / accumulate)
    steps = [epoch * STEPS + step for epoch in range(EPOCHS) for step in range(each, STEPS + 1, each)]
    return sorted({step for step in steps if step <= last} | {last})


def check(row: dict[str, Any], folder: Path) -> None:
    """What a finished training left is right."""
    found, curves = history(folder)
    assert found.info.status == "FINISHED"
    assert all(math.isfinite(value) for points in curves.values() for _, value in points)
    steps, values = zip(*curves["dev/accuracy"])
    expected = evaluated(row)
    if row["trainer.early_stopping_patience"] and len(steps) < len(expected):
        assert max(values[-2:]) <= max(values[:-2])  # two evaluations without a better value
        expected = expected[: len(steps)]
    assert list(steps) == expected
    best = steps[values.index(max(values))]
    kept = Path(found.info.artifact_uri.removeprefix("file://"), "checkpoints")
    reached = {path.name: torch.load(path, weights_only=True)["global_step"] for path in kept.glob("*.ckpt")}
    assert (reached.pop("best.ckpt"), reached.pop("last.ckpt")) == (best, steps[-1])
    ranked = sorted(zip(values, steps), key=lambda one: (-one[0], one[1]))[1 : row["tracking.keep_best"]]
    assert reached == {f"step-{step}.ckpt": step for _, step in ranked}
    assert found.data.metrics["best/dev/accuracy"] == max(values)


@pytest.fixture
def train(
    bpe_dir: Path, cache: Path, new_store: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., None]:
    """Train with a row's options in a folder of its own: in this process, which is faster, where one is asked for."""
    monkeypatch.setenv("ROBERTA_BPE_DIR", str(bpe_dir))

    def train(row: dict[str, Any], folder: Path, resume: str | None = None) -> None:
        folder.mkdir(exist_ok=True)
        new_store(folder)
        given = arguments(row, bpe_dir, tmp_path)
        if row["trainer.procs"] > 1:
            run("lightning_glue.train", *given, cwd=folder, timeout=600)
            return
        monkeypatch.chdir(folder)
        monkeypatch.setattr("sys.argv", ["train", *given])
        command.train(command.compose(command.parse_arguments()), command.ResumingCaller(resume))

    return train


@pytest.mark.parametrize("row", [row if row in CHEAP else torture(row) for row in TABLE], ids=map(name_of, TABLE))
def test_options_work_together(row: dict[str, Any], train: Callable[..., None], tmp_path: Path) -> None:
    train(row, tmp_path / "run")
    check(row, tmp_path / "run")


ALONE = [row for row in TABLE if row["trainer.procs"] == 1]


@pytest.mark.torture
@pytest.mark.parametrize("row", ALONE, ids=map(name_of, ALONE))
def test_they_are_resumed_together(
    row: dict[str, Any], train: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted in the middle, the curves are those of a training that was not."""
    train(row, tmp_path / "whole")
    calls = itertools.count()
    original = GlueModule.training_step

    def interrupted(self: GlueModule, batch: Any, number: int) -> torch.Tensor:
        if next(calls) == 5 * row["trainer.accumulate"]:
            raise RuntimeError("interrupted")
        return original(self, batch, number)

    with monkeypatch.context() as patch:
        patch.setattr(GlueModule, "training_step", interrupted)
        with pytest.raises(RuntimeError, match="interrupted"):
            train(row, tmp_path / "run")
    train(row, tmp_path / "run", resume="auto")
    check(row, tmp_path / "run")
    (_, one), (_, other) = history(tmp_path / "whole"), history(tmp_path / "run")
    assert one.keys() == other.keys()
    for name in one:
        if "per_second" not in name:
            assert one[name] == other[name], name
