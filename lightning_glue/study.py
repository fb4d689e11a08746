"""An Optuna study that several controllers share: its queue of trials, their heartbeats, failures and retries.

A study holds all its trials from the start, most of them WAITING without parameters. Whoever turns one to RUNNING owns
it, which every storage of Optuna does atomically; so no trial is lost or run twice, and the number of trials is exact
however many controllers take part.
"""

from __future__ import annotations

import os
import socket
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import optuna
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler
from optuna.storages import BaseStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, Trial, TrialState

from lightning_glue.config import TuneConfig
from lightning_glue.errors import UserError
from lightning_glue.space import Space

T = TypeVar("T")
PATIENCE_SECONDS = 600.0  # how long a storage may be away in the middle of a study
STALE_BEATS = 4  # heartbeats missed by a trial whose machine is taken for dead
_MAKING_TABLES = 5  # attempts while another process makes a new database's tables
_FILLING_SECONDS = 20.0  # for the maker of a study to queue its trials
_INTERRUPTED = "interrupted"  # reason of a failure that costs no retry


def open_storage(url: str) -> BaseStorage:
    """``sqlite:///...`` and other database URLs, ``grpc://host:port`` (Optuna's proxy), or the path of a journal file.

    Raises:
        UserError: the storage cannot be reached.
    """
    from optuna.storages import get_storage
    from sqlalchemy.exc import IntegrityError

    for attempt in range(_MAKING_TABLES, -1, -1):
        try:
            return get_storage(_connect(url))
        except ImportError as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"storage {url} needs a package: {reason}; pip install 'lightning-glue[cluster]'") from None
        except Exception as error:  # each backend has its own family of errors
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
            making = isinstance(error, IntegrityError) or "already exists" in str(error)
            if not making or not attempt:
                raise UserError(f"storage {url} cannot be reached: {reason}") from None
            time.sleep(1)  # another process is making the tables just now
    raise AssertionError


def _connect(url: str) -> BaseStorage:
    from optuna.storages import GrpcStorageProxy, JournalStorage, RDBStorage
    from optuna.storages.journal import JournalFileBackend

    if url.startswith("grpc://"):
        host, _, port = url.removeprefix("grpc://").partition(":")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            proxy = GrpcStorageProxy(host=host, port=int(port or 13000))
        proxy.get_all_studies()  # connects
        return proxy
    if "://" in url:
        wait = {"connect_args": {"timeout": 60}} if url.startswith("sqlite") else {}
        return RDBStorage(url, engine_kwargs={"pool_pre_ping": True, **wait})
    return JournalStorage(JournalFileBackend(url))


def make_sampler(name: str, seed: int) -> BaseSampler:
    """``grid`` draws nothing: its points are queued."""
    from optuna import samplers

    if name == "tpe":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            return samplers.TPESampler(multivariate=True, constant_liar=True, seed=seed)
    return samplers.GPSampler(seed=seed) if name == "gp" else samplers.RandomSampler(seed=seed)


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


@dataclass(frozen=True)
class Beat:
    """Last sign of life of a trial as seen from here."""

    text: str
    seen: float  # time.monotonic()


