"""What a study looks like on the terminal: a live table, or a line per finished trial where there is no terminal."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

from optuna.trial import FrozenTrial, TrialState
from rich.console import Console
from rich.live import Live
from rich.table import Table

from lightning_glue.tuning.controller import Running
from lightning_glue.tuning.slots import is_surplus
from lightning_glue.tuning.values import best_of, value_of

_SHOWN = (TrialState.COMPLETE, TrialState.RUNNING, TrialState.PRUNED, TrialState.FAIL, TrialState.WAITING)
_WORDS = {"COMPLETE": "done", "RUNNING": "running", "PRUNED": "pruned", "FAIL": "failed", "WAITING": "to do"}


def short(parameters: Mapping[str, Any]) -> str:
    """Parameters on one line, without the group of the key: ``lr 2e-05  batch_size 16``."""
    return "  ".join(f"{key.rpartition('.')[2]} {_number(value)}" for key, value in parameters.items())


def _number(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def seconds_left(trials: list[FrozenTrial], groups: int, to_do: int | None = None) -> float | None:
    """Expected time until no trial is left, from the mean duration of finished ones; None before the first.

    Args:
        to_do: trials that are still to begin; None: those that wait.
    """
    durations = [
        trial.duration.total_seconds()
        for trial in trials
        if trial.state in (TrialState.COMPLETE, TrialState.PRUNED) and trial.duration
    ]
    if not durations:
        return None
    mean = sum(durations) / len(durations)
    begun = [trial.datetime_start for trial in trials if trial.state == TrialState.RUNNING and trial.datetime_start]
    now = time.time()
    partly = sum(max(0.0, mean - (now - start.timestamp())) for start in begun)
    waiting = sum(trial.state == TrialState.WAITING for trial in trials)
    return (partly + (waiting if to_do is None else to_do) * mean) / max(1, groups, len(begun))


class Scoreboard:
    """Shows trials done, running, pruned, failed and to do, the best so far and the time left.

    Args:
        metric: name of the selection metric.
        groups: trials that run at once on this machine.
        shows: False: nothing.
    """

    def __init__(self, metric: str, groups: int, *, shows: bool = True) -> None:
        self.metric, self.groups = metric, groups
        self.console = Console(stderr=True, quiet=not shows)
        live = shows and self.console.is_terminal
        self.live = Live(console=self.console, refresh_per_second=2) if live else None

    def __enter__(self) -> Scoreboard:
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live:
            self.live.stop()

    def update(self, trials: list[FrozenTrial], running: list[Running], to_do: int | None = None) -> None:
        """Args: to_do: trials that are still to begin; None: those that wait."""
        if self.live:
            self.live.update(self._table(trials, running, to_do))

    def finished(self, trial: FrozenTrial) -> None:
        """A line that stays."""
        state = _WORDS[trial.state.name]
        value = f" {trial.value:.4f}" if trial.value is not None else ""
        collapsed = trial.user_attrs.get("collapsed")
        note = f"  ({trial.user_attrs.get('reason', 'no reason known')})" if trial.state == TrialState.FAIL else ""
        note += f"  ({collapsed} collapsed)" if collapsed else ""
        line = f"trial {trial.number} {state}{value}  {short(trial.params)}{note}"
        (self.live.console if self.live else self.console).print(line, highlight=False, soft_wrap=True)

    def _table(self, trials: list[FrozenTrial], running: list[Running], to_do: int | None = None) -> Table:
        counts = Counter(trial.state for trial in trials if not is_surplus(trial))
        counts[TrialState.WAITING] = counts[TrialState.WAITING] if to_do is None else to_do
        left = seconds_left(trials, self.groups, counts[TrialState.WAITING])
        table = Table(
            *(_WORDS[state.name] for state in _SHOWN), "collapsed", f"best {self.metric}", "time left", expand=False
        )
        collapsed = sum(trial.user_attrs.get("collapsed", 0) for trial in trials)
        best = best_of(trials)
        table.add_row(
            *(str(counts[state]) for state in _SHOWN),
            str(collapsed),
            f"{value_of(best):.4f} (trial {best.number})" if best else "-",
            time.strftime("%H:%M:%S", time.gmtime(left)) if left is not None else "-",
        )
        table.caption = "\n".join(describe(one, time.monotonic()) for one in running)
        table.caption_justify = "left"
        return table


def describe(one: Running, now: float) -> str:
    """A trial at work: how long, its last evaluation, its parameters."""
    spent = time.strftime("%H:%M:%S", time.gmtime(max(0.0, now - one.since)))
    last = f"evaluation {one.last[0]}: {one.last[1]:.4f}" if one.last else "no evaluation yet"
    return f"trial {one.number}  {spent}  {last}  {short(one.parameters)}"
