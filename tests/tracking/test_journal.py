"""The journal against torn, damaged and full disks."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.project import ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lightning_glue.errors import UserError
from lightning_glue.tracking.journal import Journal, decode, encode, final_status, is_alive, try_lock
from lightning_glue.tracking.journals import delivered_run, find_journal, journals
from lightning_glue.tracking.state import State

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
records = st.lists(
    st.dictionaries(st.sampled_from(["metrics", "tags", "status"]), values, min_size=1, max_size=1), max_size=8
)
relaxed = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def whole(data: bytes) -> list[dict]:
    return [record for record, _ in decode(data)]


@given(records, st.data())
@relaxed
def test_a_cut_tail_leaves_exactly_the_whole_records(written: list[dict], data: st.DataObject) -> None:
    parts = [encode(record) for record in written]
    cut = data.draw(st.integers(0, sum(map(len, parts))))
    ends = [sum(map(len, parts[: i + 1])) for i in range(len(parts))]
    assert whole(b"".join(parts)[:cut]) == [record for record, end in zip(written, ends) if end <= cut]


noises = st.binary(max_size=60) | st.sampled_from([b'{"', b'\x05\0\0\0abcd{"a":1}', bytes(9), b'\x01{"' * 9])


@st.composite
def damaged(draw: st.DrawFn) -> tuple[bytes, list[dict]]:
    """A journal's bytes after some damage, and the records of which every byte is still there, in order."""
    written = draw(records)
    data = [encode(record) for record in written]
    pieces: list[tuple[bytes, dict | None]] = []
    for whole_one, record in zip(data, written):
        place = draw(st.integers(0, len(whole_one) - 1))
        last = draw(st.integers(place + 1, len(whole_one)))
        flipped = bytes([whole_one[place] ^ draw(st.integers(1, 255))])
        kinds = {
            "none": [(whole_one, record)],
            "flip": [(whole_one[:place] + flipped + whole_one[place + 1 :], None)],
            "cut": [(whole_one[:place] + whole_one[last:], None)],
            "zeros": [
                (
                    spoiled := whole_one[:place] + bytes(last - place) + whole_one[last:],
                    record if spoiled == whole_one else None,
                )
            ],
            "half": [(whole_one[:place], None), (whole_one, record)],  # interrupted, and written again
            "garbage": [(draw(noises), None), (whole_one, record)],
            "double": [*pieces, (whole_one, record)],
        }
        pieces += kinds[draw(st.sampled_from(sorted(kinds)))]
    if draw(st.booleans()):
        pieces.append((draw(noises), None))
    return b"".join(piece for piece, _ in pieces), [record for _, record in pieces if record is not None]


@given(damaged())
@relaxed
def test_damage_costs_what_is_damaged_and_no_more(spoiled: tuple[bytes, list[dict]]) -> None:
    data, intact = spoiled
    assert in_order(intact, whole(data))


def in_order(some: list[dict], more: list[dict]) -> bool:
    rest = iter(more)
    return all(any(one == other for other in rest) for one in some)


@given(damaged(), records)
@relaxed
def test_writing_goes_on_behind_any_damage_and_removes_nothing(
    tmp_path: Path, spoiled: tuple[bytes, list[dict]], written: list[dict]
) -> None:
    """Positions keep their meaning: what a reader has read stays where it was."""
    data, intact = spoiled
    path = tmp_path / "records"
    path.write_bytes(data)
    ends = [end for _, end in Journal(tmp_path).read()]
    journal = Journal(tmp_path)
    for record in written:
        journal.append(record)
    journal.close()
    assert path.read_bytes().startswith(data)
    found = Journal(tmp_path).read()
    assert in_order([*intact, *written], [record for record, _ in found])
    after = [end for _, end in found]
    assert after[: len(ends)] == ends
    assert journal.status() == final_status(found)
    for place in {near for end in [0, *after] for near in (end - 1, end, end + 1)}:
        assert journal.is_boundary(place) == (place in (0, *after))


