from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.project import ROOT

from lightning_glue.tracking.journal import Journal
from lightning_glue.tracking.journals import journals

FULL = Path("/dev/full")  # every write is refused as on a full disk
COMMAND = (
    "import sys\nfrom lightning_glue.utils.console import run_main\nfrom lightning_glue.utils.logs import log\n"
    "def main():\n    log.info('begins')\n    print('first', flush=True)\n    print('second')\n"
    "    open('done', 'w').close()\nrun_main(main, outlives_output={outlives})\n"
)


def call(folder: Path, outlives: bool, **streams: object) -> subprocess.CompletedProcess[str]:
    source = COMMAND.format(outlives=outlives)
    return subprocess.run(
        [sys.executable, "-c", source], cwd=folder, env={"PYTHONPATH": str(ROOT)}, text=True, timeout=60, **streams
    )


@pytest.mark.parametrize("outlives, code, kind", [(True, 0, "warning"), (False, 1, "error")])
def test_a_full_disk_behind_stdout(outlives: bool, code: int, kind: str, tmp_path: Path) -> None:
    with open(FULL, "w") as full:
        done = call(tmp_path, outlives, stdout=full, stderr=subprocess.PIPE)
    said = f"{kind}: what was printed is not complete: No space left on device"
    assert (done.returncode, done.stderr) == (code, f"begins\n{said}\n")
    assert (tmp_path / "done").exists()


def test_a_full_disk_behind_stderr(tmp_path: Path) -> None:
    with open(FULL, "w") as full:
        done = call(tmp_path, False, stdout=subprocess.PIPE, stderr=full)
    assert (done.returncode, done.stdout) == (0, "first\nsecond\n")


@pytest.mark.parametrize("outlives, code", [(True, 0), (False, 1)])
def test_a_pipe_that_nobody_reads(outlives: bool, code: int, tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = call(tmp_path, outlives, stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    assert (done.returncode, done.stderr) == (code, "begins\n")
    assert (tmp_path / "done").exists()


def test_a_closed_stdout(tmp_path: Path) -> None:
    """As after ``>&-``: there is no stream at all."""
    done = call(tmp_path, False, stderr=subprocess.PIPE, preexec_fn=lambda: os.close(1))
    assert (done.returncode, done.stderr) == (0, "begins\n")


@pytest.mark.torture
def test_a_training_outlives_its_log(
    tmp_path: Path, bpe_dir: Path, cache: Path, new_store: Callable[[Path], None]
) -> None:
    """The file that stdout and stderr are sent to is on a full disk; the run is on another and is whole."""
    new_store(tmp_path)
    arguments = ["--task", "WNLI", "--model", "tiny", "--data", "sample", "--gpus", "0", "trainer.max_epochs=1"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "ROBERTA_BPE_DIR": str(bpe_dir)}
    with open(FULL, "w") as full:
        done = subprocess.run(
                [sys.executable, "-m", "lightning_glue.train", *arguments],
            cwd=tmp_path, env=environment, stdout=full, stderr=full, timeout=120,
        )  # fmt: skip
    assert done.returncode == 0
    assert [Journal(one).status() for one in journals(tmp_path / "mlruns/.journal")] == ["FINISHED"]
