"""How far a job is, in a small file beside its checkpoints that every driver of the benchmark can read."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

_FILE = "progress.json"


@dataclass(frozen=True)
class Progress:
    """Attributes:
    step, steps: optimizer steps done, and of the whole training.
    rate: examples a second of training; 0 as long as nobody knows.
    value: selection metric of the last evaluation; None before the first.
    time: of the observation, seconds since 1970.
    """

    step: int
    steps: int
    rate: float
    value: float | None
    time: float

    @property
    def fraction(self) -> float:
        return min(1.0, self.step / max(1, self.steps))


def write_progress(folder: Path, progress: Progress) -> None:
    """Replace the file; one that is lost with the machine is no loss."""
    part = folder / f".{_FILE}.part"
    part.write_text(json.dumps(asdict(progress)))
    os.replace(part, folder / _FILE)


def read_progress(folder: Path) -> Progress | None:
    try:
        found = json.loads((folder / _FILE).read_text())
        return Progress(**found) if isinstance(found, Mapping) else None
    except (OSError, ValueError, TypeError):
        return None
