"""Where studies are kept: any of Optuna's storages, opened, and called again while it is away."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

import optuna
from optuna.storages import BaseStorage

from lightning_glue.errors import UserError
from lightning_glue.utils.logs import log
from lightning_glue.utils.redact import first_line, hide_secrets

if TYPE_CHECKING:
    from optuna.storages import RDBStorage

T = TypeVar("T")
PATIENCE_SECONDS = 600.0  # how long a storage may be away in the middle of a study
_MAKING_TABLES = 5  # attempts while another process makes a new database's tables


def open_storage(url: str) -> BaseStorage:
    """``sqlite:///...`` and other database URLs, ``grpc://host:port`` (Optuna's proxy), or the path of a journal file.

    Raises:
        UserError: the storage cannot be reached.
    """
    from optuna.storages import get_storage
    from sqlalchemy.exc import IntegrityError

    shown = hide_secrets(url)
    for attempt in range(_MAKING_TABLES, -1, -1):
        try:
            return get_storage(_connect(url))
        except ImportError as error:
            reason = first_line(error)
            raise UserError(
                f"storage {shown} needs a package: {reason}; pip install 'lightning-glue[cluster]'"
            ) from None
        except Exception as error:  # each backend has its own family of errors
            making = isinstance(error, IntegrityError) or "already exists" in str(error)
            if not making or not attempt:
                raise UserError(f"storage {shown} cannot be reached: {first_line(error)}") from None
            time.sleep(1)  # another process is making the tables just now
    raise AssertionError


def _connect(url: str) -> BaseStorage:
    from optuna.storages import GrpcStorageProxy, JournalStorage, RDBStorage
    from optuna.storages.journal import JournalFileBackend

    if url.startswith("grpc://"):
        address = urlsplit(url)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            proxy = GrpcStorageProxy(host=address.hostname or "localhost", port=address.port or 13000)
        proxy.get_all_studies()  # connects
        return proxy
    if "://" in url:
        sqlite = url.startswith("sqlite")
        options: dict[str, Any] = {"connect_args": {"timeout": 60}} if sqlite else {"pool_pre_ping": True}
        storage = RDBStorage(url, engine_kwargs=options)
        if sqlite:
            _lock_before_reading(storage)
        return storage
    return JournalStorage(JournalFileBackend(url))


def _lock_before_reading(storage: RDBStorage) -> None:
    """Make what Optuna reads in an SQLite transaction still hold when it writes.

    Other databases lock the row of a trial that is to be claimed; SQLite cannot, and by itself locks the file only at
    the first write: two controllers would both find the trial waiting, and both own it.
    """
    from sqlalchemy import event

    def connect(connection: Any, _: Any) -> None:
        connection.isolation_level = None  # the driver begins no transaction of its own

    event.listen(storage.engine, "connect", connect)
    event.listen(storage.engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN IMMEDIATE"))
    storage.engine.dispose()  # connections of before


class Patience:
    """Calls a study's storage and, while that is away, for at most ``PATIENCE_SECONDS``, again.

    Args:
        longest: seconds between two attempts at most.

    Attributes:
        outages: how often the storage was away and came back.
    """

    def __init__(self, study: str, longest: float) -> None:
        self.study, self.longest = study, longest
        self.outages = 0

    def __call__(self, call: Callable[[], T]) -> T:
        """What ``call`` returns.

        Raises:
            UserError: the storage stays away.
        """
        start, wait, away = time.monotonic(), 0.5, False
        while True:
            try:
                answer = call()
            except Exception as error:
                if not _is_away(error):
                    raise
                reason = first_line(error, 200)
                if time.monotonic() - start > PATIENCE_SECONDS:
                    raise UserError(f"storage of study {self.study!r} is away: {reason}; run again to go on") from None
                if not away:
                    log.warning("storage is away, trying again: %s", reason)
                away = True
                time.sleep(min(wait, self.longest))
                wait *= 2
            else:
                self.outages += away
                return answer


def _is_away(error: Exception) -> bool:
    """Whether an error says that the storage cannot be reached just now."""
    from sqlalchemy.exc import DBAPIError

    if isinstance(error, optuna.exceptions.StorageInternalError | ConnectionError):
        return True
    return isinstance(error, DBAPIError) or type(error).__module__.startswith("grpc")
