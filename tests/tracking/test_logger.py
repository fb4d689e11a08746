"""The tracker, its watcher and sync against a real MLflow server that goes away and comes back."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlflow
import pytest
from helpers.project import ROOT, run
from helpers.servers import MlflowServer, Proxy, free_port

from lightning_glue.data.binarize import SplitInfo
from lightning_glue.errors import UserError
from lightning_glue.tracking import logger, provenance, watcher
from lightning_glue.tracking.courier import Courier
from lightning_glue.tracking.journal import Journal
from lightning_glue.tracking.journals import find_journal
from lightning_glue.tracking.known_runs import _CONFIGURATION as CONFIGURATION
from lightning_glue.tracking.known_runs import is_away, unfinished_runs
from lightning_glue.tracking.logger import MLflowTracker
from lightning_glue.tracking.mirror import Mirror
from lightning_glue.tracking.state import State


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    server = MlflowServer(tmp_path_factory.mktemp("server"))
    yield server
    server.kill()


@pytest.fixture
def server(running: MlflowServer) -> MlflowServer:
    if running.process is None:
        running.start()
    return running


@pytest.fixture
def experiment(request: pytest.FixtureRequest) -> str:
    """One for each test, on the server they share."""
    return request.node.name


@pytest.fixture(autouse=True)
def _own_folder_and_watcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr(logger, "_FINISH_SECONDS", 20.0)
    yield
    process = watcher._process
    if process and process.stdin:
        process.kill()
        process.wait()
        watcher._process = None


def wait_for(condition: Callable[[], bool], seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def history(uri: str, run_id: str, name: str) -> list[tuple[int, float]]:
    return [(m.step, m.value) for m in mlflow.MlflowClient(uri).get_metric_history(run_id, name)]


def the_run(uri: str, experiment: str) -> mlflow.entities.Run:
    client = mlflow.MlflowClient(uri)
    (found,) = client.search_runs([client.get_experiment_by_name(experiment).experiment_id])
    return found


def test_the_end_of_a_run_waits_for_an_error_to_pass(server: MlflowServer, experiment: str) -> None:
    """A scheduler ends the watcher with the job: the run would seem to be at work for ever."""
    proxy = Proxy(server.port)
    tracker = MLflowTracker(proxy.uri, experiment, "a name")
    tracker.start({}, {}, None)
    ends: list[str] = []
    proxy.rule = lambda method, path, size: 400 * (path.endswith("runs/update") and not ends.append(path) and len(ends) < 3)
    tracker.finish("FINISHED")
    assert len(ends) == 3
    assert the_run(server.uri, experiment).info.status == "FINISHED"
    proxy.close()


@pytest.mark.torture
def test_everything_arrives_though_the_server_goes_away(
    server: MlflowServer, experiment: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tracker = MLflowTracker(server.uri, experiment, "a name")
    tracker.start({"optimizer.lr": 1e-5, "long": "x" * 7000}, {"version.torch": "2"}, None)
    tracker.log_inputs("RTE", {"train": SplitInfo("train.tsv", "ab" * 32, 10, 0, 1)})
    tracker.log_metrics({"train/loss": 1.0, "epoch": 0.0}, step=1)
    wait_for(lambda: history(server.uri, tracker.run_id, "train/loss") == [(1, 1.0)])
    server.kill()
    tracker.log_metrics({"train/loss": 0.5}, step=2)
    wait_for(lambda: State(tracker.folder).error is not None)
    capsys.readouterr()
    tracker._check_delivery()
    tracker._check_delivery()
    warned = capsys.readouterr().err
    assert re.fullmatch(r"warning: MLflow at .* does not answer .* training goes on, .* keeps everything .*\n", warned)
    server.start()
    tracker.log_metrics({"train/loss": float("nan")}, step=3)
    tracker.log_metrics({"train/loss": 0.25}, step=4)
    with tracker.artifact_folder("fairseq") as folder:
        (folder / "input0").mkdir()
        (folder / "input0" / "dict.txt").write_text("a 1\n")
    assert tracker.local_artifacts is None
    wait_for(lambda: State(tracker.folder).error is None)
    tracker.finish("FINISHED")
    tracker.set_tags({"late": "yes"})

    client = mlflow.MlflowClient(server.uri)
    wait_for(lambda: "late" in client.get_run(tracker.run_id).data.tags)
    run = client.get_run(tracker.run_id)
    assert (run.info.status, run.info.run_name) == ("FINISHED", "a name")
    points = history(server.uri, tracker.run_id, "train/loss")
    assert [step for step, _ in points] == [1, 2, 3, 4]
    assert str([value for _, value in points]) == "[1.0, 0.5, nan, 0.25]"
    assert "epoch" not in run.data.metrics
    assert run.data.params["optimizer.lr"] == "1e-05"
    assert len(run.data.params["long"]) == 6000
    assert run.inputs.dataset_inputs[0].dataset.digest == "ab" * 16
    fetched = mlflow.artifacts.download_artifacts(
        run_id=tracker.run_id, artifact_path="fairseq/input0/dict.txt", tracking_uri=server.uri, dst_path=str(tmp_path)
    )
    assert Path(fetched).read_text() == "a 1\n"


@pytest.mark.torture
def test_a_server_that_fails_and_is_slow_gets_everything_later(server: MlflowServer, experiment: str) -> None:
    proxy = Proxy(server.port)
    tracker = MLflowTracker(proxy.uri, experiment, "x")
    tracker.start({}, {}, None)
    proxy.fail = 503
    slowest = 0.0
    for step in range(2500):
        begin = time.perf_counter()
        tracker.log_metrics({"loss": 1 / (step + 1)}, step)
        slowest = max(slowest, time.perf_counter() - begin)
    wait_for(lambda: State(tracker.folder).error is not None)
    proxy.fail, proxy.delay = 0, 0.3
    wait_for(lambda: State(tracker.folder).error is None)
    batches = len([call for call in proxy.calls if call.endswith("log-batch")])
    tracker.finish("FINISHED")
    proxy.close()
    assert history(server.uri, tracker.run_id, "loss") == [(step, 1 / (step + 1)) for step in range(2500)]
    assert batches < 100  # in batches, not one by one


def test_without_any_server_sync_delivers_later_and_once(
    server: MlflowServer, experiment: str, capsys: pytest.CaptureFixture[str]
) -> None:
    server.kill()
    before = time.time()
    tracker = MLflowTracker(server.uri, experiment, "a name")
    tracker.start({"a": 1}, {"mlflow.parentRunId": "0" * 32}, None)
    assert f"warning: MLflow at {server.uri} does not answer" in capsys.readouterr().err
    started = time.time()
    for step in range(20):
        tracker.log_metrics({"loss": step / 7}, step)
    tracker.log_text("words", "notes.txt")
    assert tracker.run_id == tracker.journal_id
    tracker.finish("KILLED")
    assert "have not reached MLflow" in capsys.readouterr().err
    watcher._process.kill()
    failed = run("lightning_glue.sync", cwd=Path.cwd(), check=False)
    assert failed.returncode == 1
    assert f"23 records not delivered to {server.uri}: " in failed.stderr
    time.sleep(1)
    server.start()
    first = run("lightning_glue.sync", tracker.journal_id, cwd=Path.cwd())
    second = run("lightning_glue.sync", cwd=Path.cwd())
    found = the_run(server.uri, experiment)
    assert "23 records delivered" in first.stdout
    assert second.stdout == "1 of 1 journals delivered in full\n"
    assert (found.info.status, found.info.run_name) == ("KILLED", "a name")
    assert before <= found.info.start_time / 1000 + 1e-3 <= started + 1e-3
    assert started <= found.info.end_time / 1000 + 1e-3 <= time.time() - 1
    assert found.data.tags["mlflow.parentRunId"] == "0" * 32
    assert history(server.uri, found.info.run_id, "loss") == [(step, step / 7) for step in range(20)]
    assert [i.path for i in mlflow.MlflowClient(server.uri).list_artifacts(found.info.run_id)] == ["notes.txt"]
    unknown = run("lightning_glue.sync", "nowhere", cwd=Path.cwd(), check=False)
    assert (unknown.returncode, "nowhere: no such run in mlruns/.journal" in unknown.stderr) == (2, True)


@pytest.mark.torture
def test_kill_9_in_the_middle_of_deliveries_and_two_at_once(server: MlflowServer, experiment: str) -> None:
    """Sync after sync is killed at some moment, two at a time; what arrives is the journal, each point once."""
    tracker = MLflowTracker(f"http://127.0.0.1:{free_port()}", experiment, "x")
    tracker.start({f"key{i}": i for i in range(150)}, {}, None)
    watcher._process.kill()
    watcher._process.wait()
    for step in range(6000):
        tracker._append({"metrics": [[name, step / 3, 1_700_000_000_000 + step, step] for name in ("a", "b")]})
    tracker._append({"status": ["FINISHED", 1_800_000_000_000]})
    tracker._journal.release()
    proxy = Proxy(server.port, delay=0.05)
    command = [sys.executable, "-m", "lightning_glue.sync", "--uri", proxy.uri]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    kills = 0
    for moment in range(3, 40, 6):  # calls of the server after which both are killed
        before = len(proxy.calls)
        pair = [subprocess.Popen(command, env=environment, stdout=-1, stderr=-1) for _ in range(2)]
        wait_for(lambda before=before, moment=moment, pair=pair: (
            len(proxy.calls) >= before + moment or all(one.poll() is not None for one in pair)
        ))  # fmt: skip
        kills += sum(one.poll() is None for one in pair)
        for one in pair:
            one.kill()
            one.communicate()
        if State(tracker.folder).is_delivered(tracker._journal.path.stat().st_size):
            break
    result = run("lightning_glue.sync", "--uri", proxy.uri, cwd=Path.cwd())
    proxy.close()
    assert kills >= 2
    assert "1 of 1 journals delivered in full" in result.stdout
    found = the_run(server.uri, experiment)
    assert (found.info.status, found.info.end_time) == ("FINISHED", 1_800_000_000_000)
    assert len(found.data.params) == 150
    for name in ("a", "b"):
        points = mlflow.MlflowClient(server.uri).get_metric_history(found.info.run_id, name)
        assert [(p.step, p.value, p.timestamp) for p in points] == [
            (step, step / 3, 1_700_000_000_000 + step) for step in range(6000)
        ]


def test_what_is_written_during_an_upload_waits_for_the_next(
    server: MlflowServer, experiment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The training may come to its end while an earlier artifact is on its way."""
    tracker = MLflowTracker(server.uri, experiment, "x")
    tracker.start({}, {}, None)
    watcher._process.kill()
    watcher._process.wait()

    def write(name: str) -> None:
        target = tracker.artifacts / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(name)
        tracker.log_artifact(name)

    put = Mirror.put

    def overtaken(self: Mirror, path: str) -> None:
        put(self, path)
        if path == "early.txt":
            write("figures/late.txt")
            tracker._append({"status": ["FINISHED", 1_800_000_000_000]})

    monkeypatch.setattr(Mirror, "put", overtaken)
    write("early.txt")
    courier = Courier(tracker.folder)
    courier.deliver()
    assert courier.deliver() == 2
    client = mlflow.MlflowClient(server.uri)
    assert Path(client.download_artifacts(tracker.run_id, "figures/late.txt")).read_text() == "figures/late.txt"
    assert not tracker.artifacts.exists()  # the server has it all