def test_damage_is_said_once_with_its_place(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parts = [encode({"metrics": [["loss", 1.0, 5, step]]}) for step in range(3)]
    begin, end = len(parts[0]), len(parts[0] + parts[1])
    (tmp_path / "records").write_bytes(parts[0] + parts[1][:-1] + b"!" + parts[2] + b"half a record")
    for _ in range(2):
        journal = Journal(tmp_path)
        assert len(journal.read()) == 2
        assert journal.damaged == [(begin, end)]
    assert journal.read(end)[0][1] == len(b"".join(parts))
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"{tmp_path / 'records'} is damaged from byte {begin} to {end}" in said


@pytest.mark.parametrize(
    "piece", [b'{"', b'\x00\x00\x10\x00abcd{"', b"\0", b"\xff"], ids=["keys", "heads", "zeros", "ones"]
)
def test_reading_damage_takes_time_in_proportion(piece: bytes) -> None:
    """Counted in bytes of which a checksum was made."""
    read = 0

    def counted(data: bytes, start: int = 0) -> int:
        nonlocal read
        read += len(data)
        return checksum(data, start)

    checksum, record = zlib.crc32, encode({"tags": {"a": "b"}})
    data = piece * (1 << 17) + record
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zlib, "crc32", counted)
        assert whole(data) == [{"tags": {"a": "b"}}]
    assert read < 6 * len(data)


def test_two_writers_do_not_cut_each_other(tmp_path: Path) -> None:
    code = """
import sys
import zlib
from pathlib import Path
from lightning_glue.tracking.journal import Journal
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
from lightning_glue.tracking.journal import Journal
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
    left = [{"tags": {"n": 0}}, {"tags": {"n": 2}}]
    assert (tmp_path / "records").read_bytes() == b"".join(map(encode, left))  # nor a part of what had no room


def test_a_value_that_was_changed_is_damage_though_it_can_be_read(tmp_path: Path) -> None:
    parts = [encode({"metrics": [["loss", 1.5, 5, step]]}) for step in range(3)]
    (tmp_path / "records").write_bytes(parts[0] + parts[1].replace(b"1.5", b"9.5") + parts[2])
    assert [record["metrics"][0][3] for record, _ in Journal(tmp_path).read()] == [0, 2]


def make(folder: Path, *more: dict, **start: object) -> Path:
    folder.mkdir(parents=True)
    journal = Journal(folder)
    for record in ({"start": {"id": folder.name, "time": 1, "tags": {}, "run_id": None, **start}}, *more):
        journal.append(record)
    journal.close()
    return folder


def test_a_journal_that_cannot_be_used_is_named_and_hides_no_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "journals"
    good = make(root / "good", {"status": ["KILLED", 2]})
    for name in ("empty", "headless", "pointless"):
        (root / name).mkdir()
    (root / "empty" / "records").touch()
    (root / "headless" / "records").write_bytes(encode({"status": ["KILLED", 1]}))
    (root / "file").write_text("not a journal")
    (make(root / "a folder") / "records").unlink()
    (root / "a folder" / "records").mkdir()
    damaged = make(root / "damaged")
    (damaged / "delivery.json").touch()
    foreign = make(root / "foreign")
    (foreign / "delivery.json").write_text('{"run_id": 5, "path": "/etc/passwd", "save": 1, "offset": "x"}')
    assert set(journals(root)) == {good, damaged, foreign}
    said = capsys.readouterr().err
    assert said.count("\n") == 3
    assert f"the journal {root / 'empty'} is left out: it is empty" in said
    assert f"the journal {root / 'headless'} is left out: its first record is lost" in said
    assert f"the journal {root / 'a folder'} is left out: Is a directory" in said
    assert find_journal(root, "good") == good
    assert (State(foreign).run_id, State(foreign).offset, State(foreign).path) == (None, 0, foreign / "delivery.json")
    assert capsys.readouterr().err == ""  # once
    assert journals(root / "file") == journals(root / "nowhere") == []
    assert f"{root / 'file'} is left out: Not a directory; expected a folder of journals" in capsys.readouterr().err


def test_a_journal_whose_first_record_is_damaged_counts_where_its_run_is_known(tmp_path: Path) -> None:
    folder = make(tmp_path / "j1", {"status": ["KILLED", 2]})
    data = bytearray((folder / "records").read_bytes())
    data[20] ^= 1
    (folder / "records").write_bytes(data)
    assert journals(tmp_path) == []
    state = State(folder)
    state.run_id = "r1"
    state.save()
    assert find_journal(tmp_path, "r1") == folder
    assert Journal(folder).status() == "KILLED"


def test_the_newest_journal_is_the_one_that_was_started_last(tmp_path: Path) -> None:
    made = [make(tmp_path / name, time=time) for name, time in (("b", 30), ("c", 10), ("a", 20))]
    State(made[1]).save()  # as a sync of it does
    assert [folder.name for folder in journals(tmp_path)] == ["b", "a", "c"]


def test_what_is_long_is_not_read_for_its_start_and_status(tmp_path: Path) -> None:
    points = [{"metrics": [["loss", 1.0, 5, step]]} for step in range(5000)]
    folder = make(tmp_path / "j", *points, {"status": ["FINISHED", 2]}, {"tags": {"late": "yes"}})
    read = 0

    class Counting(Journal):
        def read(self, offset: int = 0) -> list[tuple[dict, int]]:
            raise AssertionError

        def _last(self, end: int) -> Iterator[list[tuple[dict, int]]]:
            nonlocal read
            for some in super()._last(end):
                read += len(some)
                yield some

    journal = Counting(folder)
    assert (journal.start()["id"], journal.status()) == ("j", "FINISHED")
    assert journal.is_boundary(journal.path.stat().st_size)
    assert read < 300


READ_ONLY = """
import os, sys
from pathlib import Path
from lightning_glue.tracking.journal import Journal, is_alive, try_lock
from lightning_glue.tracking.journals import journals
if os.getuid() == 0:
    os.setuid(65534)
