"""The process beside a training: what it loads, and how much of a long journal it reads."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.project import ROOT

from lightning_glue.errors import TrackingError
from lightning_glue.tracking import journal as journal_module
from lightning_glue.tracking.courier import Courier
from lightning_glue.tracking.held_journal import HeldJournal
from lightning_glue.tracking.journal import Journal, Record, encode, now, try_lock
from lightning_glue.tracking.journals import RunIndex, delivered_run, find_journal, journals
from lightning_glue.tracking.known_runs import unfinished_runs
from lightning_glue.tracking.pruning import prune
from lightning_glue.tracking.state import State
from lightning_glue.tracking.sync import sync_all
from lightning_glue.tracking.uploads import Backlog
from lightning_glue.tracking.watcher import Watch

RECORDS = 50_000


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, new_store: Callable[[Path], None]) -> Path:
    """A project folder with MLflow's default database."""
    new_store(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def begin(params: dict[str, str]) -> Journal:
    folder = Path("mlruns/.journal").resolve() / uuid.uuid4().hex
    folder.mkdir(parents=True)
    journal = Journal(folder)
    start: Record = {"id": folder.name, "uri": None, "experiment": "e", "name": "n", "params": params, "tags": {}}
    journal.append({"start": start | {"run_id": None, "time": now(), "system_metrics": None, "config": {}}})
    return journal


def loaded(stderr: str) -> set[str]:
    """The modules that ``python -X importtime`` has listed."""
    return set(re.findall(r"^import time: +\d+ \| +\d+ \| +(\S+)$", stderr, re.MULTILINE))


def test_it_registers_a_model_without_torch_and_fairseq(here: Path) -> None:
    journal = begin({"task.name": "RTE"})
    digests = {"rows": 2, "dropped": 0, "skipped": 0, "sha256": "ab" * 32}
    journal.append({"inputs": [{"name": "RTE/dev", "split": "dev", "file": "dev.tsv", "profile": digests}]})
    journal.append({"metrics": [["best/dev/accuracy", 0.5, now(), 1]]})
    weights = journal.artifact("fairseq/checkpoint_best.pt")
    weights.parent.mkdir(parents=True)
    weights.write_bytes(b"weights")
    journal.append({"artifact": "fairseq/checkpoint_best.pt"})
    journal.append({"status": ["FINISHED", now()]})
    journal.append({"register": True})
    process = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "lightning_glue.tracking.watcher"],
        input=json.dumps(str(journal.folder)) + "\n",
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert process.returncode == 0, process.stderr[-2000:]
    assert State(journal.folder).registered == "glue-rte version 1, the champion: dev/accuracy 0.5000"
    modules = loaded(process.stderr)
    assert {"mlflow", "lightning_glue.tracking.registry"} <= modules
    heavy = {"torch", "fairseq", "pytorch_lightning", "torchmetrics"}
    assert not {name for name in modules if name.split(".")[0] in heavy or name.startswith("lightning_glue.model")}


def characters_read() -> int:
    """Bytes that this process has read from files, cached or not."""
    return int(re.search(r"rchar: (\d+)", Path("/proc/self/io").read_text())[1])


def long_journal() -> tuple[Journal, int]:
    """The journal of a training at work, long and delivered up to its end; and its size."""
    journal = begin({})
    Courier(journal.folder).deliver()
    with open(journal.path, "ab") as file:
        for step in range(RECORDS):
            file.write(encode({"metrics": [["train/loss", 1.0, 1_700_000_000_000 + step, step]]}))
    size = journal.path.stat().st_size
    state = State(journal.folder)
    state.offset = state.uploads = size
    state.prefix = state.uploads_prefix = journal.checksum(0, size, None)
    state.save()
    state.save_uploads()
    return journal, size


def test_a_delivery_of_nothing_new_does_not_read_the_journal(here: Path) -> None:
    journal, size = long_journal()
    courier = Courier(journal.folder)
    assert courier.deliver() == 0  # the first looks whether what was delivered is still there
    before = characters_read()
    for _ in range(10):
        assert courier.deliver() == 0
    assert characters_read() - before < size // 10


