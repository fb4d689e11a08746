"""What make hands over to the commands."""

from __future__ import annotations

import os
import shlex
import subprocess

import pytest
from helpers.project import ROOT


def planned(target: str, *variables: str, **environment: str) -> list[str]:
    """The command line that a target ends with."""
    result = subprocess.run(
        ["make", "-n", "-C", str(ROOT), target, *variables],
        env={**os.environ, **environment}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    line = next(line for line in reversed(result.stdout.splitlines()) if "lightning_glue." in line)
    return shlex.split(line)[1:]


@pytest.mark.parametrize(
    ("target", "variable", "flag"),
    [
        ("train", "MODEL", "--model"),
        ("train", "INIT_FROM", "--init-from"),
        ("train", "RESUME", "--resume"),
        ("train", "EXPERIMENT", "--experiment"),
        ("tune", "STUDY", "--study"),
        ("glue", "TASKS", "--tasks"),
        ("glue", "KEEP", "--keep"),
        ("evaluate", "PREDICT", "--predict"),
        ("server", "ARTIFACTS", "--artifacts"),
    ],
)
@pytest.mark.parametrize("value", ["plain", "/a/My  Drive/it's.pt", "a;b&&c", 'say "hi"', "#1 50%", "*"])
def test_a_value_arrives_as_it_is(target: str, variable: str, flag: str, value: str) -> None:
    command = planned(target, **{variable: value})
    assert command[command.index(flag) + 1] == value


def test_a_run_may_be_a_folder_with_blanks_and_in_the_users_home() -> None:
    assert planned("evaluate", RUN="a b/fairseq")[2] == "a b/fairseq"
    assert planned("evaluate", RUN="~/a b/fairseq", HOME="/home/ann")[2] == "/home/ann/a b/fairseq"


def test_what_is_not_given_is_left_out_and_args_are_many() -> None:
    assert planned("train") == ["-m", "lightning_glue.train"]
    assert planned("train", "TASK=RTE", "GPUS=4", "ARGS=a=1 b=2") == [
        *("-m", "lightning_glue.train", "--task", "RTE", "--gpus", "4", "a=1", "b=2")
    ]
    assert planned("glue", "TASKS=RTE MRPC", "SEEDS=5", "GPUS=4", "JOBS_PER_GPU=2") == [
        *("-m", "lightning_glue.glue", "--tasks", "RTE MRPC", "--seeds", "5", "--gpus", "4", "--jobs-per-gpu", "2")
    ]
    assert planned("preprocess") == ["-m", "lightning_glue.preprocess", "--task", "ALL"]


@pytest.mark.parametrize(("target", "variable"), [("server", "DB"), ("tune", "STORAGE"), ("dashboard", "STORAGE")])
def test_addresses_go_through_the_environment(target: str, variable: str) -> None:
    """A command line is everybody's to read; that of make itself is up to its user, who can export the variable."""
    assert "s3cret" not in " ".join(planned(target, **{variable: "postgresql://ann:s3cret@db/x"}))


def test_an_unknown_variable_is_refused() -> None:
    """make by itself ignores it, and trains something else."""
    result = subprocess.run(["make", "-n", "-C", str(ROOT), "train", "MDEL=minilm"], capture_output=True, text=True)
    assert result.returncode == 2
    assert "unknown variable MDEL; expected one of TASK TASKS" in result.stderr
    assert "lightning_glue.train" not in result.stdout
