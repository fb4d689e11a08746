"""MLflow's database, empty: making its tables takes two seconds, copying them no time."""

from __future__ import annotations

import atexit
import shutil
import signal
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

NAME = "mlflow.db"

# Ends within a transaction that has begun to change the file: its journal is hot.
_KILLED = """
import os, signal, sqlite3

connection = sqlite3.connect("mlflow.db", isolation_level=None)
connection.execute("pragma cache_size = 1")
connection.execute("begin immediate")
connection.execute("update experiments set name = 'never committed'")
connection.executemany("insert into tags values (?, ?, 'no run')", [(f"key {i}", "x" * 3000) for i in range(200)])
os.kill(os.getpid(), signal.SIGKILL)
"""


def put_store(folder: Path) -> None:
    """Put it into a folder that has none."""
    if not (folder / NAME).exists():
        shutil.copy(_template(), folder)


@cache
def _template() -> Path:
    import mlflow

    folder = Path(tempfile.mkdtemp(prefix="store-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    mlflow.MlflowClient(f"sqlite:///{folder / NAME}").search_experiments()
    return folder / NAME


def leave_transaction(folder: Path) -> None:
    """What a process leaves in a store when it is killed in the middle of a transaction."""
    done = subprocess.run([sys.executable, "-c", _KILLED], cwd=folder)
    assert done.returncode == -signal.SIGKILL
    assert (folder / f"{NAME}-journal").stat().st_size > 0
