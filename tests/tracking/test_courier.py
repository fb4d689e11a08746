"""Delivery: positions that survive power cuts, refused and slow uploads, moved projects, shared runs, hostile names."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import sqlite3
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import botocore.exceptions
import mlflow
import pytest
import requests
from helpers.project import run
from helpers.servers import MlflowServer, Proxy, free_port
from helpers.store import leave_transaction
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mlflow.exceptions import MlflowException

from lightning_glue.errors import UserError
from lightning_glue.tracking.client import Unusable, connect
from lightning_glue.tracking.courier import Courier, is_hopeless
from lightning_glue.tracking.journal import Journal, Record, now
from lightning_glue.tracking.mirror import MANIFEST, is_refusal, newest_copy
from lightning_glue.tracking.state import State
from lightning_glue.tracking.uploads import REFUSED_TAG, Undelivered
from lightning_glue.utils.paths import artifact_path, artifact_uri, checkpoint_name, local_folder

FINISHED = {"status": ["FINISHED", 1_800_000_000_000]}
LAST, BEST = "checkpoints/last.ckpt", "checkpoints/best.ckpt"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, new_store: Callable[[Path], None]) -> Path:
    """A project folder with MLflow's default database."""
    project = tmp_path / "project"
    project.mkdir()
    new_store(project)
    monkeypatch.chdir(project)
    return project


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    server = MlflowServer(tmp_path_factory.mktemp("server"))
    server.start()
    yield server
    server.kill()


@pytest.fixture
def proxy(server: MlflowServer) -> Iterator[Proxy]:
    proxy = Proxy(server.port)
    yield proxy
    proxy.close()


def begin(root: Path = Path("mlruns/.journal"), uri: str | None = None, **start: object) -> Journal:
    """A journal with its first record."""
    folder = root / uuid.uuid4().hex
    folder.mkdir(parents=True)
    journal = Journal(folder)
    record: Record = {"id": folder.name, "uri": uri, "experiment": "e", "name": "n", "params": {"a": "1"}, "tags": {}}
    record |= {"run_id": None, "time": now(), "system_metrics": None, "config": {}}
    journal.append({"start": record | start})
    return journal


def point(step: int, name: str = "loss") -> Record:
    return {"metrics": [[name, 1.0, 1_700_000_000_000, step]]}