def test_checkpoints_are_mirrored_whole_with_their_digest_and_old_ones_evicted(
    server: MlflowServer, experiment: str
) -> None:
    tracker = MLflowTracker(server.uri, experiment, "x")
    tracker.start({}, {}, None)
    folder = tracker.artifacts / "checkpoints"
    folder.mkdir(parents=True)
    client = mlflow.MlflowClient(server.uri)

    def stored() -> list[str]:
        return sorted(item.path for item in client.list_artifacts(tracker.run_id, "checkpoints"))

    for content in (b"first", b"second" * 10**6, b"third"):
        (folder / "last.ckpt").write_bytes(content)
        tracker.log_artifact("checkpoints/last.ckpt")
        wait_for(lambda: State(tracker.folder).is_delivered(tracker._journal.path.stat().st_size))
        assert len(stored()) == 2
    server.kill()
    for name in ("best.ckpt", "step-4.ckpt"):
        (folder / name).write_bytes(b"best")
        tracker.log_artifact(f"checkpoints/{name}")
    wait_for(lambda: State(tracker.folder).error is not None)
    server.start()
    wait_for(lambda: State(tracker.folder).error is None)
    wait_for(lambda: len(stored()) == 4)
    (folder / "step-4.ckpt").unlink()
    tracker.evict_artifact("checkpoints/step-4.ckpt")
    tracker.finish("KILLED")
    manifest = json.loads(Path(client.download_artifacts(tracker.run_id, "checkpoints/manifest.json")).read_text())
    assert set(manifest) == {"checkpoints/best.ckpt", "checkpoints/last.ckpt"}
    assert stored() == sorted([*(entry["file"] for entry in manifest.values()), "checkpoints/manifest.json"])
    from lightning_glue.training.resume import _fetch_checkpoints

    fetched = _fetch_checkpoints(server.uri, tracker.run_id)
    assert fetched.read_bytes() == b"third"
    assert fetched.with_name("best.ckpt").read_bytes() == b"best"
    next(Path(server.folder, "artifacts").rglob("last-*.ckpt")).write_bytes(b"thirt")
    with pytest.raises(UserError, match=r"checkpoints/last-\w+\.ckpt is damaged"):
        _fetch_checkpoints(server.uri, tracker.run_id)


