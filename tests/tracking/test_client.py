"""Stores that several processes use first, that are busy, damaged, of another version, or were moved."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import mlflow
import pytest
from helpers.project import ROOT
from helpers.store import leave_transaction

from lightning_glue.errors import UserError
from lightning_glue.tracking import client
from lightning_glue.tracking.client import Unusable, connect, open_store, store_uri
from lightning_glue.utils.paths import local_folder, sqlite_file, sqlite_uri

NewStore = Callable[[Path], None]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def tables(database: Path) -> set[str]:
    with closing(sqlite3.connect(database)) as connection:
        return {name for (name,) in connection.execute("select name from sqlite_master where type = 'table'")}


@pytest.mark.torture
def test_four_processes_at_once_make_one_whole_database(here: Path) -> None:
    code = "from lightning_glue.tracking.client import connect; print(len(connect(None).search_experiments()))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    started = [subprocess.Popen(command, env=environment, stdout=-1, stderr=-1, text=True) for _ in range(4)]
    outputs = [process.communicate(timeout=300) for process in started]
    assert [output for output, _ in outputs] == ["1\n"] * 4, outputs
    assert "runs" in tables(here / "mlflow.db")
    assert not [name for name in tables(here / "mlflow.db") if name.startswith("_alembic")]
    assert sorted(path.name for path in here.iterdir()) == [".mlflow.db.lock", "mlflow.db"]


def test_tables_are_made_in_a_file_of_another_program(here: Path) -> None:
    with closing(sqlite3.connect("mlflow.db")) as connection:
        connection.execute("create table studies (id integer)")
    connect(None)
    assert {"runs", "studies"} <= tables(here / "mlflow.db")


def test_a_busy_database_is_no_reason_to_give_up(
    here: Path, new_store: NewStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    new_store(here)
    monkeypatch.setattr(client, "_BUSY_SECONDS", 0.1)
    with closing(sqlite3.connect("mlflow.db", isolation_level=None)) as writer:
        writer.execute("begin exclusive")
        with pytest.raises(sqlite3.OperationalError, match="locked"):
            connect(None)
        with pytest.raises(UserError, match=r"MLflow at .*mlflow\.db cannot be opened: database is locked"):
            open_store(None)
    assert connect(None).search_experiments()


def test_a_database_of_another_version_is_one_line(
    here: Path, new_store: NewStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "_STILL_SECONDS", 0.5)
    new_store(here)

    def set_revision(revision: str) -> None:
        with closing(sqlite3.connect("mlflow.db")) as connection:
            connection.execute("update alembic_version set version_num = ?", (revision,))
            connection.commit()

    head = client._head()
    set_revision("c8d9e0f1a2b3")
    with pytest.raises(Unusable, match=r"older MLflow .*c8d9e0f1a2b3.*: copy it, then mlflow db upgrade 'sqlite:///"):
        connect(None)
    set_revision("ffffffffffff")
    with pytest.raises(Unusable, match=r"newer MLflow .*ffffffffffff"):
        open_store(None)
    set_revision(head)
    assert connect(None).search_experiments()


def test_tables_that_a_server_is_just_making_are_waited_for(here: Path, new_store: NewStore) -> None:
    new_store(here)
    head = client._head()

    def set_revision(revision: str) -> None:
        with closing(sqlite3.connect(here / "mlflow.db")) as connection:
            connection.execute("update alembic_version set version_num = ?", (revision,))
            connection.commit()

    set_revision("c8d9e0f1a2b3")
    timer = threading.Timer(0.5, set_revision, [head])
    timer.start()
    assert connect(None).search_experiments()
    timer.join()


@pytest.mark.parametrize("content", [b"this is no database" * 100, bytes(range(256)) * 20])
def test_garbage_is_one_line(here: Path, content: bytes) -> None:
    Path("mlflow.db").write_bytes(content)
    with pytest.raises(Unusable, match=r"mlflow\.db is no database \(file is not a database\); move it away") as error:
        connect(None)
    assert "\n" not in str(error.value)
    assert Path("mlflow.db").read_bytes() == content


@pytest.mark.parametrize(
    ("address", "text"),
    [
        ("127.0.0.1:5600", "did you mean http://127.0.0.1:5600"),
        ("localhost:5600", "did you mean http://localhost:5600"),
        ("./mlruns", "expected http://HOST:PORT or sqlite:///FILE"),
        ("file:///tmp/mlruns", "expected http://HOST:PORT or sqlite:///FILE"),
        ("gopher://somewhere", "is no tracking store"),
        ("oracle://ann:geheim@db/x", "is no tracking store"),
        ("/proc/nowhere/x.db", "expected http://HOST:PORT or sqlite:///FILE"),
        ("sqlite:////proc/nowhere/x.db", "cannot be made"),
    ],
)
def test_what_is_no_address_of_a_store_is_one_line(address: str, text: str) -> None:
    with pytest.raises(Unusable) as error:
        connect(address)
    assert text in str(error.value)
    assert "\n" not in str(error.value)
    assert "geheim" not in str(error.value)


@pytest.mark.parametrize("name", ["plain", "a b", "exp #3 é %41 ?", "50%25 off", "what?x=1", "ü&;=+"])
def test_a_database_is_where_its_address_says(
    name: str, tmp_path: Path, new_store: NewStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / name).mkdir()
    new_store(tmp_path / name)
    monkeypatch.chdir(tmp_path / name)
    client = connect(None)
    assert sqlite_file(client.tracking_uri) == tmp_path / name / "mlflow.db"
    client.create_experiment("known")
    client.create_registered_model("model")
    assert connect(sqlite_uri(tmp_path / name / "mlflow.db")).get_experiment_by_name("known")
    assert connect("sqlite:///mlflow.db").get_experiment_by_name("known")
    assert open_store(None)[1] == store_uri(None)
    assert [path.name for path in tmp_path.iterdir()] == [name]  # no folder of a quoted name beside it


@pytest.mark.parametrize("copied", [False, True])
def test_a_moved_project_has_its_artifacts_where_it_is(
    copied: bool, tmp_path: Path, new_store: NewStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = tmp_path / "old", tmp_path / "new #2"
    old.mkdir()
    new_store(old)
    monkeypatch.chdir(old)
    client = connect(None)
    run = client.create_run(client.create_experiment("e"))
    (tmp_path / "a.txt").write_text("before")
    client.log_artifact(run.info.run_id, str(tmp_path / "a.txt"), "sub")
    monkeypatch.chdir(tmp_path)
    (shutil.copytree if copied else shutil.move)(old, new)
    monkeypatch.chdir(new)
    client = connect(None)
    found = client.get_run(run.info.run_id)
    assert local_folder(found.info.artifact_uri) == new / "mlruns" / "1" / run.info.run_id / "artifacts"
    assert Path(client.download_artifacts(run.info.run_id, "sub/a.txt", str(tmp_path))).read_text() == "before"
    later = client.create_run(run.info.experiment_id)
    client.log_artifact(later.info.run_id, str(tmp_path / "a.txt"))
    assert (new / "mlruns" / "1" / later.info.run_id / "artifacts" / "a.txt").exists()
    assert old.exists() == copied


def test_a_store_that_never_moved_keeps_its_addresses(
    tmp_path: Path, new_store: NewStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A database elsewhere, artifacts where the training was, and those of another project beside it."""
    (tmp_path / "db").mkdir()
    (tmp_path / "work").mkdir()
    new_store(tmp_path / "db")
    monkeypatch.chdir(tmp_path / "work")
    uri = sqlite_uri(tmp_path / "db" / "mlflow.db")
    client = connect(uri)
    run = client.create_run(client.create_experiment("e"))
    (tmp_path / "db" / "mlruns" / "1").mkdir(parents=True)
    assert connect(uri).get_run(run.info.run_id).info.artifact_uri == run.info.artifact_uri
    assert run.info.artifact_uri.startswith(str(tmp_path / "work"))


def test_readers_open_no_store_that_is_missing(here: Path) -> None:
    for uri in (None, "sqlite:///x.db", f"sqlite:///{here}/a%20b.db"):
        with pytest.raises(UserError, match="does not exist; train first"):
            open_store(uri)
    assert not list(here.iterdir())
    assert not mlflow.active_run()


@pytest.mark.parametrize("opened", [connect, lambda uri: open_store(uri)[0]], ids=["connect", "open_store"])
def test_what_a_killed_process_was_at_is_taken_back(
    opened: Callable[[None], mlflow.MlflowClient], here: Path, new_store: NewStore
) -> None:
    """As by a scheduler's SIGKILL or a power cut: whoever comes next, to read or to write, can."""
    new_store(here)
    leave_transaction(here)
    assert "never committed" not in {one.name for one in opened(None).search_experiments()}
    assert not (here / "mlflow.db-journal").exists()
