"""The artifacts of a journal, in a queue of their own behind its metrics and status: none of them holds those back."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_glue.errors import UserError
from lightning_glue.tracking.journal import Journal, Record, try_lock
from lightning_glue.tracking.mirror import Mirror, brief, is_refusal, is_unreachable
from lightning_glue.tracking.state import State
from lightning_glue.utils.redact import first_line

if TYPE_CHECKING:
    from mlflow import MlflowClient

KINDS = ("artifact", "evict", "register")
REFUSED_TAG = "lightning_glue.refused"  # of a run: what its store refused for good, and why
_NEEDED = "fairseq/"  # artifacts without which no model is registered
_TAG_LIMIT = 4000  # characters
_BACKOFF = (1.0, 60.0)  # seconds between attempts: the first, the longest
_LAG = 1 << 18  # bytes of journal without artifacts after which the position is kept


class Undelivered(Exception):
    """The server did not take a record; what follows it waits."""


class Uploads:
    """Brings the artifacts of one journal to the run's store, as far as its records are delivered.

    Only the newest record of a path counts. What a store refuses for good is noted, on the run as well, and left; what
    fails otherwise is tried again, and keeps nothing else waiting.

    Args:
        client: makes a client of the server that has the run.
        journal: what reads it; only one that no other thread uses.
    """

    def __init__(self, folder: Path, client: Callable[[], MlflowClient], journal: Journal | None = None) -> None:
        self.folder, self.journal, self._connect = folder, journal or Journal(folder), client
        self.state = State(folder)
        self._client: MlflowClient | None = None
        self._done: dict[str, int] = {}  # what is delivered behind the position, by the end of its record
        self._backlog = Backlog()
        self._looked = -1  # the position of the records at the last pass
        self.called = True  # whether something was delivered since that a pass is for
        self._delay, self._due = 0.0, 0.0

    def is_due(self, offset: int, last: bool = False) -> bool:
        """Whether a pass would find something to do, now that the records are delivered up to ``offset``."""
        if self._delay and not last:  # what is new waits with what failed
            return time.monotonic() >= self._due
        if self._delay:
            return offset != self._looked or time.monotonic() >= self._due
        if last:
            return offset != self._looked or self.state.uploads < offset
        return self.called or offset - self._looked > _LAG

    def deliver(self, *, wait: bool = False, again: bool = False, last: bool = False) -> int:
        """One pass over what is new; the number of records done with.

        Args:
            again: what was refused, too.
            last: the training is gone, so the position is kept however little it has moved.

        Raises:
            Undelivered: something is left that may arrive later.
        """
        with try_lock(self.folder / "uploads.lock", wait=wait) as mine:
            if not mine:
                return 0
            self.called = False  # before the look: what is delivered meanwhile calls again
            self.state = State(self.folder)
            if not self.state.run_id:
                self.called = True
                return 0
            self._looked = self.state.offset
            error: Exception | None = None
            done = 0
            try:
                done = self._pass(again, last)
            except Exception as one:  # of any store's client
                error = one
            self._delay = min(max(2 * self._delay, _BACKOFF[0]), _BACKOFF[1]) if error else 0.0
            self._due = time.monotonic() + self._delay
            if error:
                self.state.upload_error = first_line(error)
                self._keep_state()
                raise Undelivered(self.state.upload_error) from error
            return done

    def _pass(self, again: bool, last: bool) -> int:
        state = self.state
        position = self.journal.position(state.uploads, state.uploads_prefix)
        if position is None or state.uploads > state.offset:
            state.uploads, state.uploads_prefix = 0, None
            self._done.clear()
        backlog = self._backlog
        backlog.read(self.journal, (state.uploads, state.uploads_prefix), state.offset)
        plan = backlog.plan
        if again:
            plan = {path: ("artifact", -1) for path in state.refused if path not in plan} | plan
        failure = self._carry_out(plan, again)
        self._note()
        if failure:
            raise Undelivered(f"{failure[0]}: {brief(failure[1])}") from failure[1]
        known = state.upload_error is not None or again or last or bool(plan) or backlog.ended
        if known or state.offset - state.uploads > _LAG:
            state.uploads_prefix = self.journal.advance(state.uploads, state.offset, state.uploads_prefix)
            state.uploads, state.upload_error = state.offset, None
            self._done.clear()
            self._keep_state()
        self._clear_away()
        return backlog.take()

    def _carry_out(self, plan: dict[str, tuple[str, int]], again: bool) -> tuple[str, Exception] | None:
        """Do what is planned, each whatever becomes of the others; what failed first and may arrive later."""
        mirror = Mirror(self.folder, self.state)
        failure: tuple[str, Exception] | None = None
        for path, (kind, end) in plan.items():
            if self._done.get(path) == end or (kind == "artifact" and path in self.state.refused and not again):
                continue
            try:
                if kind == "register":
                    self._register(bool(failure))
                else:
                    (mirror.put if kind == "artifact" else mirror.evict)(path)
                self.state.refused.pop(path, None)
            except Exception as error:
                if not isinstance(error, UserError) and not is_refusal(error):
                    failure = failure or (path, error)
                    if is_unreachable(error):
                        return failure
                    continue
                self.state.refused[path] = brief(error)
            self._done[path] = end
        return failure

    def _register(self, waits: bool) -> None:
        """Register the finished run's model; what is refused for good is said once and not tried again."""
        from lightning_glue.tracking.registry import register

        refused = next((path for path in self.state.refused if path.startswith(_NEEDED)), None)
        if refused:
            self.state.registered = f"not registered: {refused} was refused ({self.state.refused[refused]})"
            return
        if waits:
            raise Undelivered("the model is registered when its files have arrived")
        try:
            name, version, decision = register(self.client, str(self.state.run_id))
            self.state.registered = f"{name} version {version}, {decision}"
        except Exception as error:
            if not isinstance(error, UserError) and not is_refusal(error):
                raise
            self.state.registered = f"not registered: {first_line(error)}"

    @property
    def client(self) -> MlflowClient:
        if self._client is None:
            self._client = self._connect()
        return self._client

    def _note(self) -> None:
        """Say on the run what was refused."""
        text = "; ".join(f"{path}: {reason}" for path, reason in (self.state.left_out | self.state.refused).items())
        if text[:_TAG_LIMIT] != self.state.noted:
            self.client.set_tag(str(self.state.run_id), REFUSED_TAG, text[:_TAG_LIMIT] or "nothing any more")
            self.state.noted = text[:_TAG_LIMIT]
            self._keep_state()

    def _keep_state(self) -> None:
        try:
            self.state.save_uploads()
        except OSError:  # on a full disk artifacts are sent again, which changes nothing
            self._looked, self.called = -1, True

    def _clear_away(self) -> None:
        """Remove the copies once the run is finished and all of it delivered: more may have been written meanwhile."""
        state = self.state
        size = self.journal.path.stat().st_size
        if state.refused or not state.is_delivered(size) or not (self.folder / "artifacts").exists():
            return
        if self.journal.status() == "FINISHED" and self.journal.path.stat().st_size == size:
            shutil.rmtree(self.folder / "artifacts", ignore_errors=True)


class Backlog:
    """The records behind the position of the artifacts, each read once however often a pass is made.

    Attributes:
        plan: what is to be done, by path: the newest record of each, its kind and the position of its end.
        ended: whether the run's status is among them.
    """

    def __init__(self) -> None:
        self.plan: dict[str, tuple[str, int]] = {}
        self.ended = False
        self._count = 0
        self._begin: tuple[int, int | None] = (-1, None)
        self._end = 0

    def read(self, journal: Journal, begin: tuple[int, int | None], end: int) -> None:
        """Take in what is new between ``begin``, a position and its checksum, and ``end``."""
        if begin != self._begin or end < self._end:
            self.plan, self.ended, self._count, self._begin, self._end = {}, False, 0, begin, begin[0]
        for record, after in journal.read(self._end, end):
            self._add(record, after)
        self._end = end

    def _add(self, record: Record, after: int) -> None:
        self.ended = self.ended or "status" in record
        for kind in KINDS:
            if kind in record:
                path = kind if kind == "register" else str(record[kind])
                self.plan.pop(path, None)
                self.plan[path] = (kind, after)
                self._count += 1

    def take(self) -> int:
        """How many records of artifacts were taken in since the last time."""
        count, self._count = self._count, 0
        return count
