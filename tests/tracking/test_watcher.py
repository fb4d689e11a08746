"""The process beside a training: what it loads, and how much of a long journal it reads."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.project import ROOT

from lightning_glue.tracking.courier import Courier
from lightning_glue.tracking.journal import Journal, Record, encode, now, try_lock
from lightning_glue.tracking.state import State
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
    assert journal.status() is None  # all of it is read, for nothing in it tells
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