def test_a_run_resumed_elsewhere_keeps_one_history(
    server: MlflowServer, experiment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first machine's journal is delivered only after the second one has gone over the same steps again."""
    tracker = MLflowTracker(server.uri, experiment, "x")
    tracker.start({"a": 1}, {}, None)
    tracker.log_metrics({"loss": 1.0}, 1)
    wait_for(lambda: history(server.uri, tracker.run_id, "loss") == [(1, 1.0)])
    watcher._process.kill()
    watcher._process.wait()
    for step in (2, 3):
        tracker._append({"metrics": [["loss", 1 / step, 5, step]]})
    tracker._journal.release()
    (tmp_path / "elsewhere").mkdir()
    with monkeypatch.context() as patch:
        patch.chdir(tmp_path / "elsewhere")
        second = MLflowTracker(server.uri, experiment, "x")
        second.start({"a": 1}, {"where": "elsewhere"}, None, resume=tracker.run_id)
        assert second.run_id == tracker.run_id
        for step in range(1, 6):
            second.log_metrics({"loss": 1 / step}, step)
        second.finish("FINISHED")
    run("lightning_glue.sync", cwd=Path.cwd())
    assert history(server.uri, tracker.run_id, "loss") == [(step, 1 / step) for step in range(1, 6)]
    assert the_run(server.uri, experiment).info.status == "FINISHED"
    with pytest.raises(UserError, match=rf"run {tracker.run_id} is finished; there is nothing to resume"):
        MLflowTracker(server.uri, experiment, "x", tmp_path / "third").start({}, {}, None, resume=tracker.run_id)


@pytest.mark.torture
def test_a_training_that_is_killed_reads_killed(tmp_path: Path) -> None:
    code = """
import os, signal
from lightning_glue.tracking.logger import MLflowTracker
tracker = MLflowTracker(None, "glue-rte", "x")
tracker.start({}, {}, None)
tracker.log_metrics({"loss": 1.0}, 1)
os.kill(os.getpid(), signal.SIGKILL)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == -signal.SIGKILL
    uri = f"sqlite:///{Path.cwd() / 'mlflow.db'}"
    wait_for(lambda: the_run(uri, "glue-rte").info.status == "KILLED")
    assert the_run(uri, "glue-rte").data.metrics == {"loss": 1.0}


def test_a_run_at_work_cannot_be_resumed(tmp_path: Path) -> None:
    tracker = MLflowTracker(None, "glue-rte", "x")
    tracker.start({}, {}, None)
    other = "from lightning_glue.tracking.logger import MLflowTracker\n"
    other += "MLflowTracker(None, 'glue-rte', 'x').start({}, {}, None, "
    result = subprocess.run(
        [sys.executable, "-c", f"{other}{tracker.run_id!r})"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert f"run {tracker.run_id} is being trained by another process" in result.stderr
    tracker.finish("FINISHED")


def test_a_database_that_cannot_be_used_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"MLflow at sqlite:////proc/nowhere/x\.db cannot be used: .*; see tracking\.uri"
    ) as error:
        MLflowTracker("sqlite:////proc/nowhere/x.db", "glue-rte", "x").start({}, {}, None)
    assert "\n" not in str(error.value)
    assert not Path("mlruns").exists()


def test_large_files_go_straight_into_a_local_store() -> None:
    tracker = MLflowTracker(None, "glue-rte", "x")
    tracker.start({}, {}, None)
    with tracker.artifact_folder("checkpoints") as folder:
        assert folder.is_relative_to(Path.cwd() / "mlruns")
        (folder / "best.ckpt").write_bytes(b"weights")
    assert tracker.uri == f"sqlite:///{Path.cwd() / 'mlflow.db'}"  # what plain `mlflow ui` opens
    assert tracker.run_id in tracker.describe()
    tracker.finish("KILLED")
    assert the_run(tracker.uri, "glue-rte").info.status == "KILLED"
    assert [path.name for path in Path.cwd().rglob("*.ckpt")] == ["best.ckpt"]
    assert find_journal(Path("mlruns/.journal"), tracker.run_id) == tracker.folder
    assert not Courier(tracker.folder).deliver()
    assert Journal(tracker.folder).read()[-1][0]["status"][0] == "KILLED"


@pytest.fixture
def store(new_store: Callable[[Path], None]) -> str:
    new_store(Path.cwd())
    return f"sqlite:///{Path.cwd() / 'mlflow.db'}"


def finished(tracker: MLflowTracker, status: str = "KILLED", **start: Any) -> MLflowTracker:
    """A run that was started and has ended, all of it delivered."""
    tracker.start(start.pop("params", {}), {CONFIGURATION: "digest", "mlflow.user": provenance.user(), **start}, None)
    tracker.finish(status)
    return tracker


ROOT_HERE = Path("mlruns/.journal")


def test_auto_takes_the_newest_of_ones_own_unfinished_trainings(store: str) -> None:
    """Not a study's, not somebody else's, not a finished one, not one at work; a delivery changes no order."""
    made = {name: finished(MLflowTracker(None, "e", name)) for name in ("old", "new")}
    finished(MLflowTracker(None, "e", "done"), "FINISHED")
    finished(MLflowTracker(None, "e", "trial"), **{"mlflow.parentRunId": "0" * 32})
    finished(MLflowTracker(None, "e", "other"), **{"mlflow.user": "bob"})
    finished(MLflowTracker(None, "e", "otherwise"), **{CONFIGURATION: "another"})
    at_work = MLflowTracker(None, "e", "at work")
    at_work.start({}, {CONFIGURATION: "digest"}, None)
    State(made["old"].folder).save()
    assert unfinished_runs(ROOT_HERE, None, "e", "digest") == [made[name].journal_id for name in ("new", "old")]
    at_work.finish("KILLED")


def test_a_deleted_run_is_passed_over_and_refused(store: str, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = (finished(MLflowTracker(None, "e", name)) for name in ("first", "second"))
    mlflow.MlflowClient(store).delete_run(second.run_id)
    assert unfinished_runs(ROOT_HERE, None, "e", "digest") == [first.journal_id]
    said = capsys.readouterr().err
    assert f"--resume auto passes over run {second.run_id}, which was deleted from MLflow at {store}" in said
    with pytest.raises(UserError, match=f"run {second.run_id} was deleted from .*mlflow runs restore --run-id"):
        MLflowTracker(None, "e", "x").start({}, {}, None, resume=second.run_id)
    Path("mlflow.db").unlink()
    assert unfinished_runs(ROOT_HERE, None, "e", "digest") == []
    assert not Path("mlflow.db").exists()  # nobody has made an empty one


def test_auto_asks_a_server_for_runs_of_other_machines(server: MlflowServer, experiment: str) -> None:
    def make(run_time: int, status: str = "KILLED", user: str = provenance.user(), **tags: str) -> str:
        client = mlflow.MlflowClient(server.uri)
        found = client.get_experiment_by_name(experiment)
        number = found.experiment_id if found else client.create_experiment(experiment)
        tags = {CONFIGURATION: "digest", "mlflow.user": user, **tags}
        run_id = client.create_run(number, run_time, tags).info.run_id
        client.set_terminated(run_id, status)
        return run_id

    here = finished(MLflowTracker(server.uri, experiment, "x"))
    now = int(time.time() * 1000)
    newest, oldest = make(now + 60_000, "FAILED"), make(1000)
    make(now, user="bob")
    make(now, **{"mlflow.parentRunId": "0" * 32})
    make(now, "FINISHED")
    make(now, "RUNNING")
    mlflow.MlflowClient(server.uri).delete_run(make(now))
    found = unfinished_runs(ROOT_HERE, server.uri, experiment, "digest")
    assert found == [newest, here.journal_id, oldest]


def test_auto_with_the_server_away(capsys: pytest.CaptureFixture[str]) -> None:
    uri = f"http://ann:s3cret@127.0.0.1:{free_port()}"
    with pytest.raises(UserError, match=r"--resume auto: MLflow at http://ann:\*\*\*@.* does not answer") as error:
        unfinished_runs(ROOT_HERE, uri, "e", "digest")
    assert "s3cret" not in str(error.value)
    journal = Journal(ROOT_HERE / "j")
    journal.folder.mkdir(parents=True)
    journal.append({"start": {"id": "j", "time": 1, "tags": {CONFIGURATION: "digest"}}})
    assert unfinished_runs(ROOT_HERE, uri, "e", "digest") == ["j"]
    assert "of the runs of this machine the newest is taken" in capsys.readouterr().err


def test_passwords_are_in_the_address_alone(capsys: pytest.CaptureFixture[str]) -> None:
    uri = f"http://ann:s3cret@127.0.0.1:{free_port()}"
    tracker = MLflowTracker(uri, "e", "x")
    tracker.start({"tracking.uri": uri, "lr": 0.1}, {"mlflow.source.name": f"train tracking.uri={uri}"}, None)
    tracker.set_tags({"where": uri})
    tracker.log_text(f"cannot reach {uri}", "traceback.txt")
    watcher._process.kill()
    records = [record for record, _ in tracker._journal.read()]
    assert records[0]["start"].pop("uri") == uri  # the delivery needs it
    assert records[0]["start"]["params"] == {"tracking.uri": uri.replace("s3cret", "***"), "lr": "0.1"}
    assert records[0]["start"]["config"] == {"tracking.uri": uri.replace("s3cret", "***"), "lr": 0.1}
    texts = json.dumps(records) + tracker.describe() + (tracker.artifacts / "traceback.txt").read_text()
    assert "s3cret" not in texts + capsys.readouterr().err
    assert tracker.folder.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o077 for path in tracker.folder.iterdir() if path.is_file()} == {0}


def test_an_artifact_folder_of_another_machine_is_one_line_and_the_run_failed(store: str) -> None:
    mlflow.MlflowClient(store).create_experiment("elsewhere", "/proc/mlflow/artifacts")
    with pytest.raises(
        UserError, match=r"wants its artifacts in /proc/mlflow/artifacts/.*, and that cannot be written "
    ):
        MLflowTracker(None, "elsewhere", "x").start({}, {}, None)
    wait_for(lambda: the_run(store, "elsewhere").info.status == "FAILED")


def test_a_store_that_fills_up_hides_no_failure(store: str, capsys: pytest.CaptureFixture[str]) -> None:
    tracker = MLflowTracker(None, "e", "x")
    tracker.start({}, {}, None)
    tracker._artifacts = Path("/proc/full")
    with pytest.raises(UserError, match="cannot write /proc/full/figures: .*; free space"), \
            tracker.artifact_folder("figures"):  # fmt: skip
        pass
    tracker.log_text("why it ended", "traceback.txt")
    tracker.finish("FAILED")
    run = the_run(store, "e")
    assert run.info.status == "FAILED"
    artifacts = mlflow.MlflowClient(store).list_artifacts(run.info.run_id)
    assert [item.path for item in artifacts] == ["traceback.txt"]
    assert tracker.artifacts == Path("/proc/full")


def test_a_journal_that_cannot_be_begun_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Journal, record: dict) -> None:
        (self.folder / "records").touch()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    Path("volume").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "append", full)
        with pytest.raises(UserError, match="cannot write the journal .*No space left on device; see tracking.journal"):
            MLflowTracker(None, "e", "x", "volume/a/b").start({}, {}, None)
    assert [path.name for path in Path.cwd().rglob("*")] == ["volume"]
    with pytest.raises(UserError, match="cannot be used"):
        MLflowTracker("sqlite:////proc/nowhere/x.db", "e", "x", "volume").start({}, {}, None)
    assert [path.name for path in Path.cwd().rglob("*")] == ["volume"]  # which was there before


def test_refusals_are_told_as_what_they_are(store: str) -> None:
    client = mlflow.MlflowClient(store)
    client.delete_experiment(client.create_experiment("gone"))
    with pytest.raises(UserError, match=r"MLflow at sqlite:///\S+ cannot be used: .*; mlflow experiments restore"):
        MLflowTracker(None, "gone", "x").start({}, {}, None)
    with pytest.raises(
        UserError, match=r"MLflow at 127\.0\.0\.1:5000 cannot be used: .*did you mean http://127\.0\.0\.1"
    ):
        MLflowTracker("127.0.0.1:5000", "e", "x").start({}, {}, None)
    assert is_away("API request to http://x failed with exception HTTPConnectionPool(...)")
    assert not is_away("API request to endpoint /api failed with error code 403 != 200. Response body: 'no'")


def test_an_error_of_any_kind_is_noted_and_the_watch_goes_on(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tracker = MLflowTracker(None, "e", "x")
    tracker.start({}, {}, None)
    watcher._process.kill()
    watcher._process.wait()
    assert not watcher.is_watching(tracker.folder)
    watch = watcher.Watch(tracker.folder)
    errors = [TypeError("of a value"), ValueError("of a text"), KeyError("of a client")]
    with monkeypatch.context() as patch:
        patch.setattr(Courier, "deliver", lambda *_, **__: (_ for _ in ()).throw(errors.pop(0)))
        while errors:
            watch.due = 0.0
            assert watch.tend()
    assert watcher.is_watching(tracker.folder)
    assert State(tracker.folder).error == "'of a client'"
    assert (tracker.folder / "watcher.log").read_text().count("Traceback") == 3
    tracker.log_metrics({"loss": 1.0}, 1)
    watch.due = 0.0
    assert watch.tend()
    assert (State(tracker.folder).error, history(store, tracker.run_id, "loss")) == (None, [(1, 1.0)])
    tracker._append({"status": ["KILLED", 1]})
    tracker._journal.release()
    while watch.tend():
        pass
    assert not watcher.is_watching(tracker.folder)


def test_a_training_that_a_full_disk_ended_reads_failed(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its end cannot be written down any more, but what was goes to the store, and then the status."""
    tracker = MLflowTracker(None, "e", "x")
    tracker.start({}, {}, None)
    watcher._process.kill()
    watcher._process.wait()
    tracker.log_metrics({"loss": 1.0}, 1)
    tracker._journal.release()
    watch = watcher.Watch(tracker.folder)
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "append", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
        wait_for(lambda: not watch.tend())
    run = the_run(store, "e")
    assert (run.info.status, run.data.metrics) == ("FAILED", {"loss": 1.0})


def test_a_watch_of_a_journal_without_a_start_writes_nothing_and_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = ROOT_HERE / "empty"
    folder.mkdir(parents=True)
    (folder / "records").touch()
    watch = watcher.Watch(folder)
    assert not watch.tend()
    assert (folder / "records").read_bytes() == b""
    (folder / "records").unlink()
    folder.joinpath("alive").unlink()
    assert not watcher.Watch(folder).tend()


def test_sync_says_which_journals_cannot_be_delivered_and_delivers_the_others(store: str) -> None:
    good = finished(MLflowTracker(None, "e", "good"))
    for name in ("0", "zz"):
        (ROOT_HERE / name).mkdir()
        (ROOT_HERE / name / "records").touch()
    shutil.copytree(good.folder, ROOT_HERE / "headless")
    damaged = bytearray((good.folder / "records").read_bytes())
    damaged[100] ^= 1
    (ROOT_HERE / "headless" / "records").write_bytes(damaged)
    (ROOT_HERE / "headless" / "delivery.json").write_text("")
    (good.folder / "delivery.json").write_text("")
    result = run("lightning_glue.sync", cwd=Path.cwd(), check=False)
    assert (result.returncode, result.stdout.splitlines()[-1]) == (1, "1 of 2 journals delivered in full")
    assert f"the journal {ROOT_HERE / 'zz'} is left out: it is empty" in result.stderr
    assert f"the journal {ROOT_HERE / 'headless'} is left out: its first record is lost" in result.stderr
    assert the_run(store, "e").info.run_id == good.run_id  # found again, none besides
    assert {path.name for path in (ROOT_HERE / "zz").iterdir()} <= {"records", "alive"}


def test_the_command_that_delivers_the_rest_names_the_folder(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logger, "_FINISH_SECONDS", 0.0)
    tracker = MLflowTracker(f"http://127.0.0.1:{free_port()}", "e", "x", tmp_path / "my journals")
    tracker.start({}, {}, None)
    tracker.finish("FINISHED")
    command = capsys.readouterr().err.rpartition("then: ")[2].strip()
    assert command.endswith(f"-m lightning_glue.sync {tracker.run_id} --journal '{tmp_path}/my journals'")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, shell=True, capture_output=True, text=True, env=environment)
    assert "2 records not delivered" in result.stderr
