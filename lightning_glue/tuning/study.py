"""An Optuna study that several controllers share: its trials, their heartbeats, failures and retries.

Whoever turns a waiting trial to RUNNING owns it, and every storage lets one alone do so, SQLite since
:mod:`lightning_glue.tuning.storage` sees to it: no trial is lost or run twice. Only a few trials wait in the storage at
a time: the study's maker queues the first ones, and whoever takes one queues the one so many places behind it. The
number of trials is exact however many controllers take part; :mod:`lightning_glue.tuning.slots` says what decides.
"""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import optuna
from optuna.pruners import BasePruner, NopPruner
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, Trial, TrialState

from lightning_glue.tuning.heartbeat import Heartbeats
from lightning_glue.tuning.slots import SURPLUS, Slots, slot_of
from lightning_glue.tuning.space import Space
from lightning_glue.tuning.stored_study import StoredStudy
from lightning_glue.tuning.strategy import Sampler
from lightning_glue.utils.processes import process_identity

AHEAD = 16  # trials that wait in the storage
_STANDSTILL_SECONDS = 10.0  # without a new trial, after which the maker of a study is taken for dead
_LOOK_SECONDS = 1.0  # how long a look at the trials is good for
_GAP_SECONDS = 1.0  # nothing waits although trials are missing: whoever was to queue them is gone
_INTERRUPTED = "interrupted"  # reason of a failure that costs no retry
_TOTAL = "trials "  # attributes of a study; each total asked for is an attribute of its own: the largest is


