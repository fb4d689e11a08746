"""Runs the trials of a study on its groups: claims them, feeds them to warm processes, decides, survives deaths.

The controller is no DDP process and trains nothing itself, so a trial may crash in any way without taking the study
along. Several controllers, on one machine or many, share a study through its storage.
"""

from __future__ import annotations

import selectors
import shutil
import signal
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

from optuna.trial import FrozenTrial, TrialState

from lightning_glue.errors import UserError
from lightning_glue.execution.channel import Message
from lightning_glue.execution.executor import Executor, readable, stop, stop_signals
from lightning_glue.execution.job import Job
from lightning_glue.tuning.space import Space
from lightning_glue.tuning.study import SharedStudy
from lightning_glue.utils.logs import log

_READABLE = 40  # characters of a study's name in the name of its folder
_FAILURES_IN_A_ROW = 3  # after which something other than the parameters must be wrong
_OF_THE_PARAMETERS = ("memory", "diverged")  # kinds of failure that would come again


@dataclass
class Running:
    """A trial on a group.

    Attributes:
        values: selection metric of each seed that is through.
        finished: processes that are through with the current seed.
    """

    trial_id: int
    number: int
    parameters: dict[str, Any]
    first: int  # number of the trial this one is a retry of, or its own
    values: list[float] = field(default_factory=list)
    runs: list[str] = field(default_factory=list)
    collapsed: int = 0
    outcome: Message = field(default_factory=dict)
    finished: int = 0
    last: tuple[int, float] | None = None  # evaluation, value
    since: float = field(default_factory=time.monotonic)


class Observer(Protocol):
    """Is told what happens; must return at once."""

    def changed(self, running: list[Running]) -> None: ...

    def finished(self, trial: FrozenTrial, runs: list[str]) -> None: ...


