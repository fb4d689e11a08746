"""Optuna's samplers and pruners, by the names that ``conf/tune/`` gives them."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
import optuna
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler

from lightning_glue.config import TuneConfig
from lightning_glue.errors import UserError

Sampler = Callable[[int], BaseSampler]  # of the trial with this number


def make_sampler(name: str, seed: int) -> Sampler:
    """A sampler for each trial, seeded by ``seed`` and the trial's number.

    So no two trials draw the same, whichever controllers they run under, and a search that goes on repeats nothing.
    ``grid`` draws nothing: its points are queued.
    """
    from optuna import samplers

    def sampler(number: int) -> BaseSampler:
        own = int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            if name == "tpe":
                return samplers.TPESampler(multivariate=True, constant_liar=True, seed=own)
            return samplers.GPSampler(seed=own) if name == "gp" else samplers.RandomSampler(seed=own)

    return sampler


def make_pruner(tune: TuneConfig) -> BasePruner:
    """A trial reports each evaluation, or with several seeds each seed's value."""
    from optuna import pruners

    name = tune.pruner
    if name == "auto":
        name = "median" if tune.seeds == 1 else "wilcoxon"
    if name == "wilcoxon" and tune.seeds == 1:
        raise UserError("tune.pruner=wilcoxon compares candidates seed by seed; set tune.seeds to 2 or more")
    if name == "median":
        return pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=1)
    if name == "hyperband":
        return pruners.HyperbandPruner(min_resource=1, max_resource="auto")
    if name == "wilcoxon":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            return pruners.WilcoxonPruner(p_threshold=0.1)
    return pruners.NopPruner()
