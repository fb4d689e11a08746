"""The journals on this machine: which ones there are, which run each is of, and how to have one delivered."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from lightning_glue.errors import TrackingError
from lightning_glue.tracking.journal import Journal, is_alive, warn
from lightning_glue.tracking.state import State
from lightning_glue.utils.console import command

JOURNALS = "mlruns/.journal"  # where they are unless tracking.journal says otherwise


def survey(root: Path) -> tuple[list[Path], dict[Path, str]]:
    """The journals below ``root`` that tell of a run, newest first, and why the others do not."""
    found: list[tuple[float, str, Path]] = []
    unusable: dict[Path, str] = {}
    try:
        folders = sorted(root.iterdir())
    except FileNotFoundError:
        return [], {}
    except OSError as error:
        return [], {root: f"{error.strerror}; expected a folder of journals, see tracking.journal"}
    for folder in folders:
        try:
            if folder.is_dir() and (folder / "records").exists():
                found.append((_started(folder), folder.name, folder))
        except Unusable as error:
            if not is_alive(folder):  # else it is just being made
                unusable[folder] = str(error)
        except OSError as error:
            unusable[folder] = f"{error.strerror}; get rights there, or move it away"
    return [folder for *_, folder in sorted(found, reverse=True)], unusable


class Unusable(Exception):
    """A journal that does not tell which run it is of."""


def _started(folder: Path) -> float:
    """When a journal's run was started, in ms."""
    journal = Journal(folder)
    size = journal.path.stat().st_size
    start = journal.start()
    if start:
        when = start.get("time")
        return when if isinstance(when, int | float) else 0
    if State(folder).run_id:
        return journal.path.stat().st_mtime * 1000
    if not size:
        raise Unusable("it is empty, its training got no further; it can be removed")
    raise Unusable("its first record is lost, so it cannot be told which run it is of; move it away")


def journals(root: Path) -> list[Path]:
    """The journals below ``root``, newest first by their start; says which ones cannot be used."""
    found, unusable = survey(root)
    for folder, why in unusable.items():
        warn(f"the journal {folder} is left out: {why}")
    return found


def find_journal(root: Path, run: str) -> Path | None:
    """The journal of a run on this machine, by the journal's id or the run's."""
    return next((folder for folder in journals(root) if run in (folder.name, _run_id(folder))), None)


class RunIndex:
    """The journals below ``root`` by the id of their run; each is looked into once, however many runs are asked for."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._known: dict[str, str] = {}  # run id to the journal's

    def find(self, run: str) -> Path | None:
        """The journal of a run, by its own id or the run's."""
        if run not in self._known:
            seen = set(self._known.values())
            for name in sorted(entry.name for entry in os.scandir(self.root) if entry.name not in seen):
                if run_id := _run_id(self.root / name):
                    self._known[run_id] = name
        found = self.root / self._known.get(run, run)
        return found if found.parent == self.root and (found / "records").exists() else None


def _run_id(folder: Path) -> str | None:
    with suppress(OSError):
        return State(folder).run_id
    return None


def delivered_run(run: str, root: Path = Path(JOURNALS)) -> str:
    """MLflow's id of a run, given that or the id of its journal.

    Raises:
        UserError: MLflow does not have it yet.
    """
    folder = find_journal(root, run)
    if folder is None:
        return run
    run_id = State(folder).run_id
    if not run_id:
        raise TrackingError(f"run {run} has not reached MLflow yet; {sync_command(run, root)} delivers it")
    return run_id


def sync_command(run: str, root: Path) -> str:
    """What delivers a run of the journals below ``root``, to be typed here."""
    elsewhere = [] if root == Path(JOURNALS) else ["--journal", str(root)]
    return command("python", "-m", "lightning_glue.sync", run, *elsewhere)