class SharedStudy(StoredStudy):
    """One controller's view of a study.

    Args:
        identity: what must be the same for all trials (task, metric, space, ...), compared with the stored study's.
        heartbeat: seconds between two signs of life of a running trial.

    Attributes:
        mine: ids of the trials that run under this controller.
    """

    def __init__(
        self,
        name: str,
        storage: BaseStorage,
        sampler: Sampler,
        pruner: BasePruner,
        identity: Mapping[str, Any],
        *,
        heartbeat: float,
        retries: int,
    ) -> None:
        super().__init__(name, storage, identity, patience=min(10.0, heartbeat))
        self.sampler, self.pruner = sampler, pruner
        self.heartbeat, self.retries = heartbeat, retries
        self.mine: set[int] = set()
        self.total, self.first, self.grows = 0, list[dict[str, Any]](), True
        self._retry_before = 0  # number of the first trial that was not there when this controller began
        self._gap_since: float | None = None
        self.slots = Slots()  # as they were seen last
        self._looked = float("-inf")  # when that was
        self._heartbeats = Heartbeats(heartbeat)
        self._pulse = 0

    @property
    def study(self) -> optuna.Study:
        """A fresh view: Optuna caches other controllers' trials between two calls of its own ask and tell."""
        return self._view(optuna.samplers.RandomSampler())

    def _view(self, sampler: optuna.samplers.BaseSampler) -> optuna.Study:
        view = copy.copy(self._loaded)  # nothing cached is copied, and the storage is not asked for the name again
        view.sampler = sampler
        return view

    @cached_property
    def _loaded(self) -> optuna.Study:
        return optuna.load_study(study_name=self.name, storage=self.storage, pruner=self.pruner)

    def look(self) -> Slots:
        """The trials by slot, as the storage has them now: the same object each time, brought up to date."""
        self.slots.update(self.trials())
        self._looked = time.monotonic()
        return self.slots

    def ended(self, trial_id: int) -> FrozenTrial:
        """A trial that has just ended, as the storage has it; :attr:`slots` know it, and the others as a look does.

        Where they were looked at just now, it is read alone, for less than half of what all that wait and run cost.
        """
        if not self._just_looked():
            self.look()
        trial = self.trial(trial_id)
        self.slots.put(trial)
        return trial

    def _just_looked(self) -> bool:
        return time.monotonic() - self._looked < _LOOK_SECONDS

    def asked_for(self) -> int:
        """The most trials that any command has asked of the study; 0 where none has."""
        names = [name for name in self.attributes() if name.startswith(_TOTAL)]
        return max((int(name.removeprefix(_TOTAL)) for name in names), default=0)

    def fill_queue(self, total: int, first: list[dict[str, Any]], *, grows: bool = True) -> None:
        """Work for ``total`` trials that have not failed; those that failed before are tried again.

        Args:
            first: parameters of the first trials; a slot's trial has its own whoever makes it, and how often.
            grows: whether this controller stays for more trials that another one asks for meanwhile.
        """
        self.total, self.first, self.grows = total, first, grows
        self.set_attribute(f"{_TOTAL}{total}", True)
        if not self.created:
            self._wait_for_the_maker()
        slots = self.look()
        self._retry_before = len(self.trials())
        if self.created or not slots.waiting(total):  # else others are at work and queue what is missing
            self._queue()
        self.set_attribute("filled", True)

    def _wait_for_the_maker(self) -> None:
        """Until the first trials are queued, or no more come: then the maker has died over them."""
        count, since = -1, time.monotonic()
        while "filled" not in self.attributes() and time.monotonic() - since < _STANDSTILL_SECONDS:
            before, count = count, len(self.trials())
            since = since if count == before else time.monotonic()
            time.sleep(0.1)

    def _queue(self) -> None:
        """Make trials for free slots until enough wait.

        Others may be at it: each looks again before it makes one, and takes any of the slots but the study's maker.
        """
        while True:
            slots = self.look()
            free = slots.free(self.total, self._retry_before)
            if not free or len(slots.waiting(self.total)) >= AHEAD:
                return
            self._make(slots, free[0] if self.created else random.choice(free))

    def _make(self, slots: Slots, slot: int) -> None:
        template = slots.template(slot, self.first[slot] if slot < len(self.first) else {})
        self._patiently(lambda: self.storage.create_new_trial(self.study_id, template))

    def left(self) -> tuple[int, bool]:
        """How many trials are still to be taken, as far as can be told, and whether any runs, here or elsewhere."""
        slots = self.look()
        to_do = self.to_do(slots)
        if not to_do and self.grows and self.asked_for() > self.total:
            self.total = self.asked_for()
            return self.left()
        return to_do, bool(slots.running())

    def to_do(self, slots: Slots) -> int:
        return len(slots.waiting(self.total)) + len(slots.free(self.total, self._retry_before))

    def claim(self, space: Space) -> Trial | None:
        """Own the next waiting trial, with its parameters drawn; None where none waits."""
        from lightning_glue.tuning.space import suggest_parameters

        # Not read again where they were just now: what was seen to hold its slot holds it until it fails, and only one
        # controller can take it.
        taken = self._take(self.slots, at_most=1) if self._just_looked() else None
        taken = taken or self._take(self.look())
        if taken is None:
            self._mind_the_gap(self.slots)
            return None
        trial_id = taken._trial_id
        self.mine.add(trial_id)
        following = slot_of(taken) + AHEAD
        if following < self.total and self.slots.is_free(following, self._retry_before):
            self._make(self.slots, following)
        sampler = self.sampler(taken.user_attrs.get("retry_of", taken.number))

        def draw() -> Trial | None:
            try:
                trial = Trial(self._view(sampler), trial_id)
                suggest_parameters(trial, space)
            except optuna.exceptions.UpdateFinishedTrialError:  # taken for dead meanwhile
                self.mine.discard(trial_id)
                return None
            return trial

        self.beat(trial_id)
        return self._patiently(draw)

    def _take(self, slots: Slots, at_most: int | None = None) -> FrozenTrial | None:
        """Turn the first trial that waits to RUNNING, of ``at_most`` so many; those that hold no slot are withdrawn."""
        for waiting in slots.waiting(self.total)[:at_most]:

            def attempt(trial_id: int = waiting._trial_id) -> bool:
                try:
                    return self.storage.set_trial_state_values(trial_id, state=TrialState.RUNNING)
                except optuna.exceptions.UpdateFinishedTrialError:
                    return False

            if not self._patiently(attempt):
                continue
            if slots.holds(waiting):
                taken = copy.copy(waiting)  # that one is the storage's own
                taken.state = TrialState.RUNNING
                slots.put(taken)
                return taken
            self.finish(waiting._trial_id, TrialState.FAIL, reason=SURPLUS)
        return None

    def _mind_the_gap(self, slots: Slots) -> None:
        """Queue trials where nothing waits for a while though slots are free: who was to do it has died."""
        if slots.waiting(self.total) or not slots.free(self.total, self._retry_before):
            self._gap_since = None
        elif self._gap_since is None:
            self._gap_since = time.monotonic()
        elif time.monotonic() - self._gap_since > _GAP_SECONDS * (1 + random.random()):
            self._gap_since = None
            self._queue()

    def beat(self, trial_id: int) -> bool:
        """Show that the trial is alive; False where it was given up for dead and belongs to somebody else now."""
        self._pulse += 1
        if not self.set_trial_attribute(trial_id, "heartbeat", f"{process_identity()} {self._pulse}"):
            self.mine.discard(trial_id)
            return False
        return True

    def report(self, trial_id: int, step: int, value: float) -> bool:
        """Record an evaluation; whether the trial should stop, pruned or given up for dead."""

        def attempt() -> bool:
            try:
                self.storage.set_trial_intermediate_value(trial_id, step, value)
            except optuna.exceptions.UpdateFinishedTrialError:
                return True
            if isinstance(self.pruner, NopPruner):
                return False
            return bool(self.pruner.prune(self.study, self.storage.get_trial(trial_id)))

        return self._patiently(attempt)

    def finish(self, trial_id: int, state: TrialState, value: float | None = None, **attributes: Any) -> bool:
        """Set the final state; False, and no change, where another controller has finished the trial meanwhile."""
        unsure = False  # whether the storage went away between doing it and saying so

        def attempt() -> bool:
            nonlocal unsure
            try:
                for key, entry in attributes.items():
                    self.storage.set_trial_user_attr(trial_id, key, entry)
                self.storage.set_trial_state_values(trial_id, state, None if value is None else [value])
            except optuna.exceptions.UpdateFinishedTrialError:
                return unsure and self.storage.get_trial(trial_id).state == state
            except Exception:
                unsure = True
                raise
            return True

        if state == TrialState.PRUNED:
            reported = self.trial(trial_id).intermediate_values
            value = reported[max(reported)] if reported else None
        self.mine.discard(trial_id)
        return self._patiently(attempt)

    def fail(self, trial_id: int, reason: str, *, again: bool, **attributes: Any) -> bool:
        """Mark a trial FAIL and, if it is to run ``again`` and has retries left, queue its next attempt.

        Returns:
            Whether the trial goes on: in its next attempt, or elsewhere, where it was taken for dead. Should this
            process die before that is queued, another one queues it.
        """
        trial = self.trial(trial_id)
        attempts = trial.user_attrs.get("attempt", 0) + (reason != _INTERRUPTED)
        again = again and attempts <= self.retries
        if not self.finish(trial_id, TrialState.FAIL, reason=reason, attempts=attempts, again=again, **attributes):
            return True
        slots = self.look()
        if again and slots.is_free(slot_of(trial), 0):
            self._make(slots, slot_of(trial))
        return again

    def interrupt(self) -> None:
        """Give back every trial of this controller: they wait again, with what they have reached."""
        for trial_id in list(self.mine):
            self.fail(trial_id, _INTERRUPTED, again=True)

    def reap(self) -> list[FrozenTrial]:
        """Fail and queue again the trials whose controller is dead, see :mod:`lightning_glue.tuning.heartbeat`."""
        running = self.look().running()
        now = time.monotonic()
        self._heartbeats.look(now, self._patiently.outages)
        dead = []
        for trial in running:
            if trial._trial_id not in self.mine and self._heartbeats.is_dead(trial, now):
                heard = trial.user_attrs.get("heartbeat")
                self.fail(trial._trial_id, "its controller died" if heard else _INTERRUPTED, again=True)
                dead.append(trial)
        return dead
