"""What the terminal tells a user to type runs as it is typed."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.project import ROOT

from lightning_glue.tracking.pages import how_to_look
from lightning_glue.utils import console
from lightning_glue.utils.console import program
from lightning_glue.utils.hints import hint


@pytest.fixture
def python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The Python of an environment below the current folder that is not on the PATH."""
    path = tmp_path / ".venv" / "bin" / "python"
    path.parent.mkdir(parents=True)
    for name in ("python", "mlflow"):
        (path.parent / name).touch(mode=0o755)
    monkeypatch.setattr(sys, "executable", str(path))
    monkeypatch.chdir(tmp_path)
    return path


def test_programs_are_named_as_they_can_be_called_from_here(
    python: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert program("python") == ".venv/bin/python"
    assert program("optuna-dashboard") == "optuna-dashboard"  # it is not in the environment
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert program("python") == str(python)
    monkeypatch.setenv("PATH", f"{python.parent}{os.pathsep}{os.environ['PATH']}")
    assert program("python") == "python"


def test_runs_are_compared_where_they_are(python: Path) -> None:
    light = "MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false .venv/bin/mlflow ui --workers 1"
    local = f"sqlite:///{Path.cwd()}/mlflow.db"
    assert how_to_look(local, "7", "r") == {
        light: "serve the runs on http://127.0.0.1:5000",
        "http://127.0.0.1:5000/#/experiments/7/runs?workflowType=machine_learning": "compare runs",
        "http://127.0.0.1:5000/#/experiments/7/runs/r?workflowType=machine_learning": "this run",
    }
    assert list(how_to_look("postgresql://ann:s3cret@h/d", "", "r")) == [
        f"{light} --backend-store-uri 'postgresql://ann:***@h/d'"
    ]
    shared = how_to_look("https://mlflow.example:5000/", "7", "r")
    assert shared == {
        "https://mlflow.example:5000/#/experiments/7/runs?workflowType=machine_learning": "compare runs",
        "https://mlflow.example:5000/#/experiments/7/runs/r?workflowType=machine_learning": "this run",
    }
    assert how_to_look("https://mlflow.example:5000", "", "r") == {"https://mlflow.example:5000": "compare runs"}


def test_makes_user_gets_makes_commands(python: Path) -> None:
    assert hint("evaluate", {"RUN": "abc", "GPUS": "0"}) == ".venv/bin/python -m lightning_glue.evaluate abc --gpus 0"
    Path("Makefile").write_text("train:\n\tcc train.c\n")  # another project's
    assert hint("train", {"RESUME": "abc"}) == ".venv/bin/python -m lightning_glue.train --resume abc"
    shutil.copy(ROOT / "Makefile", "Makefile")
    assert hint("evaluate", {"RUN": "abc", "GPUS": "0"}) == "make evaluate RUN=abc GPUS=0"
    assert list(how_to_look(f"sqlite:///{Path.cwd()}/mlflow.db", "", "r")) == ["make ui"]


@pytest.mark.parametrize("checkout", [False, True])
def test_what_is_to_be_typed_arrives_as_it_is_meant(checkout: bool, tmp_path: Path) -> None:
    """Through the shell of the user and, with a Makefile, through that of make."""
    awkward = ["a b.pt", "tracking.uri='sqlite:////x y/it\\\\'s$HOME.db'", "x=[1,2]"]
    echo = tmp_path / "bin" / "python"
    echo.parent.mkdir()
    echo.write_text(f"#!{sys.executable}\nimport json, sys\nprint(json.dumps(sys.argv[1:]))\n")
    echo.chmod(0o755)
    if checkout:
        shutil.copy(ROOT / "Makefile", tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        patch.setattr(sys, "executable", str(echo))
        line = hint("evaluate", {"RUN": awkward[0]}, awkward[1:])
    line += " BIN=bin -o .venv/.installed" if checkout else ""
    result = subprocess.run(line, shell=True, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert json.loads(result.stdout) == ["-m", "lightning_glue.evaluate", *awkward]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "/proc/x/.y.AB.part"), "/proc/x: No such file"),
        (PermissionError(errno.EACCES, "Permission denied", "out.tsv"), "out.tsv: Permission denied"),
        (OSError(errno.ENAMETOOLONG, "File name too long", "a" * 300), "a: File name too long"),
    ],
)
def test_a_path_that_cannot_be_used_is_one_line(error: OSError, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> None:
        raise error

    with pytest.raises(SystemExit) as end:
        console.run_main(main)
    assert end.value.code == 2
    found = capsys.readouterr().err
    assert said in found and found.count("\n") == 1


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error", "x"), OSError(errno.ENOENT, "of no path")])
def test_other_errors_of_the_system_keep_their_traceback(error: OSError) -> None:
    def main() -> None:
        raise error

    with pytest.raises(OSError):
        console.run_main(main)
