"""The recipe of a study composes the configuration that won, whatever that was made from."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from helpers.project import torture

from lightning_glue.config import Config, compose, experiments, identity, unflatten
from lightning_glue.tuning.recipe import write_recipe
from lightning_glue.tuning.space import with_parameters

WON = {"study": "s", "trial": 3, "metric": "dev/accuracy", "value": 0.5, "trials": 7}


@pytest.fixture(autouse=True)
def recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """experiments/ of the current folder, which is another than the program's."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "experiments").mkdir()
    return tmp_path / "experiments"


def winner(parameters: dict[str, Any], overrides: list[str], **choices: str) -> Config:
    return unflatten(with_parameters(compose(overrides, **choices), parameters))


@pytest.mark.parametrize("model", ["minilm", torture("tiny"), torture("roberta.base")])
@pytest.mark.parametrize(
    ("parameters", "overrides"),
    [
        ({"optimizer.lr": 1.234567890123e-05, "data.batch_size": 32}, []),
        ({"model.dropout": 0.2}, ["trainer.accumulate=2", "optimizer.layer_decay=0.9", "seed=11"]),
        ({}, ["optimizer.betas=[0.9,0.999]", "data.max_tokens=128", "trainer.early_stopping_patience=3"]),
        ({"trainer.max_epochs": 10}, ["init_from='runs/a b#c'", "model.lr_factor=3"]),
        ({}, []),
    ],
)
def test_the_recipe_is_the_configuration_that_won(model: str, parameters: dict[str, Any], overrides: list[str]) -> None:
    won = winner(parameters, overrides, task="RTE", model=model, data="sample")
    write_recipe(won, **WON)
    assert identity(compose([], experiment="tuned/RTE")) == identity(won)


def test_the_recipe_has_the_keys_of_the_experiment_that_was_searched_from(recipes: Path) -> None:
    (recipes / "mine.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /task: CoLA\n  - override /model: tiny\n\n"
        "trainer: {accumulate: 4, gradient_clip_val: 0.5}\noptimizer: {layer_decay: 0.8}\n"
        "model: {architecture: {encoder_layers: 3}}\n"
    )
    won = winner({"optimizer.lr": 1e-4}, [], experiment="mine")
    write_recipe(won, **WON)
    composed = compose([], experiment="tuned/CoLA")
    assert identity(composed) == identity(won)
    assert (composed.trainer.accumulate, composed.model.architecture["encoder_layers"]) == (4, 3)
    again = winner({"optimizer.lr": 2e-4}, [], experiment="tuned/CoLA")  # searched from, and replaced
    write_recipe(again, **WON)
    assert identity(compose([], experiment="tuned/CoLA")) == identity(again)


def test_the_recipe_of_a_model_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "my model.pt").write_bytes(b"")
    won = winner({"model.dropout": 0.0}, [], task="RTE", model=str(tmp_path / "my model.pt"))
    write_recipe(won, **WON)
    assert identity(compose([], experiment="tuned/RTE")) == identity(won)


def test_a_recipe_goes_to_the_current_folder_and_wins_there_over_one_of_its_name(
    recipes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    won = winner({"seed": 5}, [], task="RTE", model="tiny")
    assert write_recipe(won, **WON) == recipes / "tuned" / "RTE.yaml"
    assert compose([], experiment="tuned/RTE").seed == 5
    (recipes / "demo.yaml").write_text("# @package _global_\ndefaults:\n  - override /task: SST-2\nseed: 7\n")
    assert compose([], experiment="demo").seed == 7
    assert {"demo", "paper/roberta_base", "tuned/RTE"} <= set(experiments())
    (tmp_path / "it's, [another]").mkdir()
    monkeypatch.chdir(tmp_path / "it's, [another]")
    assert compose([], experiment="demo").seed == 1
    write_recipe(won, **WON)
    assert compose([], experiment="tuned/RTE").seed == 5


def test_nothing_but_recipes_comes_from_the_current_folder(recipes: Path, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("seed: 9\n")
    for group in ("task", "model", "conf/task", "conf/model", "hydra"):
        (tmp_path / group).mkdir(parents=True)
        (tmp_path / group / "default.yaml").write_text("seed: 9\n")
        (tmp_path / group / "RTE.yaml").write_text("seed: 9\n")
    assert compose([], task="RTE", model="tiny").seed == 1


def test_a_name_of_two_lines_stays_a_comment() -> None:
    won = winner({}, [], task="RTE", model="tiny")
    write_recipe(won, **{**WON, "study": "a\nseed: 5"})
    assert identity(compose([], experiment="tuned/RTE")) == identity(won)


def test_a_recipe_that_cannot_be_written_is_a_warning(
    recipes: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from types import SimpleNamespace

    from lightning_glue.tuning.results import keep_recipe

    shutil.rmtree(recipes)
    recipes.write_text("a file, where a folder is to be made")  # root may write anywhere else
    search = SimpleNamespace(config=winner({}, [], task="RTE", model="tiny"), metric="dev/accuracy")
    study = SimpleNamespace(name="s", trials=list)
    best = SimpleNamespace(number=1, value=0.5, params={"seed": 3})
    assert not keep_recipe(search, study, best)
    said = capsys.readouterr().err
    assert said.startswith("warning: the best recipe cannot be kept") and said.count("\n") == 1
