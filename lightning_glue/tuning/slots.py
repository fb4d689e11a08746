"""The places of a study's trials: a study of 50 trials has the slots 0 to 49, and each is to get one trial that counts.

Trials that failed do not count, and nobody can keep two controllers from making a trial for the same slot at the same
moment. So one rule decides, by what is in the storage alone: of the trials in a slot that have not failed, it belongs
to the one with the lowest number, and no other is ever run. This is exact, because a trial is looked up after it was
made, numbers are given in the order in which trials are made, and a trial that has failed stays so: whoever finds a
trial to be the lowest finds that every lower one has failed for good. What is not the lowest is withdrawn, as surplus.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from optuna.trial import FrozenTrial, TrialState, create_trial

SURPLUS = "surplus"  # reason of the failure of a trial that never ran because its slot had one


def slot_of(trial: FrozenTrial) -> int:
    """A trial's slot; studies of earlier versions and trials queued by hand name none."""
    return trial.user_attrs.get("slot", trial.user_attrs.get("retry_of", trial.number))


def is_surplus(trial: FrozenTrial) -> bool:
    return trial.state == TrialState.FAIL and trial.user_attrs.get("reason") == SURPLUS


class Slots:
    """The trials of a study, by slot; surplus ones are left out.

    Args:
        trials: all of them, in the order of their numbers.
    """

    def __init__(self, trials: Iterable[FrozenTrial]) -> None:
        self.tried: dict[int, list[FrozenTrial]] = {}
        for trial in trials:
            if not is_surplus(trial):
                self.tried.setdefault(slot_of(trial), []).append(trial)

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
            for trials in self.tried.values()
            for trial in trials
            if trial.state == TrialState.WAITING and ("slot" not in trial.user_attrs or slot_of(trial) < total)
        ]
        return sorted(found, key=lambda trial: trial.number)

    def running(self) -> bool:
        return any(trial.state == TrialState.RUNNING for trials in self.tried.values() for trial in trials)

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
        found = [slot for slot in range(total) if self.is_free(slot, retry_before)]
        behind = sum(
            slot >= total and "slot" not in trial.user_attrs and trial.state != TrialState.FAIL
            for slot, trials in self.tried.items()
            for trial in trials
        )
        return found[: max(0, len(found) - behind)]

    def template(self, slot: int, point: dict[str, Any]) -> FrozenTrial:
        """The trial to make for a free slot.

        The next attempt of a trial that died has its parameters, those queued and those drawn, and knows its
        evaluations and its runs. Any other has the slot's own ``point``.
        """
        last = self.tried[slot][-1] if slot in self.tried else None
        if last is None or not last.user_attrs.get("again"):
            return create_trial(
                state=TrialState.WAITING, system_attrs={"fixed_params": point}, user_attrs={"slot": slot}
            )
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
