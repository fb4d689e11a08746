"""A study in MLflow: one run with Optuna's plots, written by all its controllers, the trainings of its trials below it.

It goes through journals, as a training does: what a server does not take now, it gets later.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from lightning_glue.tracking import provenance
from lightning_glue.tracking.journals import RunIndex
from lightning_glue.tuning.values import value_of
from lightning_glue.utils.files import new_file
from lightning_glue.utils.logs import log
from lightning_glue.utils.redact import first_line, hide_secrets

if TYPE_CHECKING:
    from lightning_glue.tracking.logger import MLflowTracker
    from lightning_glue.tuning.study import SharedStudy

_REFRESH_SECONDS = 60.0  # between two drawings of the plots, at least
_SHARE = 0.05  # of a thread's time for drawing, at most
_INCHES = 2.5  # of width for each parameter's name below a plot
_NAMED = 30  # lines of a plot that a legend names: with more of them it grows taller than the plot
_NAME_LIMIT = 200  # characters of a study's name in the name of a run: MLflow's tables hold 250

STUDY_TAG = "lightning_glue.study"  # of the study's run: the study's id


def run_name(study: str, rest: str) -> str:
    """``rest`` behind the study's name, which is cut where it is too long for MLflow."""
    return f"{study[:_NAME_LIMIT]} {rest}"


class StudyTracking:
    """This controller's part of the study's run.

    Args:
        params: recorded with the run: space, sampler, pruner, ...
        alone: whether no other controller is at work; then the run is this one's to create, if it is not there.
    """

    def __init__(
        self, tracker: MLflowTracker, study: SharedStudy, params: dict[str, Any], metric: str, *, alone: bool
    ) -> None:
        from lightning_glue.training.lightning_internals import speak_as

        speak_as(0)  # whatever SLURM calls this process: a controller is nobody's second
        self.tracker, self.study, self.metric = tracker, study, metric
        self._journals = RunIndex(tracker.folder.parent)
        tags = {
            "optuna.study": study.name,
            "mlflow.source.name": provenance.command_line(),
            "mlflow.source.type": "LOCAL",
            "mlflow.user": provenance.user(),
        }
        tracker.shared = {**as_parent(study.id), "create": alone}
        tracker.start({key: hide_secrets(str(value)) for key, value in params.items()}, tags, None)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="study-figures")
        self._drawing: Future[tuple[dict[str, bytes], float]] | None = None
        self._next = 0.0
        self._logged: int | None = None  # trials that are done, as was said last

    def finished(self, trial: FrozenTrial, runs: list[str]) -> None:
        """Tag the trial's trainings with its state, log the study's progress, draw its plots now and then."""
        # A training that came to its end has said how; another one of its trial may have changed that.
        for run in runs if trial.state == TrialState.FAIL or len(runs) > 1 else ():
            self._tag(run, {"optuna.state": trial.state.name})
        if trial.state != TrialState.FAIL:
            self._log_progress()
        self._keep_drawn()
        if self._drawing is None and time.monotonic() >= self._next:
            self._drawing = self._thread.submit(draw, self.study.study, self.metric)

    def close(self, status: str) -> None:
        """Draw the plots a last time and end this controller's part.

        Args:
            status: of the study's run; RUNNING where other controllers go on.
        """
        self._keep_drawn(wait=True)
        if status == "FINISHED" and self._logged is not None:
            self.study.look()  # others' last trials may have ended within a second of ours
            self._log_progress()
        if status != "RUNNING":
            self._drawing = self._thread.submit(draw, self.study.study, self.metric)
            self._keep_drawn(wait=True)
        self._thread.shutdown()
        self.tracker.finish(status)

    def _tag(self, run: str, tags: dict[str, str]) -> None:
        """Through the run's own journal; where that is on another machine, what the training has said holds."""
        from lightning_glue.tracking.journal import Journal
        from lightning_glue.tracking.watcher import watch

        folder = self._journals.find(run)
        if folder:
            journal = Journal(folder)
            try:
                journal.append({"tags": tags})
            except OSError as error:  # a full disk; it says so itself where it matters
                log.warning("journal %s lacks %s: %s", folder, tags, first_line(error))
            finally:
                journal.close()
            watch(folder)

    def _log_progress(self) -> None:
        slots = self.study.slots  # looked at within a second
        pruned = slots.counts[TrialState.PRUNED]
        done = slots.counts[TrialState.COMPLETE] + pruned
        if done == self._logged:
            return
        self._logged = done
        values: dict[str, float] = {"study/trials": done, "study/pruned": pruned}
        if slots.best:
            values[f"best/{self.metric}"] = value_of(slots.best)
        self.tracker.log_metrics(values, step=done)

    def _keep_drawn(self, *, wait: bool = False) -> None:
        """Log what was drawn, once it is."""
        if self._drawing is None or not (wait or self._drawing.done()):
            return
        try:
            drawn, seconds = self._drawing.result()
            with self.tracker.artifact_folder("figures") as folder:
                for name, data in drawn.items():
                    keep(folder / f"{name}.png", data)
        except Exception as error:  # of a plot; it may not end the study
            seconds = 0.0
            log.warning("no figures of study %s: %s", self.study.name, first_line(error))
        self._next = time.monotonic() + max(_REFRESH_SECONDS, seconds / _SHARE)
        self._drawing = None


