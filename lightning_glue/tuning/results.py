"""What a study came to: its best trial, the recipe of that, and what is said at the end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from optuna.trial import FrozenTrial, TrialState

from lightning_glue import config as configuration
from lightning_glue.config import Config
from lightning_glue.tracking.pages import how_to_look
from lightning_glue.tuning.request import DEFAULT_STORAGE
from lightning_glue.tuning.slots import is_surplus
from lightning_glue.tuning.space import with_parameters
from lightning_glue.tuning.values import value_of
from lightning_glue.utils.console import command
from lightning_glue.utils.hints import has_targets, hint, make
from lightning_glue.utils.logs import log
from lightning_glue.utils.redact import hide_secrets

if TYPE_CHECKING:
    from lightning_glue.tracking.logger import MLflowTracker
    from lightning_glue.tuning.controller import Controller
    from lightning_glue.tuning.request import Search
    from lightning_glue.tuning.study import SharedStudy
    from lightning_glue.tuning.study_run import StudyTracking


def best_trial(study: SharedStudy) -> FrozenTrial | None:
    """The complete trial with the highest value, the first of equals; None where none is complete."""
    return study.look().best


def has_collapsed(trial: FrozenTrial, seeds: int) -> bool:
    """Whether most trainings of a trial came to no more than the majority class."""
    return 2 * trial.user_attrs.get("collapsed", 0) > seeds


def trial_config(search: Search, parameters: Mapping[str, Any]) -> Config:
    """The configuration of a trial, with its first seed."""
    return configuration.unflatten(with_parameters(search.config, parameters))


def keep_recipe(search: Search, study: SharedStudy, best: FrozenTrial) -> bool:
    """Write the recipe; where that cannot be, it is a warning, and False."""
    from lightning_glue.tuning.recipe import write_recipe

    done = sum(trial.state.is_finished() for trial in study.trials())
    try:
        write_recipe(
            trial_config(search, best.params), study=study.name, trial=best.number, metric=search.metric,
            value=value_of(best), trials=done,
        )  # fmt: skip
    except OSError as error:
        log.warning("the best recipe cannot be kept: %s: %s", error.filename, error.strerror)
        return False
    return True


def study_status(study: SharedStudy, controller: Controller) -> tuple[str, str]:
    """The status of the study's run, RUNNING where others go on, and what to say of an error."""
    at_work = bool(study.trials(TrialState.RUNNING))  # this controller's own are given back
    if controller.stopped_by or at_work:
        return "RUNNING" if at_work else "KILLED", ""
    if study.trials(TrialState.COMPLETE):
        return "FINISHED", ""
    reason = controller.last_failure or last_failure(study)
    return "FAILED", "no trial completed" + (f"; the last failed: {reason}" if reason else "")


def last_failure(study: SharedStudy) -> str:
    """Why the last trial that failed did so; empty where none has."""
    failed = [trial for trial in study.trials(TrialState.FAIL) if not is_surplus(trial)]
    return failed[-1].user_attrs.get("reason", "") if failed else ""


def report_study(search: Search, study: SharedStudy, tracking: StudyTracking, storage: str) -> None:
    """Say what came out and what to do next."""
    trials = study.trials()
    counts = Counter(trial.state.name.lower() for trial in trials if not is_surplus(trial))
    counts["waiting"] = study.to_do(study.look())
    print(f"\nstudy {study.name}: " + ", ".join(f"{count} {state}" for state, count in sorted(counts.items()) if count))
    best = best_trial(study)
    if best:
        print(f"best trial {best.number}: {search.metric} {value_of(best):.4f}")
        for key, value in best.params.items():
            print(f"  {key:<28}{value:.6g}" if isinstance(value, float) else f"  {key:<28}{value}")
        if has_collapsed(best, search.tune.seeds):
            print("  no better than saying the majority class: try more trials or epochs, or smaller learning rates")
    print(f"run: {hide_secrets(tracking.tracker.describe())}\nnext:")
    # Another study of the task may have written its own recipe meanwhile.
    kept = best is not None and keep_recipe(search, study, best)
    for line, purpose in next_steps(search.config, tracking.tracker, storage, kept).items():
        print(f"  {line}\n      {purpose}")


def next_steps(config: Config, tracker: MLflowTracker, storage: str, kept: bool) -> dict[str, str]:
    """What to type or to open after a search, with what each is for.

    Args:
        kept: whether there is a recipe of the best trial.
    """
    steps = how_to_look(str(tracker.uri), tracker.experiment_id, tracker.run_id)
    if kept:
        recipe = {"EXPERIMENT": f"tuned/{config.task.name}"}
        steps[hint("train", recipe)] = "train with the best parameters"
    shown = hide_secrets(storage)
    if has_targets() and storage == DEFAULT_STORAGE:
        steps[make("dashboard", {})] = "look at the study"
    else:
        steps[command("optuna-dashboard", shown)] = "look at the study"
    return steps
