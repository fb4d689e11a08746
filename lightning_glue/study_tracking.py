"""A study in MLflow: one parent run with Optuna's plots, the trainings of its trials nested below."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from lightning_glue import environment
from lightning_glue.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from mlflow import MlflowClient

    from lightning_glue.study import SharedStudy

_REFRESH_SECONDS = 60.0  # between two drawings of the plots
_ATTRIBUTE = "mlflow_run"


class StudyTracking:
    """The parent run. Everything slow happens in a thread of its own; a failing server is a warning.

    Args:
        experiment: name of the MLflow experiment.
        params: recorded with the run: space, sampler, pruner, ...
    """

    def __init__(
        self, uri: str | None, experiment: str, study: SharedStudy, params: dict[str, Any], metric: str
    ) -> None:
        import mlflow
        from mlflow.exceptions import MlflowException

        self.study, self.metric = study, metric
        self.client: MlflowClient = mlflow.MlflowClient(tracking_uri=uri)
        try:
            self.run_id = self._parent(experiment, params)
        except (MlflowException, OSError) as error:
            reason = str(error).splitlines()[0][:300]
            raise UserError(f"MLflow at {uri or mlflow.get_tracking_uri()} cannot be used: {reason}") from None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="study-tracking")
        self._drawing: Future[None] | None = None
        self._drawn = 0.0

    def _parent(self, experiment: str, params: dict[str, Any]) -> str:
        """The study's run; made by whoever comes first, found again by the others and later."""
        from mlflow.entities import Param
        from mlflow.exceptions import MlflowException

        known = self.study.attributes().get(_ATTRIBUTE)
        if not known and not self.study.created:
            time.sleep(2)  # its maker may be about to write it
            known = self.study.attributes().get(_ATTRIBUTE)
        if known:
            try:
                self.client.update_run(known, status="RUNNING")
                return known
            except MlflowException:
                pass  # another tracking store: it gets a run of its own
        found = self.client.get_experiment_by_name(experiment)
        experiment_id = found.experiment_id if found else self.client.create_experiment(experiment)
        tags = {
            "optuna.study": self.study.name,
            "mlflow.source.name": environment.command_line(),
            "mlflow.source.type": "LOCAL",
            "mlflow.user": environment.user(),
        }
        run_id = self.client.create_run(experiment_id, run_name=f"study {self.study.name}", tags=tags).info.run_id
        self.client.log_batch(run_id, params=[Param(key, str(value)[:6000]) for key, value in params.items()])
        self.study.set_attribute(_ATTRIBUTE, run_id)
        return run_id

    def finished(self, trial: FrozenTrial, runs: list[str]) -> None:
        """Tag the trial's trainings with its state, log the study's progress, draw its plots now and then."""
        self._soon(lambda: self._record(trial, runs))
        idle = self._drawing is None or self._drawing.done()
        if idle and time.monotonic() - self._drawn > _REFRESH_SECONDS:
            self._drawn = time.monotonic()
            self._drawing = self._soon(self._draw)

    def close(self, status: str) -> None:
        """Draw the plots a last time and set the parent's status."""
        self._soon(self._draw)
        self._soon(lambda: self.client.set_terminated(self.run_id, status))
        self._thread.shutdown(wait=True)

    def _soon(self, call: Callable[[], None]) -> Future[None]:
        def tolerated() -> None:
            try:
                call()
            except Exception as error:  # of the server or of a plot; neither may end the study
                reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
                warnings.warn(f"MLflow has no record of this of study {self.study.name}: {reason}", stacklevel=1)

        return self._thread.submit(tolerated)

    def _record(self, trial: FrozenTrial, runs: list[str]) -> None:
        for run_id in runs:
            self.client.set_tag(run_id, "optuna.state", trial.state.name)
        if trial.state == TrialState.FAIL:
            return
        trials = self.study.trials()
        done = [one for one in trials if one.state in (TrialState.COMPLETE, TrialState.PRUNED)]
        complete = [one.value for one in done if one.state == TrialState.COMPLETE]
        step = len(done)
        self.client.log_metric(self.run_id, "study/trials", step, step=step)
        self.client.log_metric(self.run_id, "study/pruned", step - len(complete), step=step)
        if complete:
            self.client.log_metric(self.run_id, f"best/{self.metric}", max(complete), step=step)

    def _draw(self) -> None:
        for name, figure in figures(self.study.study, self.metric).items():
            self.client.log_figure(self.run_id, figure, f"figures/{name}.png", save_kwargs={"bbox_inches": "tight"})


def figures(study: optuna.Study, metric: str) -> dict[str, Figure]:
    """Optuna's plots, by name; those it has enough trials for."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from optuna.visualization import matplotlib as plots

    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    draw: dict[str, Callable[[], Any]] = {"intermediate_values": lambda: plots.plot_intermediate_values(study)}
    if complete:
        draw["history"] = lambda: plots.plot_optimization_history(study, target_name=metric)
        draw["slice"] = lambda: plots.plot_slice(study, target_name=metric)
        draw["parallel_coordinate"] = lambda: plots.plot_parallel_coordinate(study, target_name=metric)
    if len(complete) > 1 and len({trial.value for trial in complete}) > 1:
        draw["importance"] = lambda: plots.plot_param_importances(study, target_name=metric)
    drawn: dict[str, Figure] = {}
    for name, call in draw.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # experimental; a constant parameter's axis
            axes = call()
        figure = (axes.flat[0] if hasattr(axes, "flat") else axes).figure
        figure.set_size_inches(10, 6)
        drawn[name] = figure
        pyplot.close(figure)
    return drawn
