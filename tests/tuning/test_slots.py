"""The places of a study: what is kept up to date says what a look at everything says, and reads only what changed."""

from __future__ import annotations

from collections import Counter

import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.trial import FrozenTrial, TrialState, create_trial

from lightning_glue.tuning import slots as slots_module
from lightning_glue.tuning.slots import SURPLUS, Slots, is_surplus, slot_of
from lightning_glue.tuning.values import best_of

TOTAL = 6
STATES = [TrialState.WAITING, TrialState.RUNNING, TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL]


def trial(number: int, slot: int | None, state: TrialState, value: float = 0.0, **attributes: object) -> FrozenTrial:
    values = value if state in (TrialState.COMPLETE, TrialState.PRUNED) else None
    made = create_trial(
        state=state, value=values, user_attrs=attributes | ({} if slot is None else {"slot": slot}), params={}
    )
    made.number = number
    return made


@st.composite
def histories(draw: st.DrawFn) -> list[list[FrozenTrial]]:
    """A study's trials as they are found one time after another: they come, go on, and end for good."""
    known: list[FrozenTrial] = []
    looks = []
    for _ in range(draw(st.integers(1, 6))):
        known = [one if one.state.is_finished() else draw(later(one)) for one in known]
        for _ in range(draw(st.integers(0, 3))):
            slot = draw(st.none() | st.integers(0, TOTAL + 1))
            known = [*known, draw(later(trial(len(known), slot, TrialState.WAITING)))]
        looks.append(known)
    return looks


@st.composite
def later(draw: st.DrawFn, before: FrozenTrial) -> FrozenTrial:
    state = draw(st.sampled_from(STATES if before.state == TrialState.WAITING else STATES[1:]))
    attributes = draw(st.sampled_from([{}, {"reason": SURPLUS}, {"again": True}])) if state == TrialState.FAIL else {}
    value = draw(st.sampled_from([0.1, 0.2, 0.3]))
    return trial(before.number, before.user_attrs.get("slot"), state, value, **attributes)


def test_a_trial_without_a_point_of_its_own_has_nothing_of_it_written() -> None:
    assert Slots().template(3, {}).system_attrs == {}
    assert Slots().template(3, {"x": 1.0}).system_attrs == {"fixed_params": {"x": 1.0}}


@given(histories(), st.integers(0, 8))
@settings(max_examples=60, deadline=None)
def test_kept_up_to_date_it_is_what_it_is_made_anew(looks: list[list[FrozenTrial]], retry_before: int) -> None:
    kept = Slots()
    for trials in looks:
        kept.update(trials)
        anew = Slots(trials)
        counted = [one for one in trials if not is_surplus(one)]
        numbers = {slot: [one.number for one in tried] for slot, tried in kept.tried.items()}
        assert numbers == {
            slot: [one.number for one in counted if slot_of(one) == slot] for slot in sorted(map(slot_of, counted))
        }
        for total in (TOTAL, TOTAL, TOTAL - 2):
            assert kept.free(total, retry_before) == anew.free(total, retry_before)
            open_slots = [slot for slot in range(total) if kept.is_free(slot, retry_before)]
            behind = [one for one in counted if "slot" not in one.user_attrs and one.number >= total]
            taken = sum(one.state != TrialState.FAIL for one in behind)
            assert kept.free(total, retry_before) == open_slots[: max(0, len(open_slots) - taken)]
            assert [one.number for one in kept.waiting(total)] == [one.number for one in anew.waiting(total)]
        assert kept.counts == Counter(one.state for one in counted if one.state.is_finished())
        assert (kept.best and kept.best.number) == getattr(best_of(trials), "number", None)
        assert bool(kept.running()) == any(one.state == TrialState.RUNNING for one in trials)


def test_a_trial_that_is_seen_late_is_not_missed() -> None:
    """A database may show trial 1 before trial 0, whose transaction ends later."""
    late, early = trial(0, 0, TrialState.COMPLETE, 0.9), trial(1, 1, TrialState.COMPLETE, 0.5)
    slots = Slots([early])
    assert slots.best is early
    slots.update([late, early])
    assert slots.best is late and slots.counts[TrialState.COMPLETE] == 2 and not slots.free(2, 0)


def test_what_is_finished_is_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[int] = []
    monkeypatch.setattr(slots_module, "slot_of", lambda one: looked.append(one.number) or slot_of(one))
    done = [trial(number, number, TrialState.COMPLETE, 0.5) for number in range(3000)]
    slots = Slots(done)
    for number in range(3000, 3010):
        done.append(trial(number, number, TrialState.COMPLETE, 0.5))
        waiting = [trial(number + 1, number + 1, TrialState.WAITING)]
        looked.clear()
        slots.update([*done, *waiting])
        assert len(slots.waiting(4000)) == 1 and slots.free(4000, 0)[0] == number + 2
        assert len(looked) <= 6
        assert optuna.trial.TrialState.COMPLETE in slots.counts
