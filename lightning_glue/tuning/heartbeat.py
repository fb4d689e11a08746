"""Signs of life of the trials that other controllers run, as seen from here."""

from __future__ import annotations

from dataclasses import dataclass

from optuna.trial import FrozenTrial

from lightning_glue.utils.processes import process_is_gone

STALE_BEATS = 4  # heartbeats missed by a trial whose machine is taken for dead


@dataclass(frozen=True)
class Beat:
    """Last sign of life of a trial."""

    text: str
    seen: float  # time.monotonic()


class Heartbeats:
    """Which of the running trials are dead, told by this machine's own clock.

    Args:
        interval: seconds between two signs of life of a running trial.
    """

    def __init__(self, interval: float) -> None:
        self.interval = interval
        self._beats: dict[int, Beat] = {}  # by trial
        self._looked: tuple[float, int] = (0.0, 0)  # when, and after how many outages of the storage

    def look(self, now: float, outages: int) -> None:
        """Begin a look at the trials. Where there was none for two intervals, or the storage was away meanwhile, the
        others could not be heard: their time begins anew.
        """
        before, self._looked = self._looked, (now, outages)
        if now - before[0] > 2 * self.interval or outages != before[1]:
            self._beats.clear()

    def is_dead(self, trial: FrozenTrial, now: float) -> bool:
        """Whether the trial's process is gone, here, or has not been heard of for ``STALE_BEATS`` intervals."""
        text = trial.user_attrs.get("heartbeat", "")
        known = self._beats.get(trial._trial_id)
        if known is None or known.text != text:
            known = self._beats[trial._trial_id] = Beat(text, now)
        return now - known.seen > STALE_BEATS * self.interval or process_is_gone(text.rpartition(" ")[0])
