"""An Optuna study in its storage: what it is, made once and the same for all that share it, its attributes and trials.

Every call waits while the storage is away.
"""

from __future__ import annotations

import time
import uuid
import warnings
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import optuna
from optuna.storages import BaseStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from lightning_glue.errors import UserError
from lightning_glue.tuning.storage import Patience

_ID = "id"  # attribute of a study


class StoredStudy:
    """A study of a storage, made where there is none.

    Args:
        identity: what must be the same for all trials (task, metric, space, ...), compared with the stored study's.
        patience: seconds between two attempts at most, while the storage is away.

    Attributes:
        created: by this call.
        id: tells the study from every other one of its name.

    Raises:
        UserError: the stored study has another identity.
    """

    def __init__(self, name: str, storage: BaseStorage, identity: Mapping[str, Any], patience: float) -> None:
        self.name, self.storage = name, storage
        self._patiently = Patience(name, longest=patience)
        self._data: dict[str, str] | None = None
        self.created = self._create(identity)
        if not self.created:
            self._compare(identity)
        self.id = self._own_id()

    def _create(self, identity: Mapping[str, Any]) -> bool:
        """Create the study; False where it exists. Exactly one of several controllers creates it."""
        try:
            study_id = self.storage.create_new_study([StudyDirection.MAXIMIZE], self.name)
        except optuna.exceptions.DuplicatedStudyError:
            return False
        for key, value in {_ID: uuid.uuid4().hex, **identity}.items():  # who sees all of the identity sees the id
            self.storage.set_study_user_attr(study_id, key, value)
        if "metric" in identity:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # experimental
                study = optuna.load_study(study_name=self.name, storage=self.storage)
                study.set_metric_names([identity["metric"]])  # what optuna-dashboard calls the objective
        return True

    def _own_id(self) -> str:
        """The study's id; one made by an earlier version gets the same one whichever controllers give it."""
        stored = self.attributes()
        if _ID not in stored:
            known = stored.get("mlflow_run", self.study_id)  # random, where there is a run
            self.set_attribute(_ID, uuid.uuid5(uuid.NAMESPACE_OID, f"{known} {self.name}").hex)
            stored = self.attributes()
        return stored[_ID]

    def _compare(self, identity: Mapping[str, Any]) -> None:
        stored = self.wait_for_attributes(identity)
        for key, value in identity.items():
            if stored[key] == value:
                continue
            if isinstance(value, dict):
                parts = sorted(set(value) | set(stored[key]))
                part = next(part for part in parts if value.get(part) != stored[key].get(part))
                found, asked = (str(said.get(part, "not searched"))[:200] for said in (stored[key], value))
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
        return self._patiently(lambda: self.storage.get_study_id_from_name(self.name))

    def trials(self, *states: TrialState) -> list[FrozenTrial]:
        """To look at only: they are the storage's own."""
        return self._patiently(
            lambda: self.storage.get_all_trials(self.study_id, deepcopy=False, states=states or None)
        )

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
        if self._data is None:  # once there, they stay
            self._data = self.attributes().get("data")
        if self._data is None:
            self.set_attribute("data", ours)
        return ours if self._data is None else self._data
