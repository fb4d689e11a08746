"""MRPC: the conversion from the raw Microsoft files."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_glue.data.mrpc import convert, is_raw
from lightning_glue.data.reader import read_split
from lightning_glue.errors import UserError
from lightning_glue.tasks import TASKS

HEADER = "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String"
TRAIN = ('1\t10\t11\tHe said "yes.\tYes, he said.', "0\t12\t13\tRed \u00e9.\tBlue.", "1\t14\t15\tOne.\tTwo. ")
TEST = ("1\t20\t21\tUp.\tDown.", "0\t22\t23\tIn.\tOut.")


@pytest.fixture
def raw(tmp_path) -> Path:
    """The raw form: byte order marks, CRLF in one file, no last newline in the other."""
    folder = tmp_path / "raw"
    folder.mkdir()
    (folder / "msr_paraphrase_train.txt").write_bytes("\r\n".join((HEADER, *TRAIN, "")).encode("utf-8-sig"))
    (folder / "msr_paraphrase_test.txt").write_bytes("\n".join((HEADER, *TEST)).encode("utf-8-sig"))
    (folder / "dev_ids.tsv").write_bytes(b"#1 ID\t#2 ID\n12\t13\n")
    return folder


def test_files_are_those_of_the_download_script(raw, tmp_path) -> None:
    out = tmp_path / "new" / "MRPC"
    convert(raw, out)

    bom = "\ufeff"
    assert (out / "train.tsv").read_bytes().decode() == f"{bom}{HEADER}\n{TRAIN[0]}\n{TRAIN[2].strip()}\n"
    assert (out / "dev.tsv").read_bytes().decode() == f"{bom}{HEADER}\n{TRAIN[1]}\n"
    assert (out / "test.tsv").read_bytes() == (
        b"index\t#1 ID\t#2 ID\t#1 String\t#2 String\n0\t20\t21\tUp.\tDown.\n1\t22\t23\tIn.\tOut.\n"
    )
    assert sorted(path.name for path in out.parent.iterdir()) == ["MRPC"]


def test_converted_files_can_be_read(raw, tmp_path) -> None:
    convert(raw, tmp_path / "glue" / "MRPC")
    task = TASKS["MRPC"]

    train, dev, test = (read_split(task, split, tmp_path / "glue") for split in task.splits)

    assert (train.texts[0], train.labels) == (['He said "yes.', "One."], ["1", "1"])
    assert (dev.texts[1], dev.labels) == (["Blue."], ["0"])
    assert (test.texts, test.labels) == ((["Up.", "In."], ["Down.", "Out."]), None)


def test_is_raw(raw) -> None:
    assert is_raw(raw)
    (raw / "train.tsv").touch()
    assert not is_raw(raw)
    assert not is_raw(raw / "nowhere")


def test_dev_ids_from_elsewhere(raw, tmp_path) -> None:
    ids = (raw / "dev_ids.tsv").rename(tmp_path / "ids.tsv")
    with pytest.raises(UserError, match=r"no file .*raw/dev_ids\.tsv"):
        convert(raw, tmp_path / "out")
    assert not (tmp_path / "out").exists()

    convert(raw, tmp_path / "out", ids)
    assert (tmp_path / "out" / "dev.tsv").read_text(encoding="utf-8").count("\n") == 2


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("msr_paraphrase_train.txt", f"{HEADER}\n1\t2\t3\n".encode(), r"train\.txt:2: found 3 fields, expected 5"),
        ("msr_paraphrase_test.txt", f"{HEADER}\n1\t2\t3\t\xff\ta\n".encode("latin-1"), r"test\.txt:2: invalid UTF-8"),
        ("msr_paraphrase_test.txt", b"", r"test\.txt: no rows"),
        ("msr_paraphrase_test.txt", f"{HEADER}\n".encode(), r"test\.txt: no rows behind the header"),
        ("msr_paraphrase_test.txt", b"1\t2\t3\ta\tb\n", r"test\.txt:1: found '1', expected the header Quality"),
        ("msr_paraphrase_train.txt", f"{HEADER}\n9\t2\t3\ta\tb\n".encode(), r"train\.txt:2: label '9' is not one of"),
        (
            "msr_paraphrase_train.txt",
            HEADER.replace("String", "ID").encode(),
            r"train\.txt:1: found '#1 ID', expected the",
        ),
        ("msr_paraphrase_train.txt", f"{HEADER}\n{TRAIN[0]}".encode("utf-16"), r"train\.txt:1: the file is UTF-16"),
        ("msr_paraphrase_test.txt", f"{HEADER}\r{TEST[0]}\r".encode(), r"test\.txt:1: lines end in carriage returns"),
        ("dev_ids.tsv", b"#1 ID\t#2 ID\n1\n", r"dev_ids\.tsv:2: found 1 fields, expected 2"),
        ("dev_ids.tsv", b"#1 ID\t#2 ID\n98\t99\n", r"dev_ids\.tsv selects 0 of the 3 rows"),
    ],
)
def test_faults_leave_nothing_behind(raw, tmp_path, name, content, message) -> None:
    (raw / name).write_bytes(content)

    with pytest.raises(UserError, match=message):
        convert(raw, tmp_path / "out" / "MRPC")
    assert not (tmp_path / "out").exists()


def test_dev_ids_that_no_row_has_are_said(raw, tmp_path, caplog) -> None:
    convert(raw, tmp_path / "out")
    assert not caplog.messages

    (raw / "dev_ids.tsv").write_bytes(b"#1 ID\t#2 ID\n12\t13\n98\t99\n")
    convert(raw, tmp_path / "again")
    assert "1 of its pairs, such as ('98', '99')" in caplog.text


def test_an_existing_folder_is_never_replaced(raw) -> None:
    with pytest.raises(UserError, match="exists already"):
        convert(raw, raw)
    assert is_raw(raw)
