"""A check before a training: what is wrong in files is found, with file and line, and counted."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.project import run

from lightning_glue.config.description import read_description
from lightning_glue.data.check import Report, check, grouped, tables
from lightning_glue.data.own import resolve
from lightning_glue.data.own_rows import read_own_split
from lightning_glue.data.tokenizer import load_tokenizer
from lightning_glue.tasks import TASKS, described_task

ROWS = [
    ("a plain film", "good"),  # line 2
    ("a plain film", "bad"),  # a conflict
    ("another film", "good"),
    ("another film", "good"),  # a duplicate
    ("", "bad"),
    ("a trÃ¨s bad film", "bad"),  # was read as Latin-1
    ("word " * 100, "good"),  # line 8
    ("one more", ""),  # a fault
    ("the last", "bad"),
]
DEV = [("the last", "bad"), ("unseen", "good"), ("unseen too", "odd")]


@pytest.fixture
def description(tmp_path: Path) -> Path:
    for name, rows in (("train", ROWS), ("dev", DEV)):
        lines = "".join(f"{text},{label}\n" for text, label in rows)
        (tmp_path / f"{name}.csv").write_text(f"review,stars\n{lines}", encoding="utf-8")
    (tmp_path / "films.yaml").write_text(
        "train: train.csv\ndev: dev.csv\ntext: review\nlabel: stars\nlabels: [good, bad, fair]\n"
    )
    return tmp_path / "films.yaml"


def checked(description: Path, bpe_dir: Path) -> Report:
    task = described_task(resolve(read_description(description)))
    return check(task, Path("/"), load_tokenizer("gpt2", str(bpe_dir)), 64)


def test_every_finding_has_its_place(description: Path, bpe_dir: Path) -> None:
    report = checked(description, bpe_dir)
    train, dev = (str(description.parent / name) for name in ("train.csv", "dev.csv"))
    found = {(finding.severity, finding.kind, finding.place) for finding in report.findings}
    assert found == {
        ("fault", "train fault", f"{train}:9"),
        ("fault", "dev fault", f"{dev}:4"),
        ("warning", "train conflict", f"{train}:3"),
        ("warning", "train duplicate", f"{train}:5"),
        ("warning", "train empty", f"{train}:6"),
        ("warning", "train misread", f"{train}:7"),
        ("warning", "train cut", f"{train}:8"),
        ("warning", "dev leak", f"{dev}:2"),
        ("warning", "train class", train),
        ("warning", "dev class", dev),
    }
    lines = [str(finding) for group in grouped(report.findings) for finding in group]
    assert lines[0].startswith("fault: ")
    assert f"warning: {dev}:2: in train too: {train}:10" in lines
    assert f"warning: {train}:3: label 'bad', but 'good' in {train}:2, of the same text" in lines
    by_split, by_label = tables(described_task(resolve(read_description(description))), report)
    assert [row[:9] for row in by_split] == [
        ["split", "rows", "faults", "empty", "misread", "duplicates", "conflicts", "in train", "cut"],
        ["train", "8", "1", "1", "1", "1", "1", "0", "1"],
        ["dev", "2", "1", "0", "0", "0", "0", "1", "0"],
    ]
    assert by_label[1] == ["good", "4 (50.0%)", "1 (50.0%)"]


def test_tokens_are_those_of_a_training(description: Path, bpe_dir: Path) -> None:
    from lightning_glue.data.binarize import prepare
    from lightning_glue.data.datamodule import load_split

    task, encoder = described_task(resolve(read_description(description))), load_tokenizer("gpt2", str(bpe_dir))
    prepared = prepare(task, Path("/"), encoder, description.parent / "cache", "skip")
    train = load_split(task, task.train, prepared.directory, 10**6)
    assert checked(description, bpe_dir).splits[0].tokens.tolist() == train.lengths.tolist()


def test_a_file_that_two_splits_share_is_checked_as_it_is_read(tmp_path: Path, bpe_dir: Path) -> None:
    rows = [("never closed" if i == 30 else f"film {i}", "good" if i % 3 else "bad") for i in range(40)]
    lines = [f"{text},{label}\n" for text, label in rows]
    (tmp_path / "films.csv").write_text("review,stars\n" + "".join(lines) + "no label\n")
    said = {"train": str(tmp_path / "films.csv"), "text": "review", "label": "stars"}
    task = described_task(resolve(read_description(said)))
    report = check(task, Path("/"), load_tokenizer("gpt2", str(bpe_dir)), 64)
    for one in report.splits:
        read = read_own_split(task, one.split, "skip")
        assert (one.lines.tolist(), one.labels) == (list(read.lines), read.labels)
        assert [lines[line - 2].split(",")[0] for line in one.lines] == read.texts[0]
    assert report.counts == {("fault", "train fault"): 1}
    (tmp_path / "films.csv").write_text("review,stars\n" + "".join(lines) + '"never closed,bad\n')
    report = check(task, Path("/"), load_tokenizer("gpt2", str(bpe_dir)), 64)
    assert {finding.text.partition(": ")[2] for finding in report.findings if finding.severity == "fault"} == {
        "a quote is opened in this row and never closed"
    }


def test_of_very_many_findings_all_are_counted_and_the_first_are_kept(tmp_path: Path, bpe_dir: Path) -> None:
    rows = "".join(f"the same,{label}\n" for label in ["a", "A\u200b", "nan"] * 500)
    (tmp_path / "t.csv").write_text("x,y\n" + rows, encoding="utf-8")
    said = {"train": str(tmp_path / "t.csv"), "dev": str(tmp_path / "t.csv"), "text": "x", "label": "y"}
    task = described_task(resolve(read_description(said)))
    report = check(task, Path("/"), load_tokenizer("gpt2", str(bpe_dir)), 64)
    assert report.counts == {
        ("warning", "train duplicate"): 499, ("warning", "dev duplicate"): 499, ("warning", "train conflict"): 1000,
        ("warning", "dev conflict"): 1000, ("warning", "dev leak"): 1500, ("warning", "train labels"): 2,
    }  # fmt: skip
    assert len(report.findings) == 2 * 499 + 2 * 1000 + 1000 + 2
    alike = [finding.text for finding in report.findings if finding.kind == "train labels"]
    assert alike == [
        r"labels 'A\u200b' and 'a' look alike: are they two classes?",
        "the label 'nan' is a class here: does it stand for a missing value?",
    ]


def test_glues_files_are_checked_alike(tmp_path: Path, bpe_dir: Path) -> None:
    folder = tmp_path / "QQP"
    folder.mkdir()
    header = "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n"
    rows = ["0\t1\t2\ta\tb\t1", "short", "1\t1\t2\ta\tb\t0", "2\t1\t2\tc\td\t2", "3\t1\t2\tc\t\t0"]
    (folder / "train.tsv").write_text(header + "\n".join(rows))
    report = check(TASKS["QQP"], tmp_path, load_tokenizer("gpt2", str(bpe_dir)), 64)
    train, dev = report.splits
    assert (len(train), len(dev), report.faulty) == (3, 0, True)
    said = [(finding.severity, finding.kind, finding.place.rpartition(":")[2]) for finding in report.findings]
    assert said[:2] == [("warning", "train fault", "3"), ("fault", "train fault", "5")]  # fairseq drops the first
    assert ("warning", "train conflict", "4") in said and ("warning", "train empty", "6") in said
    assert any("no file" in finding.text and "dev.tsv" in finding.text for finding in report.findings)


def test_the_command_ends_with_1_where_a_training_would_stop(
    description: Path, bpe_dir: Path, cache: Path, tmp_path: Path
) -> None:
    flags = ["films.yaml", "--model", "tiny", "data.max_tokens=64"]
    for name, rows in (("train", ROWS), ("dev", DEV)):
        lines = "".join(f"{text},{label}\n" for text, label in rows if label in ("good", "bad"))
        (tmp_path / f"{name}.csv").write_text(f"review,stars\n{lines}", encoding="utf-8")
    said = run("lightning_glue.check", *flags, cwd=tmp_path, ROBERTA_BPE_DIR=str(bpe_dir))
    assert said.stdout.splitlines()[-1] == "faults: 0, warnings: 8"
    with (tmp_path / "train.csv").open("a") as file:
        file.write("no label\n")
    said = run("lightning_glue.check", *flags, cwd=tmp_path, check=False, ROBERTA_BPE_DIR=str(bpe_dir))
    assert (said.returncode, said.stdout.splitlines()[-1]) == (1, "faults: 1, warnings: 8")
    said = run("lightning_glue.check", "RTEE", cwd=tmp_path, check=False)
    assert (said.returncode, said.stderr) == (2, "error: unknown task 'RTEE'; did you mean 'RTE'?\n")
    said = run("lightning_glue.check", "none.csv", cwd=tmp_path, check=False)
    assert said.returncode == 2 and said.stderr.startswith("error: none.csv: no such file; expected a description's ")