def test_a_delivery_reads_what_is_new(here: Path) -> None:
    journal, size = long_journal()
    courier = Courier(journal.folder)
    courier.deliver()
    journal.append({"metrics": [["train/loss", 1.0, now(), RECORDS]]})
    assert courier.deliver() == 1  # it connects, and that reads, too
    before = characters_read()
    for step in range(10):
        journal.append({"metrics": [["train/loss", 1.0, now(), RECORDS + 1 + step]]})
        assert courier.deliver() == 1
    assert characters_read() - before < size  # each alone would read as much, if it read it all


def test_a_beat_of_the_watcher_reads_the_end_alone(here: Path) -> None:
    journal, size = long_journal()
    watch = Watch(journal.folder)
    with try_lock(journal.folder / "alive") as training:
        assert training
        assert watch.tend()
        if uploading := watch.courier._thread:
            uploading.join()  # it looks once, too, whether what was delivered is still there
        before = characters_read()
        for _ in range(10):
            assert watch.tend()
        assert characters_read() - before < size // 10
    while watch.tend():  # it tells how the training ended, and delivers that
        pass
    assert journal.status() == "KILLED"


def test_the_status_is_looked_for_in_what_is_new(here: Path) -> None:
    journal, size = long_journal()
    assert journal.status() is None  # all of it is looked through, for nothing in it tells
    before = characters_read()
    for number in range(10):
        journal.append({"metrics": [["train/loss", 1.0, 5, RECORDS + number]]})
        assert journal.status() is None
    assert characters_read() - before < size // 10
    journal.append({"status": ["KILLED", 1]})
    assert journal.status() == "KILLED"
    journal.append({"resume": {"time": 2, "tags": {}, "uri": None}})
    assert journal.status() is None
    journal.append({"status": ["FINISHED", 3]})
    journal.append({"tags": {"a": "b"}})
    assert journal.status() == Journal(journal.folder).status() == "FINISHED"
    with open(journal.path, "r+b") as file:
        file.truncate(size)  # it is another one now
    assert journal.status() is None


def finished_journal() -> Journal:
    """A long journal of a finished run, delivered up to its end."""
    journal, _ = long_journal()
    journal.append({"status": ["FINISHED", 7]})
    assert Courier(journal.folder).deliver(last=True) == 1
    return journal


def test_the_journal_of_a_finished_run_becomes_short_and_is_still_of_use(here: Path) -> None:
    journal = finished_journal()
    start, run_id = journal.start(), State(journal.folder).run_id
    assert sync_all(journal.folder.parent, [], None) == [True]
    assert [record for record, _ in Journal(journal.folder).read()] == [{"start": start}, {"status": ["FINISHED", 7]}]
    assert journal.status() == "FINISHED"
    assert find_journal(journal.folder.parent, str(run_id)) == RunIndex(journal.folder.parent).find(str(run_id))
    assert delivered_run(journal.folder.name) == run_id
    with pytest.raises(TrackingError, match="is finished; there is nothing to resume"):
        HeldJournal.reopen(journal.folder)
    journal.append({"tags": {"later": "yes"}})  # whoever has the old file open writes into the new one
    courier = Courier(journal.folder)
    assert courier.deliver() == 1
    run = courier.client.get_run(run_id)
    assert run.data.tags["later"] == "yes" and run.info.status == "FINISHED"
    (point,) = courier.client.get_metric_history(run_id, "train/loss")[:1] or [None]
    assert point is None  # long_journal() says that it was delivered, but sends nothing: nor is it sent now


def test_a_journal_that_is_still_needed_stays_whole(here: Path) -> None:
    journal = finished_journal()
    size = journal.path.stat().st_size
    state = State(journal.folder)
    state.refused = {"a": "too large"}  # the only copy is here
    state.save_uploads()
    assert not prune(journal.folder)
    state.refused = {}
    state.save_uploads()
    with try_lock(journal.folder / "alive") as training:
        assert training and not prune(journal.folder)
    journal.append({"resume": {"time": 8, "tags": {}, "uri": None}})
    Courier(journal.folder).deliver(last=True)
    assert not prune(journal.folder)  # it goes on
    journal.append({"status": ["KILLED", 9]})
    Courier(journal.folder).deliver(last=True)
    assert not prune(journal.folder)  # and may go on again
    journal.append({"status": ["FINISHED", 9]})
    assert not prune(journal.folder)  # not delivered
    assert journal.path.stat().st_size > size
    Courier(journal.folder).deliver(last=True)
    assert prune(journal.folder)
    assert journal.path.stat().st_size < 2000 and not prune(journal.folder)


