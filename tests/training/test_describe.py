"""What a run says of itself in MLflow."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_glue import config as configuration
from lightning_glue.training.describe import config_file, in_force


@pytest.mark.parametrize(
    ("chosen", "given"),
    [
        ({"task": "WNLI", "model": "tiny", "data": "sample"}, ["trainer.max_steps=3", "optimizer.lr=1e-05"]),
        ({"task": "STS-B", "experiment": "paper/roberta_base"}, ["data.glue_dir='/x y/it\\'s ${no}'", "seed=7"]),
        ({"experiment": "demo"}, ["tracking.run_name='a \"b\" ${seed}: c'", "trainer.gpus='0'"]),
    ],
)
def test_the_configuration_of_a_run_is_a_recipe(
    chosen: dict[str, str], given: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Saved as one, it composes the same configuration to the last key."""
    monkeypatch.chdir(tmp_path)
    values = configuration.flatten(configuration.compose(**chosen)) | {}
    config = configuration.compose([one for one in given if "${" not in one], **chosen)
    for one in given:
        if "${" in one:  # from Python; the command line's grammar would look the name up
            key, _, value = one.partition("=")
            group, _, name = key.partition(".")
            setattr(getattr(config, group), name, value)
    target = tmp_path / "experiments" / "again" / "it.yaml"
    target.parent.mkdir(parents=True)
    target.write_text(config_file(config, "f" * 32))
    again = configuration.compose(experiment="again/it")
    assert configuration.flatten(again) == configuration.flatten(config) != values
    assert configuration.digest(again) == configuration.digest(config)


def test_an_address_with_a_password_is_left_out() -> None:
    config = configuration.compose(["tracking.uri='http://ann:s3cret@mlflow'"], task="WNLI")
    text = config_file(config, "f" * 32)
    assert "s3cret" not in text
    assert "uri: null" in text


def test_what_auto_came_to_is_said() -> None:
    config = configuration.compose(["trainer.gpus='0'", "trainer.procs=2"], task="WNLI")
    found = in_force(config)
    assert config.trainer.precision == "auto"
    assert found["resolved.devices"] == "2 x cpu"
    assert found["resolved.precision"] in ("32-true", "bf16-mixed")


def test_the_name_of_a_run_says_recipe_and_length() -> None:
    assert configuration.compose(task="WNLI", model="tiny").run_name == "tiny lr 0.001 batch 16 10 epochs seed 1"
    short = configuration.compose(["trainer.max_steps=20"], experiment="demo")
    assert short.run_name == "demo: minilm lr 1e-05 batch 32 20 steps seed 1"
    assert configuration.compose(["tracking.run_name=mine"], experiment="demo").run_name == "mine"
    assert "recipe" not in configuration.flatten(short)
