"""MNLI preprocessing: ``python -m lightning_glue.preprocess`` against fairseq's ``preprocess_GLUE_tasks.sh``.

    GLUE_DIR=... ROBERTA_BPE_DIR=... python benchmarks/preprocess.py [ROWS [ROUNDS]]

The training rows of ``GLUE_DIR`` (or of the sample) are repeated to ROWS; the whole of MNLI has 392702. Both sides may
use all cores, take turns, and start from the same files; what they write is compared byte for byte.
"""

from __future__ import annotations

import itertools
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

from common import describe_machine, versions
from records import keep

from lightning_glue.data import sources
from lightning_glue.tasks import get_task

TASK = get_task("MNLI")
TARGET = 10
CORES = len(os.sched_getaffinity(0))
BPE_FILES = ("encoder.json", "vocab.bpe", "dict.txt")


def write_input(folder: Path, rows: int) -> int:
    """MNLI below ``folder`` with ``rows`` training rows; how many sentences that makes over all splits."""
    glue = os.environ.get("GLUE_DIR")
    source = sources.glue_directory(TASK, "glue" if glue else "sample", glue) / TASK.directory
    (folder / TASK.directory).mkdir(parents=True)
    lines = 0
    for split in TASK.splits:
        header, *found = (source / split.file_name).read_bytes().splitlines(keepends=True)
        if split == TASK.train:
            found = list(itertools.islice(itertools.cycle(found), rows))
        (folder / TASK.directory / split.file_name).write_bytes(header + b"".join(found))
        lines += len(found)
    return lines * TASK.num_texts


def prepare_script(folder: Path, glue: Path, bpe: Path) -> list[str]:
    """fairseq's script as it is, but with a worker per core instead of 60 and a ``wget`` that finds the files there."""
    spec = find_spec("fairseq")
    assert spec and spec.origin, "fairseq is installed"
    fairseq = Path(spec.origin).parent
    (folder / "shims").mkdir(parents=True)
    (folder / "shims" / "wget").write_text("#!/bin/sh\n")
    (folder / "shims" / "wget").chmod(0o755)
    for name in BPE_FILES:
        shutil.copy(bpe / name, folder / name)
    (folder / "examples").symlink_to(fairseq / "examples")
    script = (fairseq / "examples/roberta/preprocess_GLUE_tasks.sh").read_text()
    (folder / "script.sh").write_text(script.replace("--workers 60", f"--workers {CORES}"))
    return ["bash", "script.sh", str(glue), TASK.name]


def seconds(command: list[str], folder: Path) -> float:
    """Wall time of a command whose ``MNLI-bin`` is to be made in ``folder``."""
    shutil.rmtree(folder / f"{TASK.name}-bin", ignore_errors=True)
    path = f"{folder / 'shims'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    start = time.perf_counter()
    result = subprocess.run(command, cwd=folder, env={**os.environ, "PATH": path}, capture_output=True, text=True)
    if result.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{result.stderr}")
    return time.perf_counter() - start


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below ``folder`` by its name, fairseq's logs left out."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "preprocess.log")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def same_work(ours: Path, theirs: Path) -> None:
    written, expected = (contents(folder / f"{TASK.name}-bin") for folder in (ours, theirs))
    assert sorted(written) == sorted(expected), "the two sides wrote different files"
    differing = [name for name in expected if written[name] != expected[name]]
    assert not differing, f"these files differ: {', '.join(differing)}"
    print(f"{len(expected)} files, {sum(map(len, expected.values())) / 1e6:.1f} MB, are the same on both sides")


def main() -> None:
    rows = int(sys.argv[1]) if len(sys.argv) > 1 else 40_000
    rounds = int(sys.argv[2]) if len(sys.argv) > 2 else 1
    bpe = sources.bpe_directory(os.environ.get("ROBERTA_BPE_DIR"))
    print(f"{describe_machine()}; {versions('tokenizers')}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        sentences = write_input(folder / "glue", rows)
        print(f"MNLI with {rows} training rows (of 392702), {sentences} sentences, {CORES} workers on each side")
        theirs = prepare_script(folder / "theirs", folder / "glue", bpe)
        ours = [sys.executable, "-m", "lightning_glue.preprocess", "--task", TASK.name]
        ours += ["--glue-dir", str(folder / "glue"), "--bpe-dir", str(bpe)]
        (folder / "ours").mkdir()
        taken: dict[str, list[float]] = {"ours": [], "theirs": []}
        for _ in range(rounds):
            taken["theirs"].append(seconds(theirs, folder / "theirs"))
            taken["ours"].append(seconds(ours, folder / "ours"))
        same_work(folder / "ours", folder / "theirs")
    for name, side in (("fairseq's script", "theirs"), ("lightning_glue.preprocess", "ours")):
        took = statistics.median(taken[side])
        print(f"{name:<26} {took:8.2f} s   {sentences / took:9.0f} sentences/s")
    ratio = statistics.median(b / a for a, b in zip(taken["ours"], taken["theirs"]))
    print(f"{ratio:.1f} times as fast, target {TARGET}; load {os.getloadavg()[0]:.1f} at the end")
    keep({"fairseq's script / ours": ratio})


if __name__ == "__main__":
    main()