root = Path(sys.argv[1])
print([folder.name for folder in journals(root)])
print(is_alive(root / "open"), is_alive(root / "locked"))
with try_lock(root / "open" / "delivery.lock") as mine:
    print(mine)
"""


def test_folders_that_can_only_be_read_or_not_even_that(tmp_path: Path) -> None:
    for folder in (tmp_path, *tmp_path.parents):
        if "pytest" in str(folder):  # where root runs the tests, somebody else has to look
            folder.chmod(0o755)
    root = tmp_path / "journals"
    for name in ("open", "locked", "closed"):
        (make(root / name) / "records").chmod(0o644)
    (root / "locked" / "alive").touch(0o644)
    with try_lock(root / "locked" / "alive") as mine:
        assert mine
        for name, mode in (("open", 0o555), ("locked", 0o555), ("closed", 0o000)):
            (root / name).chmod(mode)
        code = [sys.executable, "-c", READ_ONLY, str(root)]
        result = subprocess.run(code, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    for name in ("open", "locked", "closed"):
        (root / name).chmod(0o755)
    assert result.stdout == "['open', 'locked']\nFalse True\nTrue\n", result.stderr
    assert f"the journal {root / 'closed'} is left out: Permission denied; get rights there" in result.stderr


def test_a_journal_is_for_its_user_alone(tmp_path: Path) -> None:
    folder = make(tmp_path / "j")
    (folder / "records").chmod(0o644)  # as earlier versions made it
    Journal(folder).append({"tags": {}})
    State(folder).save()
    with try_lock(folder / "alive"):
        assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o600}


def test_many_may_look_whether_a_training_is_at_work(tmp_path: Path) -> None:
    with try_lock(tmp_path / "alive", shared=True):
        assert not is_alive(tmp_path)
        with try_lock(tmp_path / "alive") as mine:
            assert not mine


def test_what_others_wrote_is_brought_to_the_disk_by_a_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make(tmp_path / "j")
    synced = []
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append(os.readlink(f"/proc/self/fd/{handle}")))
    Journal(folder).sync()
    assert synced == [str(folder / "records")]


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
