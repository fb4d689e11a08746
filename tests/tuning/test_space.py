"""Search spaces: what conf/tune/ may say, and what it becomes."""

from __future__ import annotations

import logging

import optuna
import pytest
from helpers.project import torture
from hypothesis import given
from hypothesis import strategies as st
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from lightning_glue.config import compose, compose_tune, identity, unflatten
from lightning_glue.errors import UserError
from lightning_glue.execution.engines import LocalEngine
from lightning_glue.tasks import TRAINABLE
from lightning_glue.tuning.request import Request, compose_search
from lightning_glue.tuning.space import first_trials, make_space, suggest_parameters, with_parameters


def test_entries_become_optunas_distributions() -> None:
    written = {
        "optimizer.lr": {"low": 1e-5, "high": 1e-4, "log": True},
        "trainer.max_epochs": {"low": 2, "high": 10},
        "data.batch_size": [16, 32],
        "model.dropout": {"low": 0.0, "high": 0.2, "step": 0.05},
    }
    assert make_space(written, set()) == {
        "optimizer.lr": FloatDistribution(1e-5, 1e-4, log=True),
        "trainer.max_epochs": IntDistribution(2, 10),
        "data.batch_size": CategoricalDistribution([16, 32]),
        "model.dropout": FloatDistribution(0.0, 0.2, step=0.05),
    }


def test_a_key_of_the_command_line_is_not_searched() -> None:
    written = {"optimizer.lr": [1e-5, 2e-5], "data.batch_size": [16, 32]}
    assert list(make_space(written, {"optimizer.lr"})) == ["data.batch_size"]


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ({}, "empty"),
        ({"seed": [1]}, "empty.*besides seed"),
        ({"optimizer.lrr": [1]}, "unknown key 'optimizer.lrr'; did you mean 'optimizer.lr'"),
        ({"optimizer.lr": []}, "expected a list of choices"),
        ({"optimizer.lr": 3}, "expected a list of choices"),
        ({"optimizer.lr": {"low": 1e-5}}, "low: ..., high"),
        ({"optimizer.lr": {"low": 1e-5, "high": 1e-4, "scale": "log"}}, "log: true or step"),
        ({"optimizer.lr": {"low": 2, "high": 1}}, "optimizer.lr"),
        ({"optimizer.lr": {"low": 0.0, "high": 1.0, "log": True}}, "optimizer.lr"),
    ],
)
def test_mistakes_name_the_entry(written: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_space(written, {"seed"})


@pytest.mark.parametrize("task", TRAINABLE)
@pytest.mark.parametrize("space", ["wide", "paper"])
def test_every_task_has_spaces_that_contain_its_recipe(task: str, space: str) -> None:
    config, tune = compose_tune([f"tune.space={space}"], task=task, model="roberta.base")
    searched = make_space(tune.parameters, set())
    first = first_trials(tune, config, searched)
    assert first[0]["optimizer.lr"] == pytest.approx(config.lr)
    assert first[0]["data.batch_size"] == config.data.batch_size
    assert len({str(parameters) for parameters in first}) == len(first) >= 2


def test_learning_rates_follow_the_model() -> None:
    rates = [
        compose_tune([], task="RTE", model=model)[1].parameters["optimizer.lr"]["low"]
        for model in ("roberta.base", "minilm")
    ]
    assert rates == pytest.approx([5e-6, 25e-6])


def test_a_grid_is_queued_point_by_point() -> None:
    config, tune = compose_tune(["tune.space=paper", "tune.sampler=grid"], task="RTE", model="roberta.base")
    points = first_trials(tune, config, make_space(tune.parameters, set()))
    assert {(p["optimizer.lr"], p["data.batch_size"]) for p in points} == {
        (lr, size) for lr in (1e-5, 2e-5, 3e-5) for size in (16, 32)
    }
    config, tune = compose_tune(["tune.sampler=grid"], task="RTE", model="roberta.base")
    with pytest.raises(UserError, match=r"tune.sampler=grid needs a list of choices.*tune.space=paper"):
        first_trials(tune, config, make_space(tune.parameters, set()))


def test_a_first_trial_outside_the_space_is_refused() -> None:
    config, tune = compose_tune(["optimizer.layer_decay=0.5"], task="RTE", model="roberta.base")
    with pytest.raises(UserError, match="lies outside the search space"):
        first_trials(tune, config, make_space(tune.parameters, set()))


@pytest.mark.parametrize("factor", ["3", *map(torture, ("0.7", "1.1", "7", "0.1"))])
@pytest.mark.parametrize("space", ["paper", torture("wide")])
def test_the_recipe_lies_in_the_space_whatever_the_factor_of_the_model(factor: str, space: str) -> None:
    for task in TRAINABLE:  # 3 x 1e-5 is 3.0000000000000004e-05, and the choice is 3e-05
        overrides = [f"model.lr_factor={factor}", f"tune.space={space}"]
        config, tune = compose_tune(overrides, task=task, model="roberta.base")
        searched = make_space(tune.parameters, {"model.lr_factor"})
        (law, value) = searched["optimizer.lr"], first_trials(tune, config, searched)[0]["optimizer.lr"]
        assert value == pytest.approx(config.lr) and law._contains(law.to_internal_repr(value))


@pytest.mark.parametrize(
    "overrides",
    [
        {"optimizer.lr": 3e-5, "data.batch_size": 32, "trainer.max_epochs": 4},
        {"task.lr": 1e-4},
        {"model.lr_factor": 2.5, "model.dropout": 0.3},
        {"task.batch_size": 24, "task.max_epochs": 2},
        {"seed": 7, "optimizer.decay_biases": False, "data.on_bad_row": "skip"},
    ],
)
def test_a_trial_is_configured_as_the_command_line_would(overrides: dict[str, object]) -> None:
    base = compose([], task="RTE", model="roberta.base")
    asked = compose([f"{key}={value}" for key, value in overrides.items()], task="RTE", model="roberta.base")
    assert identity(unflatten(with_parameters(base, overrides))) == identity(asked)


@given(st.lists(st.integers(1, 64), min_size=1, max_size=5, unique=True), st.floats(1e-6, 1e-2), st.floats(1.01, 100))
def test_suggestions_lie_in_the_space(sizes: list[int], low: float, factor: float) -> None:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    written = {"data.batch_size": sizes, "optimizer.lr": {"low": low, "high": low * factor, "log": True}}
    space = make_space(written, set())
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    values = suggest_parameters(study.ask(), space)
    assert values["data.batch_size"] in sizes
    assert low <= values["optimizer.lr"] <= low * factor


@pytest.mark.parametrize(
    ("overrides", "warned"),
    [
        (["trainer.max_steps=30"], True),
        (["trainer.max_steps=30", "trainer.max_epochs=2"], False),
        ([], False),
    ],
)
def test_epochs_that_steps_cut_short_are_said_to_be(
    overrides: list[str], warned: bool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("lightning_glue"), "propagate", True)
    search = compose_search(Request("RTE", gpus=0, overrides=overrides), LocalEngine())
    assert not caplog.text  # it follows what may be wrong with the storage
    search.warn_of_unused_epochs()
    assert ("trainer.max_steps=30 may end every trial before" in caplog.text) == warned
    assert ("trainer.max_epochs" in search.space) == ("trainer.max_epochs=2" not in overrides)
