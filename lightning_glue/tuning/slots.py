"""The places of a study's trials: a study of 50 trials has the slots 0 to 49, and each is to get one trial that counts.

Trials that failed do not count, and nobody can keep two controllers from making a trial for the same slot at the same
moment. So one rule decides, by what is in the storage alone: of the trials in a slot that have not failed, it belongs
to the one with the lowest number, and no other is ever run. This is exact, because a trial is looked up after it was
made, numbers are given in the order in which trials are made, and a trial that has failed stays so: whoever finds a
trial to be the lowest finds that every lower one has failed for good. What is not the lowest is withdrawn, as surplus.
"""

from __future__ import annotations

import bisect
import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from optuna.trial import FrozenTrial, TrialState, create_trial

from lightning_glue.tuning.values import best_of

SURPLUS = "surplus"  # reason of the failure of a trial that never ran because its slot had one


def slot_of(trial: FrozenTrial) -> int:
    """A trial's slot; studies of earlier versions and trials queued by hand name none."""
    return trial.user_attrs.get("slot", trial.user_attrs.get("retry_of", trial.number))


def is_surplus(trial: FrozenTrial) -> bool:
    return trial.state == TrialState.FAIL and trial.user_attrs.get("reason") == SURPLUS


class Slots:
    """The trials of a study, by slot; surplus ones are left out.

    It can be brought up to date again and again, which costs what has changed since and what is unfinished, however
    many trials are finished.

    Args:
        trials: all of them, in the order of their numbers.

    Attributes:
        tried: each slot's trials, in the order of their numbers.
        unfinished: those that wait or run, by number.
        counts: finished ones, by state.
        best: the complete one with the highest value, the first of equals; None before there is one.
    """

    def __init__(self, trials: Iterable[FrozenTrial] = ()) -> None:
        self.tried: dict[int, list[FrozenTrial]] = {}
        self.unfinished: dict[int, FrozenTrial] = {}
        self.counts: Counter[TrialState] = Counter()
        self.best: FrozenTrial | None = None
        self._settled = 0  # trials with lower numbers are all known and finished
        self._finished: set[int] = set()  # numbers of others that are
        self._unnamed: dict[int, FrozenTrial] = {}  # trials without a slot that have not failed, by number
        self._free: list[int] = []  # sorted
        self._free_for = (0, 0)  # the total and the number they hold for
        self.update(list(trials))

    def update(self, trials: Sequence[FrozenTrial]) -> None:
        """Args: trials: all of them, in the order of their numbers."""
        for trial in itertools.islice(trials, self._settled, None):
            self.put(trial)

    def put(self, trial: FrozenTrial) -> None:
        """One trial as it is now; the others are as they were."""
        if trial.number < self._settled or trial.number in self._finished:
            return
        self._put(trial)
        while self._settled in self._finished:
            self._finished.remove(self._settled)
            self._settled += 1

    def _put(self, trial: FrozenTrial) -> None:
        slot = slot_of(trial)
        others = [one for one in self.tried.get(slot, ()) if one.number != trial.number]
        self.tried[slot] = others if is_surplus(trial) else sorted([*others, trial], key=lambda one: one.number)
        if not self.tried[slot]:
            del self.tried[slot]
        if "slot" not in trial.user_attrs:
            if trial.state == TrialState.FAIL:
                self._unnamed.pop(trial.number, None)
            else:
                self._unnamed[trial.number] = trial
        if trial.state.is_finished():
            self._finish(trial)
        else:
            self.unfinished[trial.number] = trial
        self._look_at(slot)

    def _finish(self, trial: FrozenTrial) -> None:
        self._finished.add(trial.number)
        self.unfinished.pop(trial.number, None)
        if not is_surplus(trial):
            self.counts[trial.state] += 1
            both = [trial] if self.best is None else sorted([self.best, trial], key=lambda one: one.number)
            self.best = best_of(both)

    def _look_at(self, slot: int) -> None:
        """Whether the slot is among the free ones."""
        total, retry_before = self._free_for
        place = bisect.bisect_left(self._free, slot)
        listed = self._free[place : place + 1] == [slot]
        free = slot < total and self.is_free(slot, retry_before)
        if free and not listed:
            self._free.insert(place, slot)
        elif listed and not free:
            del self._free[place]

    def holder(self, slot: int) -> FrozenTrial | None:
        """The trial that the slot belongs to."""
        return next((trial for trial in self.tried.get(slot, ()) if trial.state != TrialState.FAIL), None)

    def holds(self, trial: FrozenTrial) -> bool:
        holder = self.holder(slot_of(trial))
        return holder is not None and holder.number == trial.number

    def waiting(self, total: int) -> list[FrozenTrial]:
        """Trials of the first ``total`` slots that wait, and all that name no slot, in the order of their numbers."""
        found = [
            trial
            for trial in self.unfinished.values()
            if trial.state == TrialState.WAITING and ("slot" not in trial.user_attrs or slot_of(trial) < total)
        ]
        return sorted(found, key=lambda trial: trial.number)

    def running(self) -> list[FrozenTrial]:
        return [trial for trial in self.unfinished.values() if trial.state == TrialState.RUNNING]

    def is_free(self, slot: int, retry_before: int) -> bool:
        """Whether a trial is to be made for the slot: the first, the next attempt of one that died, or another one.

        Args:
            retry_before: numbers of trials that failed in an earlier search; this one tries their slots again.
        """
        tried = self.tried.get(slot)
        if not tried:
            return True
        last = tried[-1]
        return self.holder(slot) is None and (bool(last.user_attrs.get("again")) or last.number < retry_before)

    def free(self, total: int, retry_before: int) -> list[int]:
        """The free ones of the first ``total`` slots, less as many as trials of earlier versions lie behind them."""
        if self._free_for != (total, retry_before):
            self._free_for = (total, retry_before)
            self._free = [slot for slot in range(total) if self.is_free(slot, retry_before)]
        behind = sum(slot_of(trial) >= total for trial in self._unnamed.values())
        return self._free[: max(0, len(self._free) - behind)]

    def template(self, slot: int, point: dict[str, Any]) -> FrozenTrial:
        """The trial to make for a free slot.

        The next attempt of a trial that died has its parameters, those queued and those drawn, and knows its
        evaluations and its runs. Any other has the slot's own ``point``.
        """
        last = self.tried[slot][-1] if slot in self.tried else None
        if last is None or not last.user_attrs.get("again"):
            # A row of nothing would be written for each trial, and read again with it.
            queued = {"fixed_params": point} if point else {}
            return create_trial(state=TrialState.WAITING, system_attrs=queued, user_attrs={"slot": slot})
        return create_trial(
            state=TrialState.WAITING,
            params=last.params,
            distributions=last.distributions,
            intermediate_values=last.intermediate_values,
            system_attrs={"fixed_params": {**point, **last.system_attrs.get("fixed_params", {}), **last.params}},
            user_attrs={
                "slot": slot,
                "attempt": last.user_attrs["attempts"],
                "retry_of": last.user_attrs.get("retry_of", last.number),
                **({"runs": last.user_attrs["runs"]} if "runs" in last.user_attrs else {}),
            },
        )