def keep(path: Path, data: bytes) -> None:
    with new_file(path, "wb") as file:
        file.write(data)


def draw(study: optuna.Study, metric: str) -> tuple[dict[str, bytes], float]:
    """Optuna's plots as PNG files, by name, those it has enough trials for; and the seconds they took."""
    with drawing_without_a_screen():
        return _draw(study, metric)


@contextmanager
def drawing_without_a_screen() -> Iterator[None]:
    """Within, matplotlib draws into memory; afterwards as before, in a notebook for instance."""
    import matplotlib

    before = matplotlib.get_backend(auto_select=False)
    matplotlib.use("Agg")
    try:
        yield
    finally:
        if before:
            matplotlib.use(before)


def _draw(study: optuna.Study, metric: str) -> tuple[dict[str, bytes], float]:
    from matplotlib import pyplot
    from optuna.visualization import matplotlib as plots

    start = time.monotonic()
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    calls: dict[str, Callable[[], Any]] = {}
    if any(len(trial.intermediate_values) > 1 for trial in study.get_trials(deepcopy=False)):  # else there is no line
        calls["intermediate_values"] = lambda: plots.plot_intermediate_values(study)
    if complete:
        calls["history"] = lambda: plots.plot_optimization_history(study, target_name=metric)
        calls["slice"] = lambda: plots.plot_slice(study, target_name=metric)
        calls["parallel_coordinate"] = lambda: plots.plot_parallel_coordinate(study, target_name=metric)
    if len(complete) > 1 and len({trial.value for trial in complete}) > 1:
        calls["importance"] = lambda: plots.plot_param_importances(study, target_name=metric)
    drawn: dict[str, bytes] = {}
    for name, call in calls.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # experimental; a constant parameter's axis
            axes = call()
        first = axes.flat[0] if hasattr(axes, "flat") else axes
        if (legend := first.get_legend()) and len(legend.get_texts()) > _NAMED:
            legend.remove()
        figure = first.figure
        parts = (
            len({key for trial in complete for key in trial.params}) if name in ("slice", "parallel_coordinate") else 0
        )
        figure.set_size_inches(max(10, _INCHES * parts), 6)
        picture = BytesIO()
        figure.savefig(picture, format="png", bbox_inches="tight")
        pyplot.close(figure)
        drawn[name] = picture.getvalue()
    return drawn, time.monotonic() - start


def as_parent(study: str) -> dict[str, str]:
    """What tells the run of the study with this id."""
    return {"tag": STUDY_TAG, "value": study}
