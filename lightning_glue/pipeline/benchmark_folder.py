"""The folder of a benchmark, as it is read once the work is done: what was asked, what became of each job."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_glue.errors import UserError, suggest
from lightning_glue.pipeline.ledger import Ledger
from lightning_glue.tasks import TRAINABLE

ROOT = Path("mlruns/.glue")
FILE, LEDGER = "benchmark.json", "ledger.jsonl"
_SEED = re.compile(r"seed-([0-9]{1,9})")


@dataclass(frozen=True)
class BenchmarkFolder:
    """A benchmark and where it is.

    Attributes:
        asked: the content of benchmark.json.
    """

    path: Path
    asked: dict[str, Any]

    @property
    def id(self) -> str:
        return str(self.asked.get("id", ""))

    @property
    def name(self) -> str:
        return str(self.asked.get("name", self.path.name))

    @property
    def tasks(self) -> list[str]:
        """Those asked for, in the order of the leaderboard."""
        return [task for task in TRAINABLE if task in self.asked["tasks"]]

    @property
    def uri(self) -> str | None:
        return self.asked.get("uri")

    def outputs(self, task: str, member: str) -> Path:
        """Folder of a member's outputs; ``member`` is ``seed-<k>``, ``ensemble`` or ``soup``."""
        return self.path / "outputs" / task / member

    def seeds(self, task: str) -> list[int]:
        """The seeds that were asked for and have outputs of a task."""
        folders = (self.path / "outputs" / task).glob("seed-*")
        found = {int(match[1]) for folder in folders if (match := _SEED.fullmatch(folder.name))}
        return [seed for seed in self.asked["seeds"] if seed in found]

    def last_events(self) -> dict[str, dict[str, Any]]:
        """The last event of each job in ledger.jsonl that says how far it is: done, failed, started or lost."""
        ledger = Ledger(self.path / LEDGER)
        ledger.refresh()
        told = ("started", "done", "failed", "lost", "died", "stopped")
        return {event["job"]: event for event in ledger.events if event["state"] in told}


def read_benchmark(path: Path) -> BenchmarkFolder:
    """The benchmark in a folder.

    Raises:
        UserError: there is none.
    """
    try:
        asked = json.loads((path / FILE).read_text(encoding="utf-8"))
        tasks, seeds = asked["tasks"], asked["seeds"]
        plain = isinstance(tasks, list) and bool(seeds) and all(isinstance(seed, int) for seed in seeds)
    except OSError as error:
        raise UserError(f"{path} is no folder of a benchmark ({FILE}: {error.strerror}); give another") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        plain = False
    if not plain:
        raise UserError(f"{path / FILE} is no description of a benchmark; restore it, or give another folder")
    return BenchmarkFolder(path, asked)


def find_benchmark(name: str | None) -> BenchmarkFolder:
    """A benchmark by its name or its folder; the only one here where neither is given.

    Raises:
        UserError: there is none of this name, or there are several and none is named.
    """
    if name and (Path(name).expanduser() / FILE).is_file():
        return read_benchmark(Path(name).expanduser())
    here = [read_benchmark(file.parent) for file in sorted(ROOT.glob(f"*/{FILE}"))]
    names = [one.name for one in here]
    if not here:
        wanted = f"no benchmark {name!r}" if name else "no benchmark"
        raise UserError(f"{wanted} below {ROOT} of this folder; run one (python -m lightning_glue.glue), or give its "
                        "folder")  # fmt: skip
    if name:
        found = [one for one in here if one.name == name]
        if not found:
            raise UserError(f"no benchmark {name!r} below {ROOT}{suggest(name, names)}")
        return found[0]
    if len(here) > 1:
        raise UserError(f"several benchmarks below {ROOT}: name one of {', '.join(names)}")
    return here[0]
