"""The reader: official files row by row, stray characters, malformed rows, and parity with fairseq's awk."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_glue.data.reader import has_split, read_split, survey_split
from lightning_glue.errors import UserError
from lightning_glue.tasks import TASKS, TRAINABLE

OFFICIAL_ROWS = {
    "RTE": (2490, 277, 3000),
    "SST-2": (67349, 872, 1821),
    "STS-B": (5749, 1500, 1379),
    "WNLI": (635, 71, 146),
}

# No tab, line feed or surrogate: what a field of a tab-separated file can hold.
FIELD = st.text(st.characters(exclude_characters="\t\n", exclude_categories=("Cs",)), max_size=30)


def write(root: Path, task: str, split: str, content: bytes) -> Path:
    """Write the file of a split and return its path."""
    path = root / TASKS[task].directory / f"{split}.tsv"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def header(task: str, split: str) -> str:
    """The official header line; what it would be for a file without one."""
    return "\t".join(TASKS[task].split(split).columns) + "\n"


def read(root: Path, task: str, split: str, on_bad_row="stop"):
    return read_split(TASKS[task], TASKS[task].split(split), root, on_bad_row)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.tuples(FIELD, FIELD, st.sampled_from(["entailment", "not_entailment"])), min_size=1, max_size=8),
    bom=st.booleans(),
    end=st.sampled_from(["\n", "\r\n"]),
    last_newline=st.booleans(),
)
def test_any_text_survives(tmp_path_factory, rows, bom, end, last_newline) -> None:
    root = tmp_path_factory.mktemp("glue")
    lines = ["index\tsentence1\tsentence2\tlabel", *(f"{i}\t{a}\t{b}\t{label}" for i, (a, b, label) in enumerate(rows))]
    text = end.join(lines) + (end if last_newline else "")
    content = text.encode("utf-8-sig" if bom else "utf-8")
    path = write(root, "RTE", "train", content)

    found = read(root, "RTE", "train")

    assert found.texts == ([a.strip() for a, _, _ in rows], [b.strip() for _, b, _ in rows])
    assert found.labels == [label for _, _, label in rows]
    assert (found.path, len(found), found.dropped, found.skipped) == (path, len(rows), 0, 0)
    assert found.sha256 == hashlib.sha256(content).hexdigest()


def test_quotes_and_odd_line_separators_are_ordinary(tmp_path) -> None:
    odd = 'a " b\x0b c\u2028d\x85e\rf'
    write(tmp_path, "SST-2", "train", f'sentence\tlabel\n"open\t1\n{odd}\t0\n'.encode())

    assert read(tmp_path, "SST-2", "train").texts == (['"open', odd],)


def test_empty_sentences_are_kept_and_trailing_blank_lines_ignored(tmp_path) -> None:
    write(tmp_path, "SST-2", "train", b"sentence\tlabel\n\t1\n  \t 0 \r\n\n\r\n\n")

    rows = read(tmp_path, "SST-2", "train")

    assert (rows.texts, rows.labels, rows.skipped) == ((["", ""],), ["1", "0"], 0)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (b"0\ta\tb", "found 3 fields, expected 4"),
        (b"0\ta\tb\tentailment\tx", "found 5 fields, expected 4"),
        (b"", "found a blank line, expected 4"),
        (b"0\ta\tb\tentails", "label 'entails' is not one of entailment, not_entailment"),
        (b"0\t\xff\tb\tentailment", "invalid UTF-8 at byte 3 of the line"),
    ],
)
def test_malformed_row_stops_or_is_skipped(tmp_path, row, reason) -> None:
    good = b"1\tc\td\tentailment\n"
    path = write(tmp_path, "RTE", "dev", b"index\tsentence1\tsentence2\tlabel\n" + good + row + b"\n" + good)

    with pytest.raises(UserError) as caught:
        read(tmp_path, "RTE", "dev")
    advice = "fix the row or set data.on_bad_row=skip (preprocess: --on-bad-row skip)"
    assert str(caught.value) == f"{path}:3: {reason}; {advice}"

    rows = read(tmp_path, "RTE", "dev", "skip")
    assert (rows.texts, rows.labels, rows.skipped, rows.dropped) == ((["c", "c"], ["d", "d"]), ["entailment"] * 2, 1, 0)


@pytest.mark.parametrize("label", ["0", "5", "2.", ".5", "+3.8", "4.500", "35e-1", "5.0E+0"])
def test_regression_labels_are_read_as_awk_does(tmp_path, label) -> None:
    write(tmp_path, "STS-B", "dev", f"{header('STS-B', 'dev')}{'0' * 1 + chr(9) * 9}{label}\n".encode())
    awk = ["awk", "{print $1 / 5.0}"]  # as preprocess_GLUE_tasks.sh
    expected = subprocess.run(awk, input=label, capture_output=True, text=True, check=True).stdout.strip()

    assert read(tmp_path, "STS-B", "dev").labels == [label]
    assert f"{float(label) / 5:.6g}" == expected


@pytest.mark.parametrize(
    "label",
    [
        "nan",
        "inf",
        "-0.1",
        "5.001",
        "five",
        "",
        "1e999",
        "0_1",
        "1_0e-1",
        "\uff14.5",
        "\u0664",
        "0x1",
        "1,5",
        "1 2",
        ".",
    ],
)
def test_regression_label_must_be_in_range(tmp_path, label) -> None:
    start = "0\tg\tf\ty\t0\ts\ts\ta\tb\t"
    write(tmp_path, "STS-B", "dev", f"{header('STS-B', 'dev')}{start} 3.250 \n{start}{label}\n".encode())

    with pytest.raises(UserError, match=r"dev\.tsv:3: label .* is not a number"):
        read(tmp_path, "STS-B", "dev")
    assert read(tmp_path, "STS-B", "dev", "skip").labels == ["3.250"]


def test_label_in_the_last_column_of_mnli(tmp_path) -> None:
    start = "\t".join("01234567")
    train = f"{header('MNLI', 'train')}{start}\tp\th\t-\tneutral\n"
    dev = f"{header('MNLI', 'dev_matched')}{start}\tp\th\tneutral\t-\t-\t-\t-\tentailment\n"
    write(tmp_path, "MNLI", "train", train.encode())
    write(tmp_path, "MNLI", "dev_matched", dev.encode())

    assert read(tmp_path, "MNLI", "train").labels == ["neutral"]
    assert read(tmp_path, "MNLI", "dev_matched").labels == ["entailment"]
    assert read(tmp_path, "MNLI", "dev_matched").texts == (["p"], ["h"])


@pytest.mark.parametrize(
    ("task", "split", "content", "message"),
    [
        ("RTE", "train", "0\ta\tb\tentailment\n", "line 1 looks like data, a header was expected"),
        ("SST-2", "test", "0\ta\n1\tb\n", "line 1 looks like data, a header was expected"),
        ("SST-2", "test", "\ufeff0\ta\n1\tb\n", "line 1 looks like data, a header was expected"),
        ("STS-B", "dev", "0\t" * 9 + "2.5\n", "line 1 looks like data, a header was expected"),
        ("RTE", "train", "sentence1\tsentence2\tlabel\na\tb\tentailment\n", "the header has 3 fields, RTE train needs"),
        ("MNLI", "train", "\t".join("0123456789") + "\n", "the header has 10 fields, MNLI train needs at least 11"),
        ("RTE", "train", "\n0\ta\tb\tentailment\n", "the header has 1 fields"),
        ("CoLA", "test", "0\tGood.\n", "line 1 looks like data, a header was expected; expected .*: index, sentence"),
        ("QQP", "test", "a\tb\tc\n", "column 2 is 'b', QQP test.tsv has 'question1' there: another layout"),
        ("CoLA", "train", "source\tlabel\tstar\tsentence\n", "CoLA train.tsv has no header: remove line 1"),
        ("CoLA", "dev", "sentence\tlabel\n", "CoLA dev.tsv has no header: remove line 1"),
    ],
)
def test_header_faults(tmp_path, task, split, content, message) -> None:
    write(tmp_path, task, split, content.encode())

    with pytest.raises(UserError, match=message):
        read(tmp_path, task, split)


def official(task: str, split: str, header_line: str = "", index: str = "507") -> str:
    """A header and a row of what each column holds; texts are two words."""
    part = TASKS[task].split(split)
    row = ["-"] * len(part.columns)
    for number, column in enumerate(part.text_columns):
        row[column] = f"text {number}"
    if part.labelled:
        row[part.label_column] = TASKS[task].labels[0] if TASKS[task].labels else "2.5"
    else:
        row[0] = index
    return (header_line or header(task, split) if part.header else "") + "\t".join(row) + "\n"


EVERY_FILE = [(name, split.name) for name, task in TASKS.items() for split in task.splits]


@pytest.mark.parametrize(("task", "split"), EVERY_FILE)
@pytest.mark.parametrize(
    "spelled",
    [str, str.upper, lambda line: line.replace("\t", " \t "), lambda line: "\ufeff" + line.replace("\n", "\r\n")],
)
def test_official_headers_are_read_in_any_case(tmp_path, task, split, spelled) -> None:
    write(tmp_path, task, split, official(task, split, spelled(header(task, split))).encode())

    rows = read(tmp_path, task, split)

    assert rows.texts == tuple([f"text {number}"] for number in range(TASKS[task].num_texts))
    assert rows.index == (None if rows.labels else ["507"])


@pytest.mark.parametrize(
    ("task", "split", "line"),
    [
        ("SST-2", "test", "idx\tsentence\n"),
        ("QQP", "test", "index\tquestion1\tquestion2\n"),
        ("RTE", "train", "idx\tpremise\thypothesis\tlabel\n"),
        ("MRPC", "dev", "label\t#1_ID\t#2_ID\tsentence1\tsentence2\n"),
    ],
)
def test_headers_of_other_distributions_are_read(tmp_path, task, split, line) -> None:
    write(tmp_path, task, split, official(task, split, line).encode())

    assert read(tmp_path, task, split).texts[0] == ["text 0"]


@pytest.mark.parametrize("task", TRAINABLE)
def test_a_test_file_in_the_layout_of_dev(tmp_path, task) -> None:
    dev, test = TASKS[task].dev[0], TASKS[task].test[0]
    write(tmp_path, task, test.name, official(task, dev.name).encode())

    if task in ("RTE", "WNLI", "QNLI", "STS-B", "MNLI"):  # texts and index are in the same places
        row = [field.split("\t")[0] for field in official(task, dev.name).splitlines()][1]
        assert read(tmp_path, task, test.name).texts == (["text 0"], ["text 1"])
        assert read(tmp_path, task, test.name).index == [row]
        return
    with pytest.raises(UserError) as caught:
        read(tmp_path, task, test.name)
    assert str(caught.value).startswith(f"{tmp_path / task / test.file_name}:1: ")
    assert f"expected the official header: {', '.join(test.columns)}" in str(caught.value)


@pytest.mark.parametrize("content", [b"index\tsentence\n", b"0\ta\n", b"index\tsentence\n0\n", "i".encode("utf-16")])
def test_a_fault_of_a_test_file_says_that_training_does_not_need_it(tmp_path, content) -> None:
    for split in ("test", "dev"):
        write(tmp_path, "SST-2", split, content)
        with pytest.raises(UserError) as caught:
            read(tmp_path, "SST-2", split)
        assert str(caught.value).endswith("; where nothing is to be predicted, remove the file") == (split == "test")


SNLI = ["index", "captionID", "pairID", *header("MNLI", "test_matched").split("\t")[4:8], "sentence1", "sentence2"]


@pytest.mark.parametrize(
    ("task", "split", "line", "found", "official"),
    [
        ("RTE", "train", "index\tsentence2\tsentence1\tlabel", "2 is 'sentence2'", "'sentence1' there ('sentence1' is"),
        ("RTE", "dev", "index\tquestion\tsentence\tlabel", "2 is 'question'", "'sentence1' there: another layout, or"),
        ("RTE", "test", "index\tlabel\tsentence1\tsentence2", "2 is 'label'", "'sentence1' there ('sentence1' is col"),
        ("RTE", "test", "sentence1\tsentence2\tindex", "2 is 'sentence2'", "'sentence1' there ('sentence1' is colu"),
        ("QNLI", "dev", "index\tsentence1\tsentence2\tlabel", "2 is 'sentence1'", "'question' there: another layout"),
        ("SST-2", "train", "label\tsentence", "1 is 'label'", "'sentence' there ('sentence' is column 2)"),
        ("STS-B", "dev", "\t".join([*"abcdefg", "sentence1", "sentence2", "year"]), "10 is 'year'", "'score' there:"),
        ("QQP", "train", "id\tquestion1\tquestion2\tqid1\tqid2\tis_duplicate", "4 is 'qid1'", "'question1' there ("),
        ("MRPC", "train", header("MRPC", "test"), "1 is 'index'", "'Quality' there: another layout, or another task's"),
        ("MRPC", "test", header("MRPC", "train"), "1 is 'Quality'", "'index' there: another layout"),
        ("MNLI", "train", "\t".join([*SNLI, "label1", "gold_label"]), "9 is 'sentence2'", "'sentence1' there ("),
        ("MNLI", "dev_mismatched", header("MNLI", "dev_matched").replace("gold_label", "label6"), "16 is 'label6'",
         "'gold_label' there: another layout, or another task's file; expected the official header: index, promptID"),
        ("AX", "diagnostic", "Lexical Semantics\tPremise\tHypothesis\tLabel", "1 is 'Lexical Semantics'", "'index'"),
    ],
)  # fmt: skip
def test_other_columns_are_refused(tmp_path, task, split, line, found, official) -> None:
    row = "\t".join("a b" for _ in line.split("\t"))
    path = write(tmp_path, task, split, f"{line.strip()}\n{row}\n".encode())

    with pytest.raises(UserError) as caught:
        read(tmp_path, task, split, "skip" if TASKS[task].split(split).labelled else "stop")
    assert str(caught.value).startswith(f"{path}:1: column {found}, {task} {split}.tsv has {official}")


@pytest.mark.parametrize("row", ["gj04\t1\tGood for you.\t", "Good for you.\t1\t*\tgj04"])
def test_exchanged_columns_of_cola_are_refused(tmp_path, row) -> None:
    write(tmp_path, "CoLA", "dev", f"{row}\n".encode())

    with pytest.raises(
        UserError, match=r"dev\.tsv:1: column 4 is .* expected the columns of CoLA dev\.tsv: source, label"
    ):
        read(tmp_path, "CoLA", "dev")


@pytest.mark.parametrize(("task", "split"), [("RTE", "train"), ("CoLA", "train"), ("SST-2", "test")])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_utf_16_is_named(tmp_path, task, split, encoding) -> None:
    write(tmp_path, task, split, official(task, split).encode(encoding))

    with pytest.raises(UserError, match=r"\.tsv:1: the file is UTF-16 .* convert it: iconv -f UTF-16 -t UTF-8"):
        read(tmp_path, task, split)


@pytest.mark.parametrize(("task", "split"), [("RTE", "train"), ("CoLA", "train"), ("SST-2", "test")])
def test_carriage_returns_alone_are_named(tmp_path, task, split) -> None:
    write(tmp_path, task, split, (official(task, split) * 2).replace("\n", "\r").encode())

    with pytest.raises(UserError, match=r"\.tsv:1: lines end in carriage returns alone, .* convert the file: tr"):
        read(tmp_path, task, split)


def test_carriage_returns_behind_a_header_are_named(tmp_path) -> None:
    write(tmp_path, "SST-2", "dev", b"sentence\tlabel\na\t1\rb\t0\r")

    with pytest.raises(
        UserError, match=r"dev\.tsv:2: found 3 fields and 1 carriage returns, which end no line, expected 2"
    ):
        read(tmp_path, "SST-2", "dev")


def test_nul_is_a_character_and_a_block_of_it_is_no_file(tmp_path) -> None:
    write(tmp_path, "SST-2", "dev", b"sentence\tlabel\na\0b\t1\n")
    assert read(tmp_path, "SST-2", "dev").texts == (["a\0b"],)

    for content in (b"\0" * 4096, b"sentence\tlabel\n" + b"\0" * 4096):
        write(tmp_path, "SST-2", "train", content)
        with pytest.raises(UserError, match=r"train\.tsv:[12]: (the file is UTF-16 \(or damaged|found 1 fields)"):
            read(tmp_path, "SST-2", "train")


def test_cola_train_has_no_header(tmp_path) -> None:
    write(tmp_path, "CoLA", "train", b"x\t0\t*\tBad it.\nx\t1\t\tGood.\n")

    rows = read(tmp_path, "CoLA", "train")

    assert (rows.texts, rows.labels) == ((["Bad it.", "Good."],), ["0", "1"])


@pytest.mark.parametrize("content", [b"", b"\n", b"\xef\xbb\xbf", b"index\tsentence1\tsentence2\tlabel\n\n"])
def test_no_rows(tmp_path, content) -> None:
    write(tmp_path, "RTE", "train", content)

    with pytest.raises(UserError, match=r"train\.tsv: no rows, expected at least one"):
        read(tmp_path, "RTE", "train")


def test_all_rows_skipped(tmp_path) -> None:
    write(tmp_path, "SST-2", "train", b"sentence\tlabel\na\t2\nb\t3\n")

    with pytest.raises(UserError, match="all 2 rows are malformed"):
        read(tmp_path, "SST-2", "train", "skip")


def test_missing_file_and_folder_suggest_near_names(tmp_path) -> None:
    (tmp_path / "sst-2").mkdir()
    with pytest.raises(UserError, match=r"no folder .*SST-2.* found 'sst-2' there.*GLUE_DIR"):
        read(tmp_path, "SST-2", "train")

    write(tmp_path, "MNLI", "dev-matched", b"")
    with pytest.raises(UserError, match=r"no file .*dev_matched\.tsv.* found 'dev-matched\.tsv' there"):
        read(tmp_path, "MNLI", "dev_matched")

    with pytest.raises(UserError, match="no folder .*nowhere"):
        read(tmp_path / "nowhere", "RTE", "train")


def test_has_split(tmp_path) -> None:
    write(tmp_path, "RTE", "test", b"")

    assert has_split(TASKS["RTE"], TASKS["RTE"].split("test"), tmp_path)
    assert not has_split(TASKS["RTE"], TASKS["RTE"].split("dev"), tmp_path)


def test_folder_in_place_of_file(tmp_path) -> None:
    (tmp_path / "RTE" / "train.tsv").mkdir(parents=True)

    with pytest.raises(UserError, match="cannot read .*train.tsv: Is a directory"):
        read(tmp_path, "RTE", "train")


def test_a_device_or_a_pipe_is_no_file(tmp_path) -> None:
    (tmp_path / "RTE").mkdir()
    os.mkfifo(tmp_path / "RTE" / "dev.tsv")
    (tmp_path / "RTE" / "train.tsv").symlink_to("/dev/zero")
    for split in ("train", "dev"):
        with pytest.raises(UserError, match=f"{split}.tsv is a device, a pipe or a socket; expected a file"):
            read(tmp_path, "RTE", split)
        with pytest.raises(UserError, match="is a device"):
            survey_split(TASKS["RTE"], TASKS["RTE"].split(split), tmp_path)


@pytest.mark.skipif(shutil.which("awk") is None, reason="awk is not installed")
def test_qqp_drops_the_rows_that_awk_drops(tmp_path) -> None:
    rng = random.Random(3)
    header = "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate"
    lines = [header]
    for index in range(400):
        fields = [str(index), "1", "2", f'why "{index}?', rng.choice(("", " how ", "wie \u00e4?")), rng.choice("01")]
        fault = rng.randrange(8)
        if fault == 0:
            fields.insert(rng.randrange(6), "stray")
        elif fault == 1:
            del fields[rng.randrange(6)]
        lines.append("" if fault == 2 else "\t".join(fields))
    lines.append("400\t1\t2\tlast\trow\t1")
    path = write(tmp_path, "QQP", "train", "\n".join(lines).encode())

    kept = subprocess.run(["awk", "-F", "\t", "NF==6", path], stdout=subprocess.PIPE, check=True).stdout
    expected = [line.split("\t") for line in kept.decode().removesuffix("\n").split("\n")][1:]
    rows = read(tmp_path, "QQP", "train")

    assert 100 < len(expected) < 400
    assert list(zip(*rows.texts, rows.labels, strict=True)) == [(r[3].strip(), r[4].strip(), r[5]) for r in expected]
    assert (rows.dropped, rows.skipped) == (401 - len(expected), 0)


def test_qqp_rule_leaves_other_faults_alone(tmp_path) -> None:
    header = b"id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n"
    path = write(tmp_path, "QQP", "dev", header + b"0\ta\n1\t1\t2\ta\tb\t7\n2\t1\t2\ta\tb\t1\n")

    with pytest.raises(UserError, match=f"{path}:3: label '7'"):
        read(tmp_path, "QQP", "dev")
    rows = read(tmp_path, "QQP", "dev", "skip")
    assert (len(rows), rows.dropped, rows.skipped) == (1, 1, 1)


def official_root() -> Path:
    given = os.environ.get("GLUE_DIR")
    if not given:
        pytest.skip("GLUE_DIR is not set: no official files to read")
    return Path(given)


@pytest.mark.parametrize("name", OFFICIAL_ROWS)
def test_official_row_counts(name) -> None:
    root = official_root()
    task = TASKS[name]
    if not (root / task.directory).is_dir():
        pytest.skip(f"GLUE_DIR has no {task.directory}")

    rows = [read_split(task, split, root) for split in task.splits]

    assert tuple(map(len, rows)) == OFFICIAL_ROWS[name]
    assert all(all(split.texts[0]) for split in rows)


@pytest.mark.parametrize("name", TASKS)
def test_every_official_file_is_well_formed(name) -> None:
    root = official_root()
    task = TASKS[name]
    splits = [split for split in task.splits if has_split(task, split, root)]
    if not splits:
        pytest.skip(f"GLUE_DIR has no files of {name}")
    for split in splits:
        rows = read_split(task, split, root)
        assert (rows.skipped, rows.dropped) == (0, 0)
        assert (rows.labels is not None) == split.labelled
