"""What benchmarks found, kept: `make bench` leaves a dated file in records/, which each of them adds its ratios to."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common import machine

from lightning_glue.utils.files import new_file

ROOT = Path(__file__).resolve().parents[1]
RECORD = "BENCH_RECORD"  # the file; without it nothing is kept


def commit() -> str:
    """The commit that is measured; ``+`` behind it: with changes that are not committed."""
    git = ["git", "-C", str(ROOT)]
    found = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True)
    if found.returncode:
        return "unknown"
    changed = subprocess.run([*git, "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True)
    return found.stdout.strip() + "+" * bool(changed.stdout.strip())


def keep(ratios: Mapping[str, float]) -> None:
    """Add what the running benchmark found to the file that ``BENCH_RECORD`` names, if there is one.

    Args:
        ratios: what was measured side by side in one run, by what it is a ratio of.
    """
    if not os.environ.get(RECORD):
        return
    path = Path(os.environ[RECORD])
    record: dict[str, Any] = (
        json.loads(path.read_text()) if path.exists() else {"commit": commit(), "machine": machine()}
    )
    record.setdefault("benchmarks", {})[Path(sys.argv[0]).stem] = {
        "arguments": sys.argv[1:],
        "ended": time.strftime("%Y-%m-%d %H:%M"),
        "load": round(os.getloadavg()[0], 1),
        "ratios": {name: round(float(value), 4) for name, value in ratios.items()},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with new_file(path) as file:
        json.dump(record, file, indent=2)
        file.write("\n")
