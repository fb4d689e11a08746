"""fairseq where it is not installed, and what it does to logging where it is."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import zygote
from helpers.project import ROOT, torture

from lightning_glue.model.fairseq_import import DISTRIBUTIONS

# Read by Python when it starts, in every process: what a machine without fairseq is like.
WITHOUT = """
from importlib.machinery import PathFinder

find = PathFinder.find_spec
PathFinder.find_spec = classmethod(lambda cls, name, *rest: None if name == "fairseq" else find(name, *rest))
"""


@pytest.fixture
def python(tmp_path: Path, bpe_dir: Path):
    """Runs Python in an empty folder, on a machine without fairseq."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(WITHOUT)
    (tmp_path / "empty").mkdir()
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path / 'site'}:{ROOT}", "ROBERTA_BPE_DIR": str(bpe_dir)}

    def python(*arguments: str) -> subprocess.CompletedProcess[str]:
        with zygote.executed():
            return subprocess.run(
                [sys.executable, *arguments],
                cwd=tmp_path / "empty", env=environment, capture_output=True, text=True, timeout=120,
            )  # fmt: skip

    return python


@pytest.mark.parametrize("command", [torture("train"), "tune"])
def test_a_command_says_in_one_line_how_to_install_it(command: str, python, tmp_path: Path, cache: Path) -> None:
    flags = ["--task", "WNLI", "--model", "tiny", "--data", "sample", "--gpus", "0"]
    done = python("-m", f"lightning_glue.{command}", *flags)
    assert done.returncode == 2
    assert done.stderr.startswith("error: fairseq is not installed")
    assert done.stderr.count("\n") == 1 and "pip install --no-deps " in done.stderr
    assert not list((tmp_path / "empty").glob("**/optuna.db")), "nothing was begun"


def test_the_library_raises_an_error_of_its_own(python) -> None:
    done = python("-c", "import lightning_glue.model.roberta")
    assert "lightning_glue.errors.UserError: fairseq is not installed" in done.stderr.splitlines()[-1]


def test_the_command_installs_what_the_project_installs() -> None:
    lines = (ROOT / "requirements-no-deps.txt").read_text().splitlines()
    named = {line.partition(";")[0].strip() for line in lines if "fairseq" in line.partition("=")[0]}
    assert named == set(DISTRIBUTIONS)


@pytest.mark.torture
def test_importing_the_model_leaves_logging_as_it_was() -> None:
    code = """
import logging
root = logging.getLogger()
before = list(root.handlers), root.level, root.manager.disable
from lightning_glue.model import roberta
assert before == (root.handlers, root.level, root.manager.disable), root.handlers
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
