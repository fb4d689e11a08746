"""``predict`` of a file that is much longer takes no more memory: `make torture`."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from helpers.project import ROOT
from helpers.scorers import make_scorer, texts

pytestmark = pytest.mark.torture

SHORT, LONG = 150_000, 400_000  # before, kernels are made for shapes, and what is freed finds its places
MARGIN = 64 << 20  # bytes: 270 for each row more, less than a row and its answer take
_INTERVAL = 0.2


def resident(pid: int) -> int:
    """Bytes of a process; 0 once it is gone."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):
        return 0


def peak(model: Path, file: Path, out: Path) -> int:
    """The most bytes that a whole ``predict`` of a file held."""
    command = [sys.executable, "-m", "lightning_glue.predict", str(model), str(file), "--out", str(out), "--gpus", "0"]
    process = subprocess.Popen(
        command, cwd=file.parent, env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE
    )
    sizes, ended = [0], threading.Event()

    def sample() -> None:
        while not ended.wait(_INTERVAL):
            sizes.append(resident(process.pid))

    thread = threading.Thread(target=sample)
    thread.start()
    _, said = process.communicate()
    ended.set()
    thread.join()
    assert process.returncode == 0, said.decode()
    return max(sizes)


def test_memory_does_not_grow_with_the_file(bpe_dir: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    make_scorer("SST-2", bpe_dir, model)
    sentences = texts(1000, longest=8)
    found = {}
    for rows in (SHORT, LONG):
        file, out = tmp_path / f"{rows}.txt", tmp_path / f"{rows}.tsv"
        with open(file, "w") as target:
            target.writelines(f"{sentences[i % 1000]} {i}\n" for i in range(rows))
        found[rows] = peak(model, file, out)
        with open(out) as lines:
            assert sum(1 for _ in lines) == rows + 1
    assert found[LONG] < found[SHORT] + MARGIN, found
