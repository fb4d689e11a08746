"""The wheel of this tree, in an environment and a folder that know nothing of the repository."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from helpers.project import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

SHORT = ["trainer.max_steps=2", "tracking.checkpoints=false", "tracking.system_metrics_seconds=null"]


def tracked(*folders: str) -> set[str]:
    """The files of the repository, those that are not committed yet, too."""
    command = ["git", "-C", str(ROOT), "ls-files", "-co", "--exclude-standard", *folders]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return {name for name in listed if (ROOT / name).is_file()}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The sdist of a copy of the tree, in which a search has left a recipe, and the wheel made from the sdist."""
    folder = tmp_path_factory.mktemp("build")
    for name in tracked():
        (folder / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / "tree" / name)
    (folder / "tree" / "experiments" / "tuned").mkdir()
    (folder / "tree" / "experiments" / "tuned" / "RTE.yaml").write_text("# @package _global_\nseed: 5\n")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder / "dist"), str(folder / "tree")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    (sdist,), (wheel,) = (folder / "dist").glob("*.tar.gz"), (folder / "dist").glob("*.whl")
    return sdist, wheel


@pytest.fixture(scope="module")
def python(built: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a new environment with the wheel in it. What it depends on, it takes from where the tests run."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--no-deps", "--no-index"]
    subprocess.run([*pip, str(built[1])], check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    # A folder named in a .pth file comes last, and its own .pth files, the editable install's, are not read.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def run(python: Path, folder: Path, *arguments: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "GLUE_DIR")}
    done = subprocess.run(
        [str(python), *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=180
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_sdist_and_wheel_hold_what_they_must_and_no_more(built: tuple[Path, Path]) -> None:
    configuration = tracked("conf", "experiments")
    with tarfile.open(built[0]) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    assert configuration | tracked("lightning_glue") <= names
    assert {"pyproject.toml", "setup.py", "README.md", "LICENSE", "requirements.lock"} <= names
    with zipfile.ZipFile(built[1]) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert names == tracked("lightning_glue") | {f"lightning_glue/{name}" for name in configuration}
    assert any(name.startswith("lightning_glue/conf/task/") for name in names)


@pytest.mark.torture
def test_it_trains_the_demo_and_searches_in_an_empty_folder(
    python: Path, tmp_path: Path, cache: Path, bpe_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ROBERTA_BPE_DIR", str(bpe_dir))
    monkeypatch.delenv("VIRTUAL_ENV", raising=False)
    package = python.parent.parent
    code = "import lightning_glue; from lightning_glue.config import paths; "
    code += "print(lightning_glue.__file__, paths.CONF, paths.CHECKOUT)"
    file, conf, checkout = run(python, tmp_path, "-c", code).split()
    assert package in Path(file).parents and package in Path(conf).parents and checkout == "None"
    installed = sorted(Path(file).parent.rglob("*.yaml"))

    said = run(python, tmp_path, "-m", "lightning_glue.train", "--gpus", "0", *SHORT)
    assert "dev/accuracy" in said
    assert (tmp_path / "mlflow.db").is_file()

    flags = ["--task", "WNLI", "--model", "tiny", "--data", "sample", "--gpus", "0", "--trials", "1"]
    said = run(python, tmp_path, "-m", "lightning_glue.tune", *flags, "seed=5", *SHORT)
    assert "--experiment tuned/WNLI" in said
    assert (tmp_path / "experiments" / "tuned" / "WNLI.yaml").is_file()
    assert sorted(Path(file).parent.rglob("*.yaml")) == installed

    code = "import sys; sys.argv[1:] = ['--experiment', 'tuned/WNLI']; from lightning_glue import train; "
    code += "found = train.compose(train.parse_arguments()); print(found.task.name, found.model.name, found.trainer)"
    said = run(python, tmp_path, "-c", code)
    assert said.startswith("WNLI tiny TrainerConfig(") and "max_steps=2" in said


def test_the_lock_has_a_version_that_fits_for_everything_asked_for() -> None:
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    locked = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert all(re.fullmatch(r"[a-z0-9-]+", name) for name in locked)
    assert not any("+" in version for version in locked.values()), "a local version is to be had in one place only"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [*project["dependencies"], *(one for extra in project["optional-dependencies"].values() for one in extra)]
    for requirement in map(Requirement, asked):
        if requirement.name not in (project["name"], "triton"):  # torch's builds for GPUs ask for one version of it
            assert requirement.specifier.contains(locked[canonicalize_name(requirement.name)]), requirement