def test_a_pruning_broken_off_between_its_files_is_mended_by_the_next_delivery(here: Path) -> None:
    journal = finished_journal()
    before = [(journal.folder / name).read_bytes() for name in ("delivery.json", "uploads.json")]
    assert prune(journal.folder)
    for name, content in zip(("delivery.json", "uploads.json"), before):
        (journal.folder / name).write_bytes(content)
    run_id = State(journal.folder).run_id
    courier = Courier(journal.folder)
    assert courier.deliver(last=True) == 2
    state = State(journal.folder)
    assert state.run_id == run_id and state.is_delivered(journal.path.stat().st_size)
    assert len(courier.client.search_runs(["0", "1"])) == 1


def test_old_journals_are_not_read_to_find_one_to_go_on_with(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of many long journals the first record and the last status are decoded, and nothing else."""
    journal, size = long_journal()
    journal.append({"status": ["KILLED", 1]})
    for _ in range(9):
        shutil.copytree(journal.folder, journal.folder.with_name(uuid.uuid4().hex))
    decoded: list[int] = []
    whole = journal_module._record_at
    monkeypatch.setattr(journal_module, "_record_at", lambda *args: decoded.append(1) or whole(*args))
    before = characters_read()
    assert unfinished_runs(journal.folder.parent, None, "e", "no such configuration") == []
    assert [Journal(folder).status() for folder in journals(journal.folder.parent)] == ["KILLED"] * 10
    assert len(decoded) < 10 * 200  # 4 KiB of the end
    assert characters_read() - before < size


def test_a_journal_with_no_word_on_its_end_is_looked_through_and_not_decoded(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal, _ = long_journal()
    journal.append({"metrics": [["system/cpu", 1.0, 5, 41]]})
    journal.append({"metrics": [["train/loss", 1.0, 5, RECORDS]]})
    decoded: list[int] = []
    whole = journal_module._record_at
    monkeypatch.setattr(journal_module, "_record_at", lambda *args: decoded.append(1) or whole(*args))
    assert Journal(journal.folder).status() is None
    newest = Journal(journal.folder).newest(b'{"metrics":[["system/')
    assert newest and newest[0]["metrics"][0][3] == 41
    assert Courier(journal.folder)._last_resume() == {}
    assert len(decoded) < 500
    assert Journal(journal.folder).newest(b'{"tags"') is None


def test_a_backlog_is_read_in_pieces(here: Path) -> None:
    journal = begin({})
    for step in range(5000):
        journal.append({"metrics": [["train/loss", 1.0, 1_700_000_000_000 + step, step]]})
    whole = journal.read()
    pieces = list(journal.pieces(0, 1 << 12))
    assert [record for piece in pieces for record in piece] == whole
    assert max(len(piece) for piece in pieces) < len(whole) // 20
    with open(journal.path, "r+b") as file:  # damage longer than a piece
        file.seek(1 << 16)
        file.write(bytes(1 << 14))
    assert [one for piece in Journal(journal.folder).pieces(0, 1 << 12) for one in piece] == journal.read()


def test_a_store_that_is_away_does_not_make_what_is_pending_read_again(here: Path) -> None:
    """Each look reads what is new, however much waits for the artifacts to arrive."""
    journal, size = long_journal()
    backlog = Backlog()
    before = characters_read()
    backlog.read(journal, (0, None), size)
    journal.append({"artifact": "a.txt"})
    for _ in range(10):
        backlog.read(journal, (0, None), journal.end())
    assert characters_read() - before < 2 * size
    assert list(backlog.plan) == ["a.txt"] and not backlog.ended
    assert (backlog.take(), backlog.take()) == (1, 0)