class SharedStudy:
    """One controller's view of a study.

    Args:
        identity: what must be the same for all trials (task, metric, space, ...), compared with the stored study's.
        heartbeat: seconds between two signs of life of a running trial.
    """

    def __init__(
        self,
        name: str,
        storage: BaseStorage,
        sampler: BaseSampler,
        pruner: BasePruner,
        identity: Mapping[str, Any],
        *,
        heartbeat: float,
        retries: int,
    ) -> None:
        self.name, self.storage, self.sampler, self.pruner = name, storage, sampler, pruner
        self.heartbeat, self.retries = heartbeat, retries
        self.mine: set[int] = set()  # trial ids running under this controller
        self._beats: dict[int, Beat] = {}
        self._pulse = 0
        self.created = self._create(identity)
        if not self.created:
            self._compare(identity)

    def _create(self, identity: Mapping[str, Any]) -> bool:
        """Create the study; False where it exists. Exactly one of several controllers creates it."""
        try:
            study_id = self.storage.create_new_study([StudyDirection.MAXIMIZE], self.name)
        except optuna.exceptions.DuplicatedStudyError:
            return False
        for key, value in identity.items():
            self.storage.set_study_user_attr(study_id, key, value)
        return True

    def _compare(self, identity: Mapping[str, Any]) -> None:
        stored = self.wait_for_attributes(identity)
        for key, value in identity.items():
            if stored[key] == value:
                continue
            if isinstance(value, dict):
                parts = sorted(set(value) | set(stored[key]))
                part = next(part for part in parts if value.get(part) != stored[key].get(part))
                found, asked = stored[key].get(part, "not searched"), value.get(part, "not searched")
                raise UserError(
                    f"study {self.name!r} was made with another {key}: {part} is {found} there, {asked} here; "
                    "use the same configuration or another --study"
                )
            raise UserError(
                f"study {self.name!r} was made with {key} {stored[key]!r}, this command says {value!r}; "
                "use the same configuration or another --study"
            )

    def wait_for_attributes(self, names: Mapping[str, Any] | set[str], seconds: float = 30) -> dict[str, Any]:
        """The study's attributes once ``names`` are among them: another controller may be writing them just now."""
        deadline = time.monotonic() + seconds
        while True:
            stored = self.attributes()
            if set(names) <= set(stored):
                return stored
            if time.monotonic() > deadline:
                missing = ", ".join(sorted(set(names) - set(stored)))
                raise UserError(
                    f"study {self.name!r} was not made by this program, or is damaged: it lacks {missing}; "
                    "choose another --study"
                )
            time.sleep(0.2)

    @cached_property
    def study_id(self) -> int:
        return self.storage.get_study_id_from_name(self.name)

    @property
    def study(self) -> optuna.Study:
        """A fresh view: Optuna caches other controllers' trials between two calls of its own ask and tell."""
        return optuna.load_study(study_name=self.name, storage=self.storage, sampler=self.sampler, pruner=self.pruner)

    def trials(self, *states: TrialState) -> list[FrozenTrial]:
        return self._patiently(lambda: self.storage.get_all_trials(self.study_id, states=states or None))

    def trial(self, trial_id: int) -> FrozenTrial:
        return self._patiently(lambda: self.storage.get_trial(trial_id))

    def attributes(self) -> dict[str, Any]:
        return self._patiently(lambda: self.storage.get_study_user_attrs(self.study_id))

    def set_attribute(self, name: str, value: Any) -> None:
        self._patiently(lambda: self.storage.set_study_user_attr(self.study_id, name, value))

    def set_trial_attribute(self, trial_id: int, name: str, value: Any) -> bool:
        """False where the trial is finished: another controller has taken this one for dead."""

        def attempt() -> bool:
            try:
                self.storage.set_trial_user_attr(trial_id, name, value)
            except optuna.exceptions.UpdateFinishedTrialError:
                return False
            return True

        return self._patiently(attempt)

    def data_digests(self, ours: dict[str, str]) -> dict[str, str]:
        """Digests of the data the study's values were measured on: those of its first training."""
        stored = self.attributes().get("data")
        if stored is None:
            self.set_attribute("data", ours)
        return ours if stored is None else stored

    def fill_queue(self, total: int, first: list[dict[str, Any]]) -> None:
        """Queue trials until ``total`` are there, not counting failed ones; ``first`` are the parameters to try first.

        The controller that made the study fills it; the others wait for that, and add what is missing where ``total``
        has grown or the first one died before it was through.
        """
        if not self.created:
            deadline = time.monotonic() + _FILLING_SECONDS
            while "filled" not in self.attributes() and time.monotonic() < deadline:
                time.sleep(0.2)
        study = self.study
        if not self.trials():
            for parameters in first[:total]:
                study.enqueue_trial(parameters)
        missing = total - sum(trial.state != TrialState.FAIL for trial in self.trials())
        for _ in range(missing):
            study.enqueue_trial({})
        self.set_attribute("filled", True)

    def claim(self, space: Space) -> Trial | None:
        """Own the next waiting trial, with its parameters drawn; None where none is left."""
        from lightning_glue.space import suggest_parameters

        def attempt() -> int | None:
            for waiting in self.storage.get_all_trials(self.study_id, deepcopy=False, states=(TrialState.WAITING,)):
                try:
                    if self.storage.set_trial_state_values(waiting._trial_id, state=TrialState.RUNNING):
                        return waiting._trial_id
                except optuna.exceptions.UpdateFinishedTrialError:
                    continue
            return None

        trial_id = self._patiently(attempt)
        if trial_id is None:
            return None
        self.mine.add(trial_id)

        def draw() -> Trial | None:
            try:
                trial = Trial(self.study, trial_id)
                suggest_parameters(trial, space)
            except optuna.exceptions.UpdateFinishedTrialError:  # taken for dead meanwhile
                self.mine.discard(trial_id)
                return None
            return trial

        self.beat(trial_id)
        return self._patiently(draw)

    def beat(self, trial_id: int) -> bool:
        """Show that the trial is alive; False where it was given up for dead and belongs to somebody else now."""
        self._pulse += 1
        text = f"{socket.gethostname()} {os.getpid()} {self._pulse}"
        if not self.set_trial_attribute(trial_id, "heartbeat", text):
            self.mine.discard(trial_id)
            return False
        return True

    def report(self, trial_id: int, step: int, value: float) -> bool:
        """Record an evaluation; whether the trial should stop, pruned or given up for dead."""

        def attempt() -> bool:
            try:
                self.storage.set_trial_intermediate_value(trial_id, step, value)
            except optuna.exceptions.UpdateFinishedTrialError:
                return True
            return bool(Trial(self.study, trial_id).should_prune())

        return self._patiently(attempt)

    def finish(self, trial_id: int, state: TrialState, value: float | None = None, **attributes: Any) -> bool:
        """Set the final state; False, and no change, where another controller has finished the trial meanwhile."""

        def attempt() -> bool:
            try:
                for key, entry in attributes.items():
                    self.storage.set_trial_user_attr(trial_id, key, entry)
                self.storage.set_trial_state_values(trial_id, state, None if value is None else [value])
            except optuna.exceptions.UpdateFinishedTrialError:
                return False
            return True

        if state == TrialState.PRUNED:
            reported = self.trial(trial_id).intermediate_values
            value = reported[max(reported)] if reported else None
        self.mine.discard(trial_id)
        return self._patiently(attempt)

    def fail(self, trial_id: int, reason: str, *, again: bool, **attributes: Any) -> bool:
        """Mark a trial FAIL and, if it is to run ``again`` and has retries left, queue its successor.

        The successor has the same parameters and knows the evaluations and the runs of this one.

        Returns:
            Whether a successor was queued.
        """
        trial = self.trial(trial_id)
        attempt = trial.user_attrs.get("attempt", 0) + (reason != _INTERRUPTED)
        successor = optuna.trial.create_trial(
            state=TrialState.WAITING,
            params=trial.params,
            distributions=trial.distributions,
            intermediate_values=trial.intermediate_values,
            system_attrs={"fixed_params": trial.params},
            user_attrs={
                "attempt": attempt,
                "retry_of": trial.user_attrs.get("retry_of", trial.number),
                **{key: trial.user_attrs[key] for key in ("runs",) if key in trial.user_attrs},
            },
        )
        again = self.finish(trial_id, TrialState.FAIL, reason=reason, **attributes) and again
        if again and attempt <= self.retries:
            self._patiently(lambda: self.study.add_trial(successor))
            return True
        return False

    def interrupt(self) -> None:
        """Give back every trial of this controller: they wait again, with what they have reached."""
        for trial_id in list(self.mine):
            self.fail(trial_id, _INTERRUPTED, again=True)

    def reap(self) -> list[FrozenTrial]:
        """Fail and queue again the trials whose controller is dead.

        One on this machine is known dead when its process is gone; one elsewhere when its heartbeat has not changed for
        ``STALE_BEATS`` intervals of this machine's own clock.
        """
        dead = []
        for trial in self.trials(TrialState.RUNNING):
            if trial._trial_id in self.mine:
                continue
            text = trial.user_attrs.get("heartbeat", "")
            known = self._beats.get(trial._trial_id)
            if known is None or known.text != text:
                known = self._beats[trial._trial_id] = Beat(text, time.monotonic())
            silent = time.monotonic() - known.seen > STALE_BEATS * self.heartbeat
            if silent or _process_is_gone(text):
                self.fail(trial._trial_id, "its controller died", again=True)
                dead.append(trial)
        return dead

    def _patiently(self, call: Callable[[], T]) -> T:
        """Call the storage; while it is away, for at most ``PATIENCE_SECONDS``, try again.

        Raises:
            UserError: it stays away.
        """
        start, wait = time.monotonic(), 0.5
        while True:
            try:
                return call()
            except Exception as error:
                if not _is_away(error):
                    raise
                reason = str(error).strip().splitlines()[0][:200]
                if time.monotonic() - start > PATIENCE_SECONDS:
                    raise UserError(f"storage of study {self.name!r} is away: {reason}; run again to go on") from None
                if wait == 0.5:
                    print(f"warning: storage is away, trying again: {reason}", file=sys.stderr, flush=True)
                time.sleep(wait)
                wait = min(2 * wait, 10)


def _is_away(error: Exception) -> bool:
    """Whether an error says that the storage cannot be reached just now."""
    from sqlalchemy.exc import DBAPIError

    if isinstance(error, optuna.exceptions.StorageInternalError | ConnectionError):
        return True
    return isinstance(error, DBAPIError) or type(error).__module__.startswith("grpc")


def _process_is_gone(heartbeat: str) -> bool:
    """Whether a heartbeat names a process of this machine that no longer runs."""
    host, _, rest = heartbeat.partition(" ")
    if host != socket.gethostname():
        return False
    try:
        os.kill(int(rest.split()[0]), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return False
