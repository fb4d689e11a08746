"""The leaderboard's zip: what is written passes the check, and every fault is found at its line."""

from __future__ import annotations

import csv
import io
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from helpers.project import run
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_glue.errors import UserError
from lightning_glue.pipeline.benchmark_folder import read_benchmark
from lightning_glue.pipeline.leaderboard import FILES, LeaderboardFile
from lightning_glue.pipeline.outputs import Outputs, write_outputs
from lightning_glue.pipeline.submission import median_seed, write_submission
from lightning_glue.pipeline.submission_check import (
    Expected,
    check_file,
    check_submission,
    rows_of_benchmark,
    rows_of_files,
)
from lightning_glue.tasks import TASKS, TRAINABLE

from .conftest import write_benchmark

INDEX = [str(number) for number in range(12)]
SOME = Expected(INDEX)
NAMES = sorted(FILES)


def lines_of(file: LeaderboardFile) -> list[str]:
    """A right file of the rows of ``INDEX``, line by line."""
    answers = ["0.000", "5.000", "2.345"] if file.task.is_regression else list(file.task.labels)
    rows = [f"{index}\t{answers[i % len(answers)]}" for i, index in enumerate(INDEX)]
    return ["index\tprediction", *rows]


def zipped(path: Path, texts: dict[str, str | bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in texts.items():
            archive.writestr(name, text)
    return path


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All tasks but QNLI, three seeds, the scores of which are 0.5, 1 and 0.25; CoLA without test file."""
    tasks = [task for task in TRAINABLE if task != "QNLI"]
    folder = write_benchmark(tmp_path_factory.mktemp("benchmarks") / "b", tasks, [1, 2, 3])
    rng, targets = np.random.default_rng(0), np.array([0, 1, 0, 1])
    for seed, right in ((1, 2), (2, 4), (3, 1)):
        for task in [*(TASKS[name] for name in tasks), TASKS["AX"]]:
            for split in task.dev:
                chosen = np.where(np.arange(4) < right, targets, 1 - targets)
                said = chosen[:, None] if task.is_regression else np.eye(task.num_outputs)[chosen]
                kind = np.float32 if task.is_regression else np.int64
                one = Outputs(task.name, split.name, said.astype(np.float32), targets.astype(kind), None)
                write_outputs(one, folder / "outputs" / task.name / f"seed-{seed}")
            for split in task.test if task.name != "CoLA" else ():
                said = 2 * rng.normal(size=(12, task.num_outputs)).astype(np.float32)
                write_outputs(
                    Outputs(task.name, split.name, said, None, INDEX), folder / "outputs" / task.name / f"seed-{seed}"
                )
    return folder


@pytest.mark.parametrize("chosen", ["seed:2", "median", "ensemble"])
def test_what_is_written_passes_the_check(chosen: str, benchmark: Path, tmp_path: Path) -> None:
    written = write_submission(benchmark, chosen, tmp_path / "s.zip")
    assert list(written.absent) == ["CoLA.tsv", "QNLI.tsv"] and set(written.files) | set(written.absent) == set(FILES)
    assert written.absent["CoLA.tsv"] == "no test.tsv of CoLA was there to predict"
    assert written.absent["QNLI.tsv"] == "QNLI is not among the benchmark's tasks"
    checked = check_submission(tmp_path / "s.zip", rows_of_benchmark(read_benchmark(benchmark)), partial=True)
    assert (checked.faults, sum(checked.rows.values()), len(checked.notes)) == ([], 9 * 12, 9)
    whose = {"seed:2": "seed 2", "median": "seed 1", "ensemble": "ensemble of seeds 1, 2, 3"}[chosen]
    assert set(written.files.values()) - {whose} <= (
        {"seed 2"} if chosen == "median" else set()
    )  # STS-B by correlation
    assert written.files["AX.tsv"] == written.files["RTE.tsv"] == whose
    again = tmp_path / "again.zip"
    write_submission(benchmark, chosen, again)
    assert again.read_bytes() == (tmp_path / "s.zip").read_bytes()


@given(st.sampled_from(NAMES), st.data())
@settings(deadline=None, max_examples=60)
def test_any_prediction_is_written_rightly(name: str, data: st.DataObject) -> None:
    import torch

    from lightning_glue.inference.submission import submission_lines

    file = FILES[name]
    numbers = st.floats(-(2.0**100), 2.0**100, width=32)
    index = data.draw(
        st.lists(st.text(st.characters(exclude_characters="\t\n\r", codec="utf-8"), min_size=1), unique=True)
    )
    row = st.lists(numbers, min_size=file.task.num_outputs, max_size=file.task.num_outputs)
    outputs = data.draw(st.lists(row, min_size=len(index), max_size=len(index)))
    lines = submission_lines(file.task, torch.tensor(outputs).reshape(len(index), file.task.num_outputs), index)
    assert check_file(file, "".join(lines).encode(), Expected(index)) == ([], len(index))


@pytest.mark.parametrize("name", NAMES)
def test_jiants_writer_is_accepted(name: str) -> None:
    """It is Python's csv with tabs, which ends lines with a carriage return and a line feed."""
    target = io.StringIO()
    csv.writer(target, delimiter="\t").writerows(line.split("\t") for line in lines_of(FILES[name]))
    assert check_file(FILES[name], target.getvalue().encode(), SOME) == ([], 12)


# How a line is spoiled (None: it is taken away), and what is said of it.
MUTATIONS: dict[str, tuple[Callable[[str], bytes | None], str]] = {
    "gone": (lambda line: None, "missing here"),
    "twice": (lambda line: f"{line}\n{line}".encode(), "already"),
    "another index": (lambda line: b"x" + line.encode(), "is none of the test file"),
    "no tab": (lambda line: line.replace("\t", " ").encode(), "1 fields"),
    "a field more": (lambda line: line.encode() + b"\t1", "3 fields"),
    "empty": (lambda line: b"", "is empty"),
    "no label": (lambda line: line.encode() + b"x", "is no "),
    "a blank behind": (lambda line: line.encode() + b" ", "is no "),
    "latin-1": (lambda line: line.encode() + b"\xe9", "is not UTF-8"),
    "nan": (lambda line: line.partition("\t")[0].encode() + b"\tnan", "is no "),
}


@given(st.sampled_from(NAMES), st.sampled_from(sorted(MUTATIONS)), st.integers(2, 13))
@settings(deadline=None, max_examples=150)
def test_a_single_fault_is_found_at_its_line(name: str, mutation: str, number: int) -> None:
    spoil, said = MUTATIONS[mutation]
    lines: list[bytes | None] = [line.encode() for line in lines_of(FILES[name])]
    lines[number - 1] = spoil(lines_of(FILES[name])[number - 1])
    faults, _ = check_file(FILES[name], b"".join(line + b"\n" for line in lines if line is not None), SOME)
    at = number + 1 if mutation == "twice" else number
    assert [fault for fault in faults if fault.line == at and said in fault.text], faults
    assert {fault.line for fault in faults} == {at}


@pytest.mark.parametrize(
    ("score", "said"),
    [("5.001", "is not from 0 to 5"), ("-0.001", "is not from 0 to 5"), ("2.3", "has not 3"), ("3", "has not 3"),
     ("1e0", "has not 3"), ("1_0.000", "is no number"), ("٣.000", "is no number"), ("inf", "is no number")],
)  # fmt: skip
def test_scores_have_a_range_and_decimals(score: str, said: str) -> None:
    lines = lines_of(FILES["STS-B.tsv"])
    lines[4] = f"3\t{score}"
    (fault,), _ = check_file(FILES["STS-B.tsv"], "\n".join(lines).encode(), SOME)
    assert (fault.line, said in fault.text) == (5, True)
    assert str(fault).startswith("STS-B.tsv:5: ")


@pytest.mark.parametrize(
    "header", ["prediction\tindex", "Index\tprediction", "index,prediction", "\ufeffindex\tprediction", ""]
)
def test_the_header_is_as_it_is(header: str) -> None:
    (fault,), _ = check_file(FILES["RTE.tsv"], "\n".join([header, *lines_of(FILES["RTE.tsv"])[1:]]).encode(), SOME)
    assert fault.line == 1


def test_a_zip_holds_the_files_and_nothing_else(tmp_path: Path) -> None:
    expected = dict.fromkeys(FILES, SOME)
    right: dict[str, str | bytes] = {name: "\n".join(lines_of(file)) + "\n" for name, file in FILES.items()}
    assert check_submission(zipped(tmp_path / "s.zip", right), expected).faults == []
    wrong = right | {
        "notes.txt": "",
        "all/RTE.tsv": right["RTE.tsv"],
        "cola.tsv": "",
        "sub/": "",
        "QQP.tsv": b"0" * 10**8,
    }
    del wrong["WNLI.tsv"]
    said = {fault.file: fault.text for fault in check_submission(zipped(tmp_path / "s.zip", wrong), expected).faults}
    assert said.pop("QQP.tsv").startswith("has more than ")
    assert said == {
        "notes.txt": "is no file of the leaderboard; take it out",
        "all/RTE.tsv": "lies in a folder; expected RTE.tsv at the top of the zip",
        "cola.tsv": "is no file of the leaderboard; did you mean CoLA.tsv?",
        "sub/": "is a folder; expected the files themselves at the top of the zip",
        "WNLI.tsv": "is missing; expected 11 files",
    }
    with zipfile.ZipFile(tmp_path / "s.zip", "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr("RTE.tsv", "")
    assert ("RTE.tsv", "is in the zip twice") in [
        (fault.file, fault.text) for fault in check_submission(tmp_path / "s.zip", expected).faults
    ]
    data = bytearray(zipped(tmp_path / "s.zip", right).read_bytes())
    data[60] ^= 0xFF  # of the first file's content
    (tmp_path / "s.zip").write_bytes(data)
    assert check_submission(tmp_path / "s.zip", expected).faults
    (tmp_path / "s.zip").write_bytes(b"PK nothing")
    (fault,) = check_submission(tmp_path / "s.zip", expected).faults
    assert "is no zip file" in fault.text


def test_rows_are_those_of_the_official_files_or_of_the_folder(tmp_path: Path) -> None:
    right: dict[str, str | bytes] = {name: "\n".join(lines_of(file)) + "\n" for name, file in FILES.items()}
    path = zipped(tmp_path / "s.zip", right)
    said = {fault.file: str(fault) for fault in check_submission(path).faults}
    assert said["RTE.tsv"] == (
        "RTE.tsv:14: indices '12' to '2999', 2988 rows, are missing here; 3000 rows are expected, there are 12"
    )
    (tmp_path / "RTE").mkdir()
    rows = "".join(f"{index}\tone\tother\n" for index in INDEX)
    (tmp_path / "RTE" / "test.tsv").write_text(f"index\tsentence1\tsentence2\n{rows}")
    checked = check_submission(path, rows_of_files(str(tmp_path)))
    assert "RTE.tsv" not in {fault.file for fault in checked.faults}
    assert checked.notes == [
        f"RTE.tsv: compared with the 12 rows of {tmp_path / 'RTE' / 'test.tsv'}; the leaderboard wants 3000"
    ]


@pytest.mark.parametrize("chosen", ["seed:", "best", "seed:-1", "seed:1e3"])
def test_unknown_choices_are_named(chosen: str, benchmark: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected seed:<number>, median or ensemble"):
        write_submission(benchmark, chosen, tmp_path / "s.zip")


def test_the_command_writes_and_checks(benchmark: Path, tmp_path: Path) -> None:
    command = ["lightning_glue.submit", str(benchmark), "--from", "ensemble", "--out", "s.zip"]
    result = run(*command, cwd=tmp_path, check=False)
    assert (result.returncode, len(result.stdout.splitlines())) == (1, 9)
    assert "error: QNLI.tsv is absent: QNLI is not among the benchmark's tasks" in result.stderr
    assert run(*command, "--partial", cwd=tmp_path).stderr.endswith("s.zip: no fault in 9 files, 108 rows\n")
    checked = run("lightning_glue.submit", "--check", "s.zip", cwd=tmp_path, check=False, GLUE_DIR="")
    assert checked.returncode == 1 and "CoLA.tsv: is missing; expected 11 files\n" in checked.stdout
    assert run("lightning_glue.submit", str(benchmark), "--check", "s.zip", "--partial", cwd=tmp_path).stdout == ""
    for wrong in (["--check", "none.zip"], ["nobody"], [str(benchmark), "--from", "seed:9"]):
        failed = run("lightning_glue.submit", *wrong, cwd=tmp_path, check=False)
        assert (failed.returncode, failed.stderr.count("\n")) == (2, 1)


def test_of_seeds_that_score_the_same_the_first_is_the_median(tmp_path: Path) -> None:
    folder = write_benchmark(tmp_path / "b", ["RTE"], [1, 2, 3])
    targets = np.array([0, 1])
    for seed in (1, 2, 3):
        said = Outputs("RTE", "dev", np.eye(2, dtype=np.float32)[targets], targets, None)
        write_outputs(said, folder / "outputs" / "RTE" / f"seed-{seed}")
    assert median_seed(read_benchmark(folder), "RTE", [1, 2, 3]) == 1
