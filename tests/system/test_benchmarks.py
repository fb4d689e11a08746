"""The benchmarks can be started: what they import is there, also in the programs that they start."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from helpers.project import ROOT
from helpers.zygote import FORKED

IMPORT = """
import importlib, sys
from pathlib import Path

sys.path[:0] = [sys.argv[1]]
names = sorted(path.stem for path in Path(sys.argv[1]).glob("*.py"))
print(*[importlib.import_module(name).__name__ for name in names])
"""


def test_every_benchmark_is_imported(tmp_path: Path) -> None:
    command = [sys.executable, "-c", FORKED + IMPORT, str(ROOT / "benchmarks")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {"common", "records", "tracking", "train"} <= {*done.stdout.split()}


def test_the_proxy_of_the_tracking_benchmark_begins(tmp_path: Path) -> None:
    code = "import sys; sys.path[:0] = [sys.argv.pop(1)]; import tracking\nexec(tracking._PROXY.format(0.2))"
    command = [sys.executable, "-c", FORKED + code, str(ROOT / "benchmarks"), "9"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    assert process.stdout and process.stdout.readline().startswith("http://127.0.0.1:")
    process.kill()
    process.communicate()
