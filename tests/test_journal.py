"""The journal against torn, damaged and full disks."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lightning_glue.errors import UserError
from lightning_glue.journal import Journal, State, decode, delivered_run, encode, final_status, is_alive, try_lock

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
records = st.lists(st.dictionaries(st.sampled_from(["metrics", "tags", "status"]), values, min_size=1), max_size=8)
relaxed = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def whole(data: bytes) -> list[dict]:
    return [record for record, _ in decode(data)]


@given(records, st.data())
@relaxed
def test_a_cut_tail_leaves_exactly_the_whole_records(written: list[dict], data: st.DataObject) -> None:
    parts = [encode(record) for record in written]
    cut = data.draw(st.integers(0, sum(map(len, parts))))
    ends = [sum(map(len, parts[: i + 1])) for i in range(len(parts))]
    assert whole(b"".join(parts)[:cut]) == [record for record, end in zip(written, ends) if end <= cut]


@given(records.filter(bool), st.data())
@relaxed
def test_damage_ends_the_journal_before_it(written: list[dict], data: st.DataObject) -> None:
    """One byte changed in a record: those before it are read, it and those after it are not."""
    parts = [encode(record) for record in written]
    damaged = data.draw(st.integers(0, len(parts) - 1))
    place = data.draw(st.integers(0, len(parts[damaged]) - 1))
    spoiled = bytearray(parts[damaged])
    spoiled[place] ^= data.draw(st.integers(1, 255))
    assert whole(b"".join([*parts[:damaged], bytes(spoiled), *parts[damaged + 1 :]])) == written[:damaged]


@given(records, st.binary(max_size=40) | st.just(bytes(64)), st.data())
@relaxed
def test_writing_goes_on_behind_the_last_whole_record(
    tmp_path: Path, written: list[dict], noise: bytes, data: st.DataObject
) -> None:
    """After a cut, and after the zeros that a file system may leave where the power failed."""
    parts = [encode(record) for record in written]
    path = tmp_path / "records"
    kept = data.draw(st.integers(0, len(parts)))
    rest = b"".join(parts[kept:])
    path.write_bytes(b"".join(parts[:kept]) + rest[: data.draw(st.integers(0, max(0, len(rest) - 1)))] + noise)
    before = whole(path.read_bytes())
    journal = Journal(tmp_path)
    journal.append({"tags": {"a": "b"}})
    journal.close()
    assert [record for record, _ in Journal(tmp_path).read()] == [*before, {"tags": {"a": "b"}}]


def test_two_writers_do_not_cut_each_other(tmp_path: Path) -> None:
    code = """
import sys
from pathlib import Path
from lightning_glue.journal import Journal
journal = Journal(Path("."))
for i in range(300):
    journal.append({"metrics": [[sys.argv[1], i, 0, i]]})
"""
    command = [sys.executable, "-c", code]
    writers = [subprocess.Popen([*command, name], cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}) for name in "ab"]
    assert [writer.wait(60) for writer in writers] == [0, 0]
    points = [record["metrics"][0] for record, _ in Journal(tmp_path).read()]
    for name in "ab":
        assert [point[1] for point in points if point[0] == name] == list(range(300))


def test_a_full_disk_leaves_the_journal_as_it_was(tmp_path: Path) -> None:
    code = f"""
import resource
from pathlib import Path
from lightning_glue.journal import Journal
journal = Journal(Path("."))
journal.append({{"tags": {{"n": 0}}}})
resource.setrlimit(resource.RLIMIT_FSIZE, (100, {resource.RLIM_INFINITY}))
try:
    journal.append({{"tags": {{"n": "x" * 200}}}})
except OSError as error:
    print(type(error).__name__)
resource.setrlimit(resource.RLIMIT_FSIZE, ({resource.RLIM_INFINITY}, {resource.RLIM_INFINITY}))
journal.append({{"tags": {{"n": 2}}}})
"""
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert result.stdout == "OSError\n", result.stderr
    assert [record for record, _ in Journal(tmp_path).read()] == [{"tags": {"n": 0}}, {"tags": {"n": 2}}]


def test_values_that_json_lacks_survive() -> None:
    (record,) = whole(encode({"metrics": [["loss", float("nan"), 1, 2], ["loss", float("inf"), 1, 3]]}))
    assert json.dumps(record) == '{"metrics": [["loss", NaN, 1, 2], ["loss", Infinity, 1, 3]]}'


def test_a_run_is_known_by_its_journal_too(tmp_path: Path) -> None:
    folder = tmp_path / "j1"
    folder.mkdir()
    Journal(folder).append({"start": {"time": 1}})
    assert delivered_run("elsewhere", tmp_path) == "elsewhere"
    with pytest.raises(UserError, match="run j1 has not reached MLflow yet; .*lightning_glue.sync j1"):
        delivered_run("j1", tmp_path)

    state = State(folder)
    state.run_id = "r1"
    state.save()
    assert delivered_run("j1", tmp_path) == delivered_run("r1", tmp_path) == "r1"


def test_the_lock_tells_whether_a_training_is_at_work(tmp_path: Path) -> None:
    assert not is_alive(tmp_path)
    with try_lock(tmp_path / "alive") as mine:
        assert mine
        assert is_alive(tmp_path)
        with try_lock(tmp_path / "alive") as second:
            assert not second
    assert not is_alive(tmp_path)


@pytest.mark.parametrize(
    ("kinds", "status"),
    [
        (["start", "status"], "KILLED"),
        (["start", "status", "tags"], "KILLED"),
        (["start", "status", "resume"], None),
        (["start"], None),
    ],
)
def test_a_resumed_run_has_no_final_status(kinds: list[str], status: str | None) -> None:
    written = [({kind: ["KILLED", 1]}, 0) for kind in kinds]
    assert final_status(written) == status
