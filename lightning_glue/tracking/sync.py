"""Deliver what is still in journals to the tracking server, one journal after the other."""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path

from lightning_glue.errors import TrackingError
from lightning_glue.tracking.courier import Courier
from lightning_glue.tracking.journal import Journal, is_alive
from lightning_glue.tracking.journals import find_journal, journals, survey
from lightning_glue.tracking.pruning import prune
from lightning_glue.tracking.state import State
from lightning_glue.tracking.uploads import Undelivered
from lightning_glue.tracking.watcher import give_final_status
from lightning_glue.utils.redact import first_line, hide_secrets


def sync(folder: Path, uri: str | None) -> bool:
    """Deliver one journal and say so; whether all of it is delivered."""
    try:
        return _deliver(folder, uri)
    except Exception as error:  # one that cannot be delivered keeps no other waiting
        print(f"journal {folder}: not delivered: {first_line(error)}", file=sys.stderr)
        return False


def _deliver(folder: Path, uri: str | None) -> bool:
    known = State(folder).run_id
    courier = Courier(folder, uri)
    alive = is_alive(folder)
    unsaid = None if alive else _conclude(courier.journal)
    try:
        sent = courier.deliver(wait=True, again=True)
    except Undelivered as error:
        where = hide_secrets(str(courier.state.uri or uri))
        print(f"{_name(courier)}: {courier.left()} records not delivered to {where}: {error}", file=sys.stderr)
        return False
    with suppress(OSError):  # of a folder that can only be read
        prune(folder)
    state = State(folder)
    for what, why in (state.left_out | state.refused).items():
        print(f"{_name(courier)}: {what} was refused: {why}", file=sys.stderr)
    if state.note:
        print(f"{_name(courier)}: {state.note}", file=sys.stderr)
    if not known:
        print(f"journal {folder.name} is {_name(courier)} now")
    if sent or alive:
        print(f"{_name(courier)}: {sent} records delivered" + ", still in training" * alive)
    if unsaid:
        print(f"{_name(courier)}: the status cannot be written to {folder}: {unsaid.strerror}", file=sys.stderr)
    return not unsaid


def _conclude(journal: Journal) -> OSError | None:
    """Why the status of a training that is gone without a word cannot be written down; None where it is."""
    try:
        give_final_status(journal)
    except OSError as error:
        return error
    return None


def _name(courier: Courier) -> str:
    state = State(courier.folder)
    return f"run {state.run_id}" if state.run_id else f"journal {courier.folder.name}"


def _is_empty(folder: Path) -> bool:
    with suppress(OSError):
        return not (folder / "records").stat().st_size
    return False


def sync_all(root: Path, runs: list[str], uri: str | None) -> list[bool]:
    """Deliver the journals of ``runs``, or all below ``root``, the newest first; of each, whether it is complete.

    Raises:
        UserError: there is no journal of a run.
    """
    folders = [find_journal(root, run) for run in runs]
    for run, folder in zip(runs, folders):
        if folder is None:
            raise TrackingError(f"{run}: no such run in {root}; give another folder with --journal")
    complete = [sync(folder, uri) for folder in folders or reversed(journals(root)) if folder]
    if not runs:
        _, unusable = survey(root)
        complete += [False for folder in unusable if not _is_empty(folder)]
    return complete
