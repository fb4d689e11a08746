"""What is left of the journal of a finished run once all of it is delivered: its first record and its status.

That is what ``sync``, ``--resume`` and commands that are given the journal's id ask of it. The rest is in MLflow.
"""

from __future__ import annotations

import os
from pathlib import Path

from lightning_glue.tracking.journal import TELLS_STATUS, Journal, encode, final_status, try_lock
from lightning_glue.tracking.state import State
from lightning_glue.utils import files

_SMALL = 1 << 16  # bytes of a journal that is left as it is


def prune(folder: Path) -> bool:
    """Make a journal short whose run is FINISHED and of which the server has everything; whether it is now.

    One of which something was refused is the only place that has it, and stays. So does the journal of a run that did
    not finish: ``--resume`` takes the run's curves from it. The new file takes the place of the old one whole; where
    this is broken off before the positions are written, the two records left are sent again, which changes nothing.

    Raises:
        OSError: the folder cannot be written.
    """
    journal = Journal(folder)
    if journal.path.stat().st_size <= _SMALL:
        return False
    with (
        try_lock(folder / "alive") as over,
        try_lock(folder / "delivery.lock") as delivering,
        try_lock(folder / "uploads.lock") as uploading,
    ):
        if not (over and delivering and uploading):
            return False
        try:
            with journal.locked():
                return _shorten(journal)
        finally:
            journal.close()


def _shorten(journal: Journal) -> bool:
    state = State(journal.folder)
    kept_here = state.refused or state.left_out or state.orphan
    if kept_here or not state.run_id or not state.is_delivered(journal.path.stat().st_size):
        return False
    start, last = journal.start(), journal.newest(*TELLS_STATUS)
    if start is None or last is None or final_status([last]) != "FINISHED":
        return False
    with files.new_file(journal.path, "wb") as file:
        os.fchmod(file.fileno(), 0o600)
        file.write(encode({"start": start}) + encode(last[0]))
    state.offset = state.uploads = journal.path.stat().st_size
    state.prefix = state.uploads_prefix = journal.checksum(0, state.offset, None)
    state.save()
    state.save_uploads()
    return True
