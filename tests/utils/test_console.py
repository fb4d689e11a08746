"""What the terminal tells a user to type runs as it is typed."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from lightning_glue.training.messages import compare_command
from lightning_glue.utils.console import program


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
    assert compare_command(f"sqlite:///{Path.cwd()}/mlflow.db") == ".venv/bin/mlflow ui"
    assert compare_command("postgresql://h/d") == ".venv/bin/mlflow ui --backend-store-uri postgresql://h/d"
    assert compare_command("https://mlflow.example:5000") == "https://mlflow.example:5000"
