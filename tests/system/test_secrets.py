"""The password of an address is nowhere but in the private journal: a training and a search from end to end."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest
from helpers import zygote
from helpers.postgres import Postgres
from helpers.project import ROOT
from helpers.servers import MlflowServer
from sqlalchemy.engine import make_url

SECRET = "s3cret-of-ann"
FLAGS = [
    *("--task", "WNLI", "--model", "tiny", "--data", "sample", "--gpus", "0"),
    *("trainer.max_steps=4", "tracking.system_metrics_seconds=null"),
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    server = MlflowServer(tmp_path_factory.mktemp("server"))
    server.start()
    yield server
    server.kill()


@pytest.fixture(autouse=True)
def _real_processes() -> Iterator[None]:
    """The command lines looked at are those that the kernel was given."""
    with zygote.executed():
        yield


def watched(folder: Path, *command: str, **environment: str) -> tuple[str, set[str]]:
    """What a command prints, and the command lines of all processes that hold the secret while it runs."""
    process = subprocess.Popen(
        [sys.executable, "-m", *command], cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    seen: set[str] = set()
    while True:
        seen |= {line for line in map(_command_line, Path("/proc").iterdir()) if SECRET in line}
        try:
            return process.communicate(timeout=0.3)[0], seen
        except subprocess.TimeoutExpired:
            continue


def _command_line(entry: Path) -> str:
    try:
        return (entry / "cmdline").read_text().replace("\0", " ") if entry.name.isdigit() else ""
    except OSError:
        return ""


def holding(folder: Path) -> list[str]:
    """Files below ``folder`` that hold the secret, in whatever form."""
    return sorted(
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_file() and SECRET.encode() in path.read_bytes()
    )


def assert_private(folder: Path) -> None:
    """Only files of journals hold the secret, and only their owner reads these."""
    for name in holding(folder):
        assert name.startswith("mlruns/.journal/"), name
        assert (folder / name).stat().st_mode & 0o077 == 0, name


@pytest.mark.torture
def test_a_training_keeps_the_servers_password_to_itself(
    server: MlflowServer, tmp_path: Path, cache: Path, bpe_dir: Path
) -> None:
    uri = server.uri.replace("://", f"://ann:{SECRET}@")
    printed, seen = watched(
        tmp_path, "lightning_glue.train", *FLAGS, MLFLOW_TRACKING_URI=uri, ROBERTA_BPE_DIR=str(bpe_dir)
    )
    assert "best evaluation" in printed and "ann:***@127.0.0.1" in printed
    assert SECRET not in printed and not seen
    assert_private(tmp_path)
    assert not holding(server.folder)
    client = mlflow.MlflowClient(server.uri)
    (found,) = client.search_runs([client.get_experiment_by_name("glue-wnli-sample").experiment_id])
    assert found.info.status == "FINISHED" and found.data.params["tracking.uri"].startswith("http://ann:***@")


@pytest.mark.torture
def test_a_search_keeps_its_storages_password_to_itself(tmp_path: Path, cache: Path, bpe_dir: Path) -> None:
    database = Postgres()
    try:
        url = make_url(database.new_database("secrets")).set(password=SECRET)
        storage = url.render_as_string(hide_password=False)
        printed, seen = watched(
            tmp_path, "lightning_glue.tune", *FLAGS, "--trials", "1", OPTUNA_STORAGE=storage,
            ROBERTA_BPE_DIR=str(bpe_dir),
        )  # fmt: skip
    finally:
        database.remove()
    assert "best trial 0" in printed, printed
    assert SECRET not in printed and not seen
    assert_private(tmp_path)


def test_a_storage_that_is_away_is_named_without_its_password(tmp_path: Path) -> None:
    storage = f"postgresql://optuna:{SECRET}@127.0.0.1:1/optuna"
    printed, _ = watched(tmp_path, "lightning_glue.tune", *FLAGS, "--storage", storage)
    assert printed.startswith("error: ") and printed.count("\n") == 1
    assert SECRET not in printed