class Controller:
    """One machine's share of a study.

    Args:
        make_job: the training of a trial with these parameters and this seed number (0, 1, ...): takes the trial's
            :class:`Running` and the seed number.
        groups: train the jobs; a trial at a time each.
        seeds: trainings per trial; the trial's value is their median.
        warm: keep a group's processes from one trial to the next.
    """

    def __init__(
        self,
        study: SharedStudy,
        space: Space,
        make_job: Callable[[Running, int, Path], Job],
        groups: Sequence[Executor],
        observer: Observer,
        *,
        seeds: int = 1,
        warm: bool = True,
    ) -> None:
        self.study, self.space, self.make_job, self.observer = study, space, make_job, observer
        self.seeds, self.warm = seeds, warm
        self.folder = study_folder(study.name, study.id)
        self.groups = groups
        self.ready: dict[int, int] = {}  # group number to processes that said so
        self.running: dict[int, Running] = {}  # by group number
        self.selector = selectors.DefaultSelector()
        self.stopped_by: signal.Signals | None = None
        self.last_failure = ""
        self.failures_in_a_row = 0
        self._stopping = False
        self._proven = False  # whether a training has come to its end here
        self._next_beat = self._next_reap = 0.0

    def run(self) -> None:
        """Work until no trial waits or runs anywhere, or a signal comes; leaves no process behind.

        Raises:
            UserError: a training says that the user has made a mistake, or trial after trial fails.
        """
        with stop_signals(self._stop):
            try:
                while not self.stopped_by and self._assign():
                    for group, rank in readable(self.selector, 0.5):
                        self._read(group, rank)
                    self._keep_time()
            finally:
                self._stopping = True
                stop(self.groups, self.selector, heard=self._heard_at_the_end)
                self.study.interrupt()

    def _stop(self, number: int, _: FrameType | None) -> None:
        if self.stopped_by:
            raise KeyboardInterrupt  # the second time: at once
        self.stopped_by = signal.Signals(number)

    def _assign(self) -> bool:
        """Give every idle group a trial; False when the whole study is through."""
        idle = [group for group in self.groups if group.place.number not in self.running]
        for group in idle:
            if group.processes and self.ready[group.place.number] == group.place.processes:
                self._claim(group)
        idle = [group for group in idle if group.place.number not in self.running]
        if not idle:
            return True
        to_do, elsewhere = self.study.left()
        starting = sum(bool(group.processes) for group in idle)
        for group in [group for group in idle if not group.processes][: max(0, to_do - starting)]:
            self._start(group)
        return bool(to_do or elsewhere or self.running)

    def _start(self, group: Executor) -> None:
        self.ready[group.place.number] = 0
        group.start()
        group.register(self.selector)

    def _claim(self, group: Executor) -> None:
        trial = self.study.claim(self.space)
        if trial is None:
            return
        told = trial.user_attrs
        running = Running(
            trial_id=trial._trial_id,
            number=trial.number,
            parameters=trial.params,
            first=told.get("retry_of", trial.number),
            runs=list(told.get("runs", [])),
        )
        if self.seeds > 1:  # a retry knows the seeds that are through
            known = self.study.trial(trial._trial_id)
            running.values = [known.intermediate_values[step] for step in sorted(known.intermediate_values)]
        self.running[group.place.number] = running
        self._train(group, running)

    def _train(self, group: Executor, running: Running) -> None:
        seed = len(running.values)
        running.finished, running.outcome, running.last = 0, {}, None
        job = self.make_job(running, seed, scratch_folder(self.folder, running.first, seed).resolve())
        group.send({"job": asdict(job)})
        self.observer.changed(list(self.running.values()))

    def _read(self, group: Executor, rank: int) -> None:
        messages = group.channels[rank].receive()
        if messages is None:
            self._group_died(group)
            return
        for message in messages:
            if not group.processes:  # ended by the message before
                return
            if message["event"] == "ready":
                self.ready[group.place.number] += 1
            elif group.place.number not in self.running:
                raise UserError(message["message"])  # its place is not fit for any training
            else:
                self._heard(group, self.running[group.place.number], rank, message)

    def _heard_at_the_end(self, group: Executor, rank: int, message: Message) -> None:
        """While the groups are stopped: a training may come to its own end yet; a failure is most likely the stop's."""
        running = self.running.get(group.place.number)
        if not running or message["event"] not in ("run", "report", "done"):
            return
        try:
            self._heard(group, running, rank, message)
        except UserError as error:
            log.warning("trial %d: %s", running.number, error)

    def _heard(self, group: Executor, running: Running, rank: int, message: Message) -> None:
        match message["event"]:
            case "run":
                if message["run_id"] not in running.runs:
                    running.runs.append(message["run_id"])
                self.study.set_trial_attribute(running.trial_id, "runs", running.runs)
            case "report":
                running.last = (message["step"], message["value"])
                prune = self.seeds == 1 and self.study.report(running.trial_id, *running.last)
                group.send_to(rank, {"prune": prune})
                self.observer.changed(list(self.running.values()))
            case "done":
                running.finished += 1
                running.outcome = message if rank == 0 else running.outcome
                if running.finished == group.place.processes:
                    self._seed_done(group, running, running.outcome)
            case "failed":
                self._failed(group, running, message["kind"], message["message"])

    def _seed_done(self, group: Executor, running: Running, outcome: Message) -> None:
        self._same_data(outcome["data"])
        self.failures_in_a_row, self._proven = 0, True
        running.collapsed += outcome["collapsed"]
        pruned = outcome["pruned"]
        if not pruned:
            running.values.append(outcome["value"])
            if self.seeds > 1:
                pruned = self.study.report(running.trial_id, len(running.values), outcome["value"])
        if not pruned and len(running.values) < self.seeds:
            if not self._stopping:
                self._train(group, running)
            return
        said = {"collapsed": running.collapsed or None, "first_step_seconds": outcome["first_step_seconds"]}
        noted = {key: value for key, value in said.items() if value is not None}  # each is a transaction of its own
        if pruned:
            ours = self.study.finish(running.trial_id, TrialState.PRUNED, **noted)
        else:
            ours = self.study.finish(running.trial_id, TrialState.COMPLETE, statistics.median(running.values), **noted)
        self._leave(group, running, keep_checkpoints=not ours)

    def _same_data(self, digests: dict[str, str]) -> None:
        """Values on different data cannot be compared."""
        stored = self.study.data_digests(digests)
        for name in sorted(set(digests) | set(stored)):
            if digests.get(name) != stored.get(name):
                raise UserError(
                    f"study {self.study.name!r} has trials on other data: split {name} has digest "
                    f"{stored.get(name, 'none')[:12]} there, {digests.get(name, 'none')[:12]} here; "
                    "use the same files or another --study"
                )

    def _failed(self, group: Executor, running: Running, kind: str, reason: str) -> None:
        if kind == "user" and not self._proven:
            raise UserError(reason)  # the trial is given back: it can run once the mistake is mended
        goes_on = self.study.fail(running.trial_id, reason, again=kind not in _OF_THE_PARAMETERS)
        if group.place.processes > 1 or kind == "error":
            self._end(group)  # its other processes hang, or its state is unknown
        self._leave(group, running, keep_checkpoints=goes_on)
        self._count_failure(kind, reason, group)

    def _group_died(self, group: Executor) -> None:
        reason = group.exit_reason()
        self._end(group)
        running = self.running.get(group.place.number)
        if running:
            goes_on = self.study.fail(running.trial_id, reason, again=True)
            self._leave(group, running, keep_checkpoints=goes_on)
        self._count_failure("died", reason, group)

    def _count_failure(self, kind: str, reason: str, group: Executor) -> None:
        """Out of memory and divergence are the parameters' fault; anything else three times in a row is not."""
        self.last_failure = reason
        if kind in _OF_THE_PARAMETERS:
            return
        self.failures_in_a_row += 1
        if self.failures_in_a_row >= _FAILURES_IN_A_ROW + self.study.retries:
            raise UserError(
                f"{self.failures_in_a_row} trainings failed one after another, the last: {reason}; "
                f"{group.log} ends with\n{group.last_words()}"
            )

    def _leave(self, group: Executor, running: Running, *, keep_checkpoints: bool) -> None:
        """The trial has its final state."""
        del self.running[group.place.number]
        if not keep_checkpoints:
            for seed in range(self.seeds):
                shutil.rmtree(scratch_folder(self.folder, running.first, seed), ignore_errors=True)
        if not self.warm and group.processes and not self._stopping:
            self._end(group)
        self.observer.finished(self.study.ended(running.trial_id), running.runs)
        self.observer.changed(list(self.running.values()))

    def _end(self, group: Executor) -> None:
        stop([group], self.selector, grace=0)

    def _keep_time(self) -> None:
        """Heartbeats of this controller's trials, and a look at the others'."""
        now = time.monotonic()
        if now >= self._next_beat:
            self._next_beat = now + self.study.heartbeat
            for group in self.groups:
                running = self.running.get(group.place.number)
                if running and not self.study.beat(running.trial_id):
                    self._end(group)  # taken for dead: somebody else goes on with its trial
                    del self.running[group.place.number]
        if now >= self._next_reap:
            self._next_reap = now + self.study.heartbeat
            for trial in self.study.reap():
                self.observer.finished(self.study.ended(trial._trial_id), trial.user_attrs.get("runs", []))
            self.observer.changed(list(self.running.values()))


def study_folder(name: str, study_id: str) -> Path:
    """Where this machine keeps a study's logs and the checkpoints of its running trials: one for each study alone."""
    readable = "".join(c if c.isascii() and (c.isalnum() or c in "-_.") else "_" for c in name)
    return Path("mlruns") / ".tune" / f"{readable[:_READABLE].lstrip('.')}-{study_id}"


def scratch_folder(study: Path, trial: int, seed: int) -> Path:
    """Checkpoints of one training while its trial is not finished, in its study's folder."""
    return study / f"trial-{trial}-seed-{seed}"
