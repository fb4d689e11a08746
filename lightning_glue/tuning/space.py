"""The search space of a study: configuration keys, their distributions, and the trials to begin with."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lightning_glue.config import Config, TuneConfig, flatten, keys
from lightning_glue.errors import UserError, suggest

if TYPE_CHECKING:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
    from optuna.trial import Trial

    Law = CategoricalDistribution | FloatDistribution | IntDistribution

_FOLLOWS = {"task.batch_size": "data.batch_size", "task.max_epochs": "trainer.max_epochs"}  # as conf/ has it
Space = dict[str, "Law"]


def make_space(written: Mapping[str, Any], fixed: set[str]) -> Space:
    """Optuna's distributions of a space as ``conf/tune/`` writes it.

    Args:
        written: key to a list of choices, or to ``low``, ``high`` and optionally ``log`` or ``step``.
        fixed: keys the command line sets; they are not searched.

    Raises:
        UserError: nothing is left to search, or an entry is malformed.
    """
    space = {key: _distribution(key, entry) for key, entry in written.items() if key not in fixed}
    if not space:
        given = f" besides {', '.join(sorted(fixed & set(written)))}" if written else ""
        raise UserError(f"the search space is empty: there is nothing to search{given}; see conf/tune/")
    return space


def _distribution(key: str, entry: Any) -> Law:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if key not in keys():
        raise UserError(f"search space: unknown key {key!r}{suggest(key, keys())}")
    if isinstance(entry, list) and entry:
        return CategoricalDistribution(entry)
    expected = "expected a list of choices, or {low: ..., high: ...} with log: true or step: ..."
    if not isinstance(entry, dict) or not {"low", "high"} <= set(entry) <= {"low", "high", "log", "step"}:
        raise UserError(f"search space: {key} is {entry!r}; {expected}")
    kind = IntDistribution if all(isinstance(entry[end], int) for end in ("low", "high")) else FloatDistribution
    try:
        return kind(**entry)
    except (ValueError, TypeError) as error:
        raise UserError(f"search space: {key} is {entry!r}: {error}") from None


def suggest_parameters(trial: Trial, space: Space) -> dict[str, Any]:
    """The trial's value of every key."""
    from optuna.distributions import CategoricalDistribution, IntDistribution

    values: dict[str, Any] = {}
    for key, law in space.items():
        if isinstance(law, CategoricalDistribution):
            values[key] = trial.suggest_categorical(key, law.choices)
        elif isinstance(law, IntDistribution):
            values[key] = trial.suggest_int(key, law.low, law.high, step=law.step, log=law.log)
        else:
            values[key] = trial.suggest_float(key, law.low, law.high, step=law.step, log=law.log)
    return values


def first_trials(tune: TuneConfig, recipe: Config, space: Space) -> list[dict[str, Any]]:
    """Parameters of the trials to begin with: every point of a grid, else those the configuration names.

    Raises:
        UserError: a range in a grid, or a first trial outside the space.
    """
    from optuna.distributions import CategoricalDistribution
    from optuna.trial import create_trial

    if tune.sampler == "grid":
        choices = []
        for key, law in space.items():
            if not isinstance(law, CategoricalDistribution):
                raise UserError(f"tune.sampler=grid needs a list of choices for {key}; try tune.space=paper")
            choices.append(law.choices)
        return [dict(zip(space, point)) for point in itertools.product(*choices)]
    usual = flatten(recipe)
    trials: list[dict[str, Any]] = []
    for chosen in tune.first_trials:
        parameters = {key: _within(law, chosen.get(key, usual[key])) for key, law in space.items()}
        try:
            create_trial(value=0.0, params=parameters, distributions=dict(space))
        except ValueError as error:
            raise UserError(f"tune.first_trials: {parameters} lies outside the search space: {error}") from None
        if parameters not in trials:
            trials.append(parameters)
    return trials


def _within(law: Law, value: Any) -> Any:
    """The choice or the end of a range that ``value`` is up to rounding, else ``value``: 3 x 1e-5 is not quite 3e-5."""
    from optuna.distributions import CategoricalDistribution

    ends = law.choices if isinstance(law, CategoricalDistribution) else (law.low, law.high)
    near = (end for end in ends if isinstance(end, float) and isinstance(value, float))
    return next((end for end in near if math.isclose(end, value, rel_tol=1e-8)), value)


def with_parameters(config: Config, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The whole configuration of a trial, by dotted keys, for :func:`lightning_glue.config.unflatten`."""
    flat = flatten(config) | {"optimizer.lr": config.optimizer.lr}  # null follows task.lr and model.lr_factor
    for key, follows in _FOLLOWS.items():
        if key in parameters and follows not in parameters and flat[follows] == flat[key]:
            flat[follows] = parameters[key]
    return flat | dict(parameters)


def describe(space: Space) -> dict[str, str]:
    """Each key's distribution in words: for comparison, for a person and for MLflow."""
    return {key: str(distribution) for key, distribution in space.items()}
