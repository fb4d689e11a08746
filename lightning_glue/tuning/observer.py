"""What a study's controller tells of its trials, passed on to the terminal, to MLflow and to the best recipe."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from optuna.trial import FrozenTrial

from lightning_glue.tuning.results import best_trial, keep_recipe
from lightning_glue.tuning.values import value_of

if TYPE_CHECKING:
    from lightning_glue.tuning.controller import Running
    from lightning_glue.tuning.request import Search
    from lightning_glue.tuning.scoreboard import Scoreboard
    from lightning_glue.tuning.study import SharedStudy
    from lightning_glue.tuning.study_run import StudyTracking

_LOOK_SECONDS = 0.5  # between two pictures of the study on a terminal


class StudyObserver:
    """The :class:`~lightning_glue.tuning.controller.Observer` of a search."""

    def __init__(self, search: Search, study: SharedStudy, board: Scoreboard, tracking: StudyTracking) -> None:
        self.search, self.study, self.board, self.tracking = search, study, board, tracking
        self.best: FrozenTrial | None = None  # the one in the recipe
        self._looked = 0.0

    def changed(self, running: list[Running]) -> None:
        if self.board.live and time.monotonic() - self._looked > _LOOK_SECONDS:
            to_do = self.study.to_do(self.study.look())
            self.board.update(self.study.trials(), running, to_do)
            self._looked = time.monotonic()

    def finished(self, trial: FrozenTrial, runs: list[str]) -> None:
        self.board.finished(trial)
        self.tracking.finished(trial, runs)
        if trial.value is None or (self.best and trial.value <= value_of(self.best)):
            return
        best = best_trial(self.study)  # another controller may have had a better one
        if best and (self.best is None or best.number != self.best.number):
            self.best = best
            keep_recipe(self.search, self.study, best)