def stage(journal: Journal, path: str, content: bytes) -> None:
    """What a training does with an artifact for a store that is elsewhere."""
    target = journal.artifact(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.with_name("part").write_bytes(content)
    target.with_name("part").replace(target)
    journal.append({"artifact": path})


def steps(client: mlflow.MlflowClient, run_id: str | None, name: str = "loss") -> list[int]:
    return [metric.step for metric in client.get_metric_history(str(run_id), name)]


def wait_for(condition: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def stored(server: MlflowServer, run_id: str | None) -> dict[str, bytes]:
    """The files that the server has of a run."""
    (folder,) = Path(server.folder, "artifacts").glob(f"*/{run_id}/artifacts")
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# Positions


@pytest.mark.torture
@given(chance=st.randoms(use_true_random=False))
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_after_power_cuts_every_record_in_the_file_arrives_once(here: Path, chance: random.Random) -> None:
    """The journal is cut anywhere, and delivery.json is an older one, a newer one, or none; records are of one size."""
    journal, step, kept = begin(), 1000, [{}]
    for _ in range(4):
        for _ in range(chance.randint(0, 5)):
            journal.append(point(step := step + 1))
        Courier(journal.folder).deliver()
        kept.append({name: (journal.folder / name).read_bytes() for name in ("delivery.json",)})
        if chance.random() < 0.7:
            begins = journal.read()[0][1]
            os.truncate(journal.path, chance.randint(begins, journal.path.stat().st_size))
            journal.close()
            journal = Journal(journal.folder)
        if chance.random() < 0.5:
            for name in ("delivery.json", "uploads.json"):
                (journal.folder / name).unlink(missing_ok=True)
            for name, content in chance.choice(kept).items():
                (journal.folder / name).write_bytes(content)
    journal.append(FINISHED)
    courier = Courier(journal.folder)
    courier.deliver()
    written = [record["metrics"][0][3] for record, _ in journal.read() if "metrics" in record]
    found = steps(courier.client, courier.state.run_id)
    assert len(found) == len(set(found))
    assert set(written) <= set(found)
    (only,) = courier.client.search_runs(["1"], f"tags.`lightning_glue.journal` = '{journal.folder.name}'")
    assert only.info.status == "FINISHED"
    assert courier.left() == 0


def test_a_store_whose_last_writer_was_killed_takes_what_is_delivered(here: Path) -> None:
    leave_transaction(here)
    journal = begin()
    journal.append(point(1))
    journal.append(FINISHED)
    courier = Courier(journal.folder)
    courier.deliver()
    assert (State(journal.folder).error, steps(courier.client, courier.state.run_id)) == (None, [1])


def test_records_are_on_the_disk_before_the_position_is(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    fsync = os.fsync

    def watched(handle: int) -> None:
        calls.append(os.path.basename(os.readlink(f"/proc/self/fd/{handle}")).strip(".").partition(".")[0])
        fsync(handle)

    monkeypatch.setattr(os, "fsync", watched)
    journal = begin()
    for step in range(5):
        journal.append(point(step))
    Courier(journal.folder).deliver()
    assert calls.index("records") < calls.index("delivery")
    assert calls.count("records") == 1


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[1, 2]", b'{"offset": "9", "run_id": 7, "path": "/etc/x", "manifest": []}', b"\xff" * 9, b"[" * 9999],
)
def test_a_damaged_or_foreign_state_is_found_again(here: Path, content: bytes) -> None:
    journal = begin()
    journal.append(point(1))
    first = Courier(journal.folder)
    first.deliver()
    journal.append(point(2))
    for name in ("delivery.json", "uploads.json"):
        (journal.folder / name).write_bytes(content)
    courier = Courier(journal.folder)
    assert courier.deliver() == 3
    assert courier.state.run_id == first.state.run_id
    assert steps(courier.client, courier.state.run_id) == [1, 2]
    assert courier.state.path == journal.folder / "delivery.json"
    assert len(courier.client.search_runs(["1"])) == 1


def test_the_state_of_an_earlier_version_is_read(here: Path) -> None:
    journal = begin()
    (journal.folder / "delivery.json").write_text(json.dumps({
        "uri": "http://127.0.0.1:1", "run_id": "r", "run_name": "n", "artifact_uri": "mlflow-artifacts:/1/r/artifacts",
        "offset": 77, "registered": "", "uploaded": {LAST: "ab" * 32}, "error": None, "fatal": False,
    }))  # fmt: skip
    state = State(journal.folder)
    assert (state.offset, state.uploads, state.run_id) == (77, 77, "r")
    assert state.manifest == {LAST: {"file": f"checkpoints/last-{'ab' * 6}.ckpt", "sha256": "ab" * 32}}


# Refused and slow


def test_what_is_refused_holds_nothing_back_and_is_said(server: MlflowServer, proxy: Proxy, here: Path) -> None:
    proxy.rule = lambda method, path, size: 413 if method == "PUT" and size > 1000 else 0
    journal = begin(uri=proxy.uri)
    stage(journal, "git.diff", b"x" * 2000)
    stage(journal, LAST, b"y" * 3000)
    stage(journal, "notes.txt", b"small")
    journal.append(point(1))
    stage(journal, "fairseq/model.pt", b"z" * 2000)
    journal.append(FINISHED)
    journal.append({"register": True})
    courier = Courier(journal.folder)
    courier.deliver()
    client, run_id = mlflow.MlflowClient(server.uri), str(courier.state.run_id)
    found = client.get_run(run_id)
    assert (found.info.status, steps(client, run_id)) == ("FINISHED", [1])
    assert set(stored(server, run_id)) == {"notes.txt"}
    state = State(journal.folder)
    assert set(state.refused) == {"git.diff", LAST, "fairseq/model.pt"}
    assert state.refused["git.diff"].startswith("HTTP 413")
    assert "git.diff: HTTP 413" in found.data.tags[REFUSED_TAG]
    assert state.registered.startswith("not registered: fairseq/model.pt was refused (HTTP 413")
    assert courier.left() == 0

    calls = len(proxy.calls)
    stage(journal, LAST, b"y" * 4000)
    Courier(journal.folder).deliver()
    assert not [call for call in proxy.calls[calls:] if "checkpoints" in call]  # a watcher does not try again
    proxy.rule = lambda method, path, size: 0
    printed = run("lightning_glue.sync", cwd=here)
    assert "refused" not in printed.stderr
    files = stored(server, run_id)
    assert {"git.diff", "notes.txt", "fairseq/model.pt", MANIFEST} < set(files)
    assert b"y" * 4000 in files.values()
    assert "git.diff" not in client.get_run(run_id).data.tags[REFUSED_TAG]
    assert not (journal.folder / "artifacts").exists()


def test_one_upload_that_fails_for_now_holds_back_only_itself(server: MlflowServer, proxy: Proxy, here: Path) -> None:
    proxy.rule = lambda method, path, size: 500 if "big.bin" in path else 0
    journal = begin(uri=proxy.uri)
    stage(journal, "big.bin", b"x")
    stage(journal, "small.txt", b"y")
    journal.append(FINISHED)
    courier = Courier(journal.folder)
    with pytest.raises(Undelivered, match="big.bin: too many 500 error responses"):
        courier.deliver()
    client = mlflow.MlflowClient(server.uri)
    assert client.get_run(str(courier.state.run_id)).info.status == "FINISHED"
    assert set(stored(server, courier.state.run_id)) == {"small.txt"}
    assert State(journal.folder).error
    assert courier.left() == 2  # artifacts are known to have arrived only up to the first that has not
    assert "records not delivered" in run("lightning_glue.sync", cwd=here, check=False).stderr
    proxy.rule = lambda method, path, size: 0
    Courier(journal.folder).deliver()
    assert set(stored(server, courier.state.run_id)) == {"small.txt", "big.bin"}
    assert (State(journal.folder).error, courier.left()) == (None, 0)


def test_metrics_do_not_wait_for_a_slow_upload(server: MlflowServer, proxy: Proxy, here: Path) -> None:
    arrived, released = threading.Event(), threading.Event()

    def hold(method: str, path: str, size: int) -> int:
        if method == "PUT" and "last-" in path:
            arrived.set()
            released.wait(60)
        return 0

    proxy.rule = hold
    journal = begin(uri=proxy.uri)
    stage(journal, LAST, b"x" * 1000)
    courier = Courier(journal.folder, background=True)
    courier.deliver()
    assert arrived.wait(60)
    journal.append(point(7))
    journal.append(FINISHED)
    courier.deliver()
    client = mlflow.MlflowClient(server.uri)
    assert steps(client, courier.state.run_id) == [7]
    assert client.get_run(str(courier.state.run_id)).info.status == "FINISHED"
    assert courier.left() == 1
    released.set()

    def delivered() -> bool:
        courier.deliver()
        return courier.left() == 0

    wait_for(delivered)
    assert b"x" * 1000 in stored(server, courier.state.run_id).values()


def test_a_slow_upload_has_the_time_it_needs(
    server: MlflowServer, proxy: Proxy, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    proxy.rule = lambda method, path, size: time.sleep(2 * (method == "PUT")) or 0
    journal = begin(uri=proxy.uri)
    stage(journal, "notes.txt", b"words")
    courier = Courier(journal.folder)
    courier.deliver()
    assert stored(server, courier.state.run_id) == {"notes.txt": b"words"}
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "1"


def test_a_local_store_that_cannot_be_written_is_noted_on_the_run(here: Path) -> None:
    connect(None).create_experiment("e", "/proc/mlflow/artifacts")
    journal = begin()
    stage(journal, "notes.txt", b"words")
    journal.append(point(1))
    journal.append(FINISHED)
    courier = Courier(journal.folder)
    courier.deliver()
    found = courier.client.get_run(str(courier.state.run_id))
    assert (found.info.status, found.data.metrics) == ("FINISHED", {"loss": 1.0})
    assert "notes.txt: " in found.data.tags[REFUSED_TAG]
    assert journal.artifact("notes.txt").exists()


def test_a_record_that_no_store_takes_holds_nothing_back(here: Path) -> None:
    journal = begin(params={"a": "1", "b c!?*": "2", "c": "3"})
    journal.append({"metrics": [["good", 1.0, 5, 1], ["bad?name*", 1.0, 5, 1]]})
    journal.append(point(2))
    journal.append({"tags": {"x" * 9000: "long"}})
    journal.append(FINISHED)
    courier = Courier(journal.folder)
    courier.deliver()
    found = courier.client.get_run(str(courier.state.run_id))
    assert (found.info.status, found.data.metrics["loss"]) == ("FINISHED", 1.0)
    assert found.data.params == {"a": "1", "c": "3"}
    assert len(courier.state.left_out) == 3
    assert "parameter b c!?*" in found.data.tags[REFUSED_TAG]


def test_a_deleted_run_keeps_its_records_waiting(here: Path) -> None:
    journal = begin()
    courier = Courier(journal.folder)
    courier.deliver()
    courier.client.delete_run(str(courier.state.run_id))
    journal.append(point(1))
    with pytest.raises(Undelivered, match="active"):
        courier.deliver()
    courier.client.restore_run(str(courier.state.run_id))
    courier.deliver()
    assert steps(courier.client, courier.state.run_id) == [1]


def response(status: int) -> requests.HTTPError:
    answer = requests.Response()
    answer.status_code = status
    return requests.HTTPError(f"{status}", response=answer)


def amazon(status: int, code: str) -> Exception:
    answer = {"Error": {"Code": code, "Message": "m"}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return botocore.exceptions.ClientError(answer, "PutObject")


def wrapped(error: Exception) -> Exception:
    outer = RuntimeError("upload failed")
    outer.__cause__ = error
    return outer


@pytest.mark.parametrize(
    ("error", "refused"),
    [
        *((response(status), True) for status in (400, 401, 403, 405, 411, 413, 414, 415, 422, 501)),
        *((response(status), False) for status in (404, 408, 409, 423, 425, 429, 500, 502, 503, 504, 507)),
        (amazon(403, "AccessDenied"), True),
        (amazon(404, "NoSuchBucket"), True),
        (amazon(400, "EntityTooLarge"), True),
        (wrapped(amazon(403, "InvalidAccessKeyId")), True),
        (amazon(400, "RequestTimeout"), False),
        (amazon(503, "SlowDown"), False),
        (amazon(400, "ExpiredToken"), False),
        (wrapped(amazon(500, "InternalError")), False),
        (botocore.exceptions.NoCredentialsError(), True),
        (botocore.exceptions.EndpointConnectionError(endpoint_url="http://s3"), False),
        (ModuleNotFoundError("No module named 'boto3'"), True),
        (OSError(errno.EACCES, "Permission denied"), True),
        (OSError(errno.EROFS, "Read-only file system"), True),
        (OSError(errno.ENOENT, "No such file or directory"), True),
        (OSError(errno.ENOSPC, "No space left on device"), False),
        (OSError(errno.EIO, "Input/output error"), False),
        (OSError(errno.ESTALE, "Stale file handle"), False),
        (requests.ConnectionError("refused"), False),
        (requests.Timeout("slow"), False),
        (MlflowException("anything"), False),
        (RuntimeError("anything"), False),
    ],
    ids=str,
)
def test_what_is_refused_for_good_and_what_passes_by(error: Exception, refused: bool) -> None:
    assert is_refusal(error) == refused


@pytest.mark.parametrize(
    ("error", "hopeless"),
    [
        (Unusable("garbage"), True),
        (response(401), True),
        (response(403), True),
        (response(404), False),
        (response(503), False),
        (sqlite3.OperationalError("database is locked"), False),
        (MlflowException("anything"), False),
        (AttributeError("of a migration that another process makes"), False),
        (Undelivered("the study's run is not there yet"), False),
        (ConnectionError(), False),
    ],
    ids=str,
)
def test_only_a_users_mistake_is_final(error: Exception, hopeless: bool) -> None:
    assert is_hopeless(error) == hopeless


def test_a_database_that_is_busy_at_the_start_is_waited_for(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_glue.tracking.client._BUSY_SECONDS", 0.1)
    journal = begin()
    courier = Courier(journal.folder)
    with closing(sqlite3.connect("mlflow.db", isolation_level=None)) as writer:
        writer.execute("begin exclusive")
        with pytest.raises(Undelivered, match="database is locked"):
            courier.deliver()
    state = State(journal.folder)
    assert (state.error, state.fatal) == ("database is locked", False)
    assert courier.deliver() == 1


# Checkpoints


def test_a_checkpoint_whose_manifest_is_refused_for_now_is_not_forgotten(
    server: MlflowServer, proxy: Proxy, here: Path
) -> None:
    journal = begin(uri=proxy.uri)
    stage(journal, LAST, b"one")
    courier = Courier(journal.folder)
    courier.deliver()
    proxy.rule = lambda method, path, size: 429 if "manifest" in path and method == "PUT" else 0
    stage(journal, LAST, b"two")
    with pytest.raises(Undelivered):
        Courier(journal.folder).deliver()
    proxy.rule = lambda method, path, size: 0
    stage(journal, LAST, b"three")
    Courier(journal.folder).deliver()
    files = stored(server, courier.state.run_id)
    manifest = json.loads(files.pop(MANIFEST))
    assert files == {manifest[LAST]["file"]: b"three"}


def test_the_manifest_of_a_run_that_moves_on_keeps_what_it_had(server: MlflowServer, here: Path) -> None:
    first = begin(uri=server.uri)
    stage(first, BEST, b"best")
    stage(first, LAST, b"one")
    courier = Courier(first.folder)
    courier.deliver()
    second = begin(Path("elsewhere"), server.uri, run_id=courier.state.run_id)
    stage(second, LAST, b"two")
    Courier(second.folder).deliver()
    files = stored(server, courier.state.run_id)
    manifest = json.loads(files.pop(MANIFEST))
    assert {path: files[entry["file"]] for path, entry in manifest.items()} == {BEST: b"best", LAST: b"two"}
    assert len(files) == 2  # the first machine's last.ckpt is deleted
    second.append({"evict": BEST})
    Courier(second.folder).deliver()
    assert sorted(stored(server, courier.state.run_id).values(), key=len)[0] == b"two"
    assert len(stored(server, courier.state.run_id)) == 2


def test_a_staged_file_does_not_replace_a_newer_one_in_a_local_store(here: Path) -> None:
    journal = begin()
    courier = Courier(journal.folder)
    courier.deliver()
    store = local_folder(courier.state.artifact_uri)
    assert store
    stage(journal, LAST, b"stale")
    stage(journal, BEST, b"best")
    (store / "checkpoints").mkdir(parents=True)
    (store / LAST).write_bytes(b"newer")
    os.utime(journal.artifact(LAST), (1, 1))
    assert newest_copy(journal.folder, LAST, courier.state.artifact_uri) == store / LAST
    assert newest_copy(journal.folder, BEST, courier.state.artifact_uri) == journal.artifact(BEST)
    courier.deliver()
    assert ((store / LAST).read_bytes(), (store / BEST).read_bytes()) == (b"newer", b"best")
    assert set(json.loads((store / MANIFEST).read_text())) == {LAST, BEST}


@pytest.mark.parametrize("content", [b"", b"[]", b'{"../../x": {"file": "/etc/passwd", "sha256": "00"}}', b"\xff"])
def test_a_damaged_manifest_is_made_again_from_the_files(here: Path, content: bytes) -> None:
    journal = begin()
    courier = Courier(journal.folder)
    courier.deliver()
    store = local_folder(courier.state.artifact_uri)
    assert store
    (store / "checkpoints").mkdir(parents=True)
    for path in (LAST, BEST):
        (store / path).write_bytes(b"weights")
    (store / MANIFEST).write_bytes(content)
    journal.append({"artifact": LAST})
    courier.deliver()
    assert set(json.loads((store / MANIFEST).read_text())) == {LAST, BEST}


# Names


HOSTILE = ["/etc/x", "../x", "a/../../x", "..", ".", "", "a//b", "a/./b", "a\\..\\b", "a\0b", "a\nb", "./a"]


@pytest.mark.parametrize("name", HOSTILE)
def test_a_name_that_leads_elsewhere_is_refused(name: str) -> None:
    with pytest.raises(UserError):
        artifact_path(name)
    with pytest.raises(UserError):
        checkpoint_name(name)
    with pytest.raises(UserError):
        checkpoint_name(f"checkpoints/{name}.ckpt" if "/" in name or "\\" in name else name)


@pytest.mark.parametrize(
    "name",
    ["best.ckpt", "checkpoints/x", "checkpoints/.ckpt", "checkpoints/a.ckpt/..", "checkpoints/a b.ckpt", 7, None],
)
def test_only_checkpoints_are_names_of_checkpoints(name: object) -> None:
    with pytest.raises(UserError):
        checkpoint_name(name)
    assert checkpoint_name("checkpoints/step-7.ckpt") == "checkpoints/step-7.ckpt"
    assert artifact_path("figures/loss.png") == "figures/loss.png"


def test_a_hostile_journal_writes_and_deletes_nothing_elsewhere(here: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim.ckpt"
    victim.write_bytes(b"precious")
    journal = begin()
    ways = [str(victim), "../" * 9 + str(victim)[1:], "checkpoints/../../../../../victim.ckpt"]
    for way in ways:
        journal.append({"evict": way})
        journal.append({"artifact": way})
    journal.append(FINISHED)
    courier = Courier(journal.folder)
    courier.deliver()
    assert victim.read_bytes() == b"precious"
    assert set(State(journal.folder).refused) == set(ways)
    store = local_folder(courier.state.artifact_uri)
    assert store and not list(store.rglob("*.ckpt"))


@pytest.mark.parametrize("name", ["plain", "exp #3 é %41 ?", "50%25 off", "what?x", "a b"])
def test_a_plain_path_is_a_path_and_a_file_uri_is_quoted(name: str, tmp_path: Path) -> None:
    folder = tmp_path / name
    assert local_folder(str(folder)) == folder
    assert local_folder(folder.as_uri()) == folder
    assert local_folder(artifact_uri(folder)) == folder
    from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository

    assert Path(LocalArtifactRepository(artifact_uri(folder)).artifact_dir) == folder  # MLflow agrees
    for remote in ("s3://b/x", "mlflow-artifacts:/1/x", "", "gs://x", "dbfs:/x"):
        assert local_folder(remote) is None


# What is remembered


def test_a_moved_project_is_delivered_where_it_is(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = begin()
    journal.append(point(1))
    courier = Courier(journal.folder)
    courier.deliver()
    artifacts = local_folder(courier.state.artifact_uri)
    assert artifacts
    artifacts.mkdir(parents=True)
    new = here.parent / "new"
    monkeypatch.chdir(here.parent)
    here.rename(new)
    moved = Journal(new / journal.folder)
    stage(moved, "notes.txt", b"words")
    moved.append(point(2))
    moved.append(FINISHED)
    monkeypatch.chdir(new)
    later = Courier(moved.folder)
    later.deliver()
    assert later.state.uri == f"sqlite:///{new / 'mlflow.db'}"
    assert steps(connect(None), courier.state.run_id) == [1, 2]
    assert local_folder(later.state.artifact_uri) == new / artifacts.relative_to(here)
    assert (new / artifacts.relative_to(here) / "notes.txt").read_bytes() == b"words"
    assert not here.exists()


def test_a_state_with_absolute_paths_of_a_moved_project_is_understood(here: Path) -> None:
    journal = begin()
    old = {"uri": "sqlite:////gone/old/mlflow.db", "run_id": "r", "artifact_uri": "/gone/old/mlruns/1/r/artifacts"}
    (journal.folder / "delivery.json").write_text(json.dumps(old | {"offset": 9}))
    state = State(journal.folder)
    assert state.uri == f"sqlite:///{here / 'mlflow.db'}"
    assert state.artifact_uri == str(here / "mlruns/1/r/artifacts")


def test_a_database_that_is_gone_is_not_made_again(here: Path) -> None:
    journal = begin()
    Courier(journal.folder).deliver()
    journal.append(point(1))
    Path("mlflow.db").unlink()
    with pytest.raises(Undelivered, match=rf"{here}/mlflow\.db, which has run \w+, is gone; put it back, or remove"):
        Courier(journal.folder).deliver()
    assert not Path("mlflow.db").exists()
    Path("mlflow.db").touch()
    shutil.rmtree(journal.folder / "..", ignore_errors=True)


def test_a_server_with_a_new_address_gets_the_rest(
    server: MlflowServer, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy = Proxy(server.port)
    journal = begin(uri=proxy.uri)
    Courier(journal.folder).deliver()
    proxy.close()
    journal.append(point(1))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    courier = Courier(journal.folder)
    courier.deliver()
    assert State(journal.folder).uri == server.uri
    assert steps(courier.client, courier.state.run_id) == [1]


def test_a_server_without_the_run_does_not_take_it_over(
    server: MlflowServer, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = begin(uri=server.uri)
    Courier(journal.folder).deliver()
    journal.append(point(1))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
    courier = Courier(journal.folder)
    courier.deliver()
    assert State(journal.folder).uri == server.uri
    assert steps(courier.client, courier.state.run_id) == [1]


# Shared runs


def shared(create: bool, value: str = "u1") -> dict[str, object]:
    return {"tag": "study", "value": value, "create": create}


def test_several_journals_write_one_shared_run(here: Path) -> None:
    maker = begin(shared=shared(True), params={"trials": "4"})
    helper = begin(shared=shared(False), params={"trials": "4", "more": "1"})
    with pytest.raises(Undelivered, match="the study's run is not there yet"):
        Courier(helper.folder).deliver()
    assert not State(helper.folder).fatal
    maker.append(point(1))
    one = Courier(maker.folder)
    one.deliver()
    helper.append(point(2))
    helper.append({"tags": {"by": "helper"}})
    two = Courier(helper.folder)
    two.deliver()
    maker.append(point(3))
    maker.append(FINISHED)
    one.deliver()
    assert one.state.run_id == two.state.run_id
    found = one.client.get_run(str(one.state.run_id))
    assert sorted(steps(one.client, one.state.run_id)) == [1, 2, 3]
    assert (found.info.status, found.data.tags["by"], found.data.tags["study"]) == ("FINISHED", "helper", "u1")
    assert found.data.params == {"trials": "4", "more": "1"}
    helper.append({"status": ["KILLED", 5]})
    two.deliver()
    assert one.client.get_run(str(one.state.run_id)).info.status == "KILLED"


def test_a_shared_run_whose_maker_never_comes_is_made_in_the_end(here: Path) -> None:
    journal = begin(shared=shared(False), time=now() - 121_000)
    courier = Courier(journal.folder)
    courier.deliver()
    later = begin(shared=shared(True))
    Courier(later.folder).deliver()
    assert State(later.folder).run_id == courier.state.run_id
    assert len(courier.client.search_runs(["1"])) == 1


def test_a_trial_goes_below_its_study_as_soon_as_that_is_there(here: Path) -> None:
    trial = begin(parent={"tag": "study", "value": "u1"})
    trial.append(point(1))
    below = Courier(trial.folder)
    below.deliver()
    assert "mlflow.parentRunId" not in below.client.get_run(str(below.state.run_id)).data.tags
    assert below.left() == 0
    study = begin(shared=shared(True))
    above = Courier(study.folder)
    above.deliver()
    trial.append(FINISHED)
    below.deliver()
    found = below.client.get_run(str(below.state.run_id))
    assert found.data.tags["mlflow.parentRunId"] == above.state.run_id
    assert found.info.status == "FINISHED"


# The whole way


def test_a_training_in_an_oddly_named_folder_keeps_everything_inside(
    tmp_path: Path, bpe_dir: Path, cache: Path, new_store: Callable[[Path], None]
) -> None:
    folder = tmp_path / "exp #3 é %41 ?"
    folder.mkdir()
    new_store(folder)
    flags = ["--task", "WNLI", "--model", "tiny", "--data", "sample", "--gpus", "0", "trainer.max_steps=4"]
    flags += ["data.batch_size=32", "tracking.system_metrics_seconds=null"]
    trained = run("lightning_glue.train", *flags, cwd=folder, timeout=300, ROBERTA_BPE_DIR=str(bpe_dir))
    assert "glue-wnli-sample version 1" in trained.stdout, trained.stdout
    assert len(list(folder.rglob("best.ckpt"))) == 1
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]
    (journal,) = (folder / "mlruns" / ".journal").iterdir()
    run_id = str(State(journal).run_id)
    scored = run("lightning_glue.evaluate", run_id, "--data", "sample", cwd=folder, timeout=300,
                 ROBERTA_BPE_DIR=str(bpe_dir))  # fmt: skip
    assert "accuracy" in scored.stdout
