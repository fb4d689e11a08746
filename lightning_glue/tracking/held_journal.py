"""The journal of a run that this process trains: made or gone on with, and held until the training ends."""

from __future__ import annotations

import shutil
import time
from contextlib import ExitStack, suppress
from pathlib import Path

from lightning_glue.errors import TrackingError
from lightning_glue.tracking.journal import Journal, Record, final_status, try_lock
from lightning_glue.tracking.known_runs import Stores
from lightning_glue.tracking.state import State
from lightning_glue.utils.files import sync

_LOCK_SECONDS = 5.0  # others look whether the lock is free


class HeldJournal(Journal):
    """A journal whose lock ``alive`` this process holds."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._lock = ExitStack()
        self._made: list[Path] = []  # folders, the innermost first

    @classmethod
    def create(cls, folder: Path, start: Record) -> HeldJournal:
        """A new journal that begins with ``start``.

        Raises:
            UserError: it cannot be written; nothing is left behind.
        """
        journal = cls(folder)
        try:
            journal._made = [path for path in (folder, *folder.parents) if not path.exists()]
            folder.mkdir(0o700, parents=True)
            journal._hold()
            journal.append({"start": start})
            journal.sync()
            with suppress(OSError):  # of file systems that do not sync folders
                sync(folder)
                sync(folder.parent)
        except OSError as error:
            journal.discard()
            raise TrackingError(f"cannot write the journal {folder}: {error.strerror}; see tracking.journal") from None
        return journal

    @classmethod
    def reopen(cls, folder: Path) -> tuple[HeldJournal, list[tuple[Record, int]]]:
        """The journal of a run that is gone on with, and its records.

        Raises:
            UserError: it cannot be read, is another process's, or its run is finished or lost.
        """
        journal = cls(folder)
        try:
            journal._hold()
            records = journal.read()
        except OSError as error:
            raise TrackingError(f"cannot use the journal {folder}: {error.strerror}") from None
        if final_status(records) == "FINISHED":
            raise TrackingError(f"run {journal.run_id} is finished; there is nothing to resume")
        if loss := Stores().loss(folder):
            raise TrackingError(f"run {journal.run_id} {loss}; or start a new run without --resume")
        return journal, records

    @property
    def run_id(self) -> str:
        """MLflow's id of the run; until the server was reached, the journal's."""
        return State(self.folder).run_id or self.folder.name

    @property
    def is_new(self) -> bool:
        """Whether this process has made it."""
        return bool(self._made)

    def _hold(self) -> None:
        deadline = time.monotonic() + _LOCK_SECONDS
        while True:
            with ExitStack() as attempt:
                if attempt.enter_context(try_lock(self.folder / "alive")):
                    self._lock = attempt.pop_all()
                    return
            if time.monotonic() > deadline:
                raise TrackingError(f"run {self.run_id} is being trained by another process")
            time.sleep(0.05)

    def record(self, record: Record) -> None:
        """Append a record.

        Raises:
            UserError: the disk takes no more.
        """
        try:
            self.append(record)
        except OSError as error:
            raise TrackingError(
                f"cannot write the journal {self.folder}: {error.strerror}; nothing before is lost: free "
                f"space, then --resume {self.run_id}"
            ) from None

    def release(self) -> None:
        """Let go of the lock: the training is over."""
        self._lock.close()

    def discard(self) -> None:
        """Remove what was made for a run that cannot be."""
        folder, *parents = self._made or [self.folder]
        with suppress(OSError), try_lock(folder / "delivery.lock", wait=True):  # the watcher writes nothing meanwhile
            shutil.rmtree(folder, ignore_errors=True)
        self.release()
        with suppress(OSError):  # others have put something there meanwhile
            for parent in parents:
                parent.rmdir()
