"""A run that goes on does so with its own configuration; what contradicts it is refused, whichever way it is said."""

from __future__ import annotations

import argparse

import pytest

from lightning_glue import api, train
from lightning_glue import config as configuration
from lightning_glue.errors import ConfigError, UserError
from lightning_glue.execution.engines import LocalEngine
from lightning_glue.training.own_config import asked_keys, continued
from lightning_glue.tuning.request import Request, Search, compose_search

GIVEN = ("task", "model", "data", "experiment", "gpus", "procs", "init_from")
OWN = configuration.recorded(configuration.compose(["trainer.max_epochs=3"], task="RTE", model="tiny", data="sample"))


def composed(request: Request) -> Search:
    return compose_search(request, LocalEngine())


def on_the_command_line(*overrides: str, **flags: str) -> configuration.Config:
    args = argparse.Namespace(**{**dict.fromkeys(GIVEN), **flags}, resume="ID", overrides=[*overrides])
    return train.check_arguments(args, OWN)


@pytest.mark.parametrize(
    ("overrides", "flags", "said"),
    [
        (["task=MNLI"], {}, "task.name=MNLI contradicts the run's RTE"),
        ([], {"task": "MNLI"}, "task.name=MNLI contradicts the run's RTE"),
        (["model=minilm"], {}, "contradicts the run's"),
        (["data=glue"], {}, "data.source=glue contradicts the run's sample"),
        (["+model.architecture.max_positions=64"], {}, "model.architecture="),
        (["trainer.max_epochs=4"], {}, "trainer.max_epochs=4 contradicts the run's 3"),
        ([], {"experiment": "demo"}, "not with the experiment demo; leave --experiment out"),
        (["+experiments=demo"], {"task": "RTE"}, "leave --experiment out"),
        ([], {"init_from": "other.pt"}, "init_from=other.pt contradicts the run's None"),
    ],
)
def test_what_contradicts_the_run_is_refused(overrides: list[str], flags: dict[str, str], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        on_the_command_line(*overrides, **flags)
    assert str(caught.value).startswith("--resume ID: ")
    assert said in str(caught.value)


def test_what_the_run_says_too_and_where_it_is_to_go_on_are_taken() -> None:
    found = on_the_command_line("task=RTE", "model=tiny", "data=sample", "tracking.keep_best=3", gpus="0", procs="2")
    assert (found.trainer.procs, found.tracking.keep_best, found.trainer.max_epochs) == (2, 3, 3)
    assert on_the_command_line(task="RTE", model="tiny").task.name == "RTE"
    assert configuration.identity(on_the_command_line()) == configuration.identity(configuration.unflatten(OWN))


def test_a_group_is_asked_for_by_flag_and_by_override_alike() -> None:
    named = {"task": "RTE", "model": None, "data": None, "experiment": None}
    assert asked_keys("ID", named, ["model=tiny"]) == {"task.name", "model.name", "model.source"}
    present = configuration.compose(["model=minilm"], task="RTE")
    with pytest.raises(ConfigError, match=r"contradicts"):
        continued("ID", OWN, present, asked_keys("ID", named, ["model=minilm"]))


def asked_of_train(*arguments: str, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr("sys.argv", ["train", "--task", "RTE", *arguments])
    return train.compose(train.parse_arguments()).model.name


@pytest.mark.parametrize(
    ("there", "gpus", "expected"),
    [
        (0, None, "minilm"),
        (0, "auto", "minilm"),
        (0, "1", "roberta.base"),  # there is none, which is said when the training begins
        (1, None, "roberta.base"),
        (1, "0", "minilm"),
        (1, "2", "roberta.base"),
    ],
)
def test_the_default_model_follows_the_device_however_that_is_asked_for(
    there: int, gpus: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the command's option, by an override, by the library."""
    monkeypatch.setattr("torch.cuda.device_count", lambda: there)
    nothing: dict[str, str | None] = {"task": "RTE", "model": None, "data": None, "experiment": None}
    given = {} if gpus is None else {"trainer.gpus": gpus}
    assert api._compose(nothing, given, None).model.name == expected
    for arguments in [["--gpus", gpus], [f"trainer.gpus={gpus}"]] if gpus else [[]]:
        assert asked_of_train(*arguments, monkeypatch=monkeypatch) == expected


def test_a_search_has_the_same_default_and_what_is_named_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    assert composed(Request("RTE")).config.model.name == "roberta.base"
    assert composed(Request("RTE", gpus=0)).config.model.name == "minilm"
    assert composed(Request("RTE", overrides=["model=tiny"])).config.model.name == "tiny"
    assert composed(Request("RTE", experiment="demo")).config.model.name == "minilm"  # as the recipe has it
    assert asked_of_train("model=tiny", monkeypatch=monkeypatch) == "tiny"
    with pytest.raises(UserError, match=r"trainer\.gpus of a trial is what --gpus-per-trial and --procs say"):
        composed(Request("RTE", overrides=["trainer.gpus=1"]))
