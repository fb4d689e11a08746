"""Clients of the MLflow tracking store: a server, or a database of this machine.

One place makes MLflow's tables: those of an SQLite file are made beside it and moved there whole, under a lock, for
several processes that make them in one file at once destroy it.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import sqlite3
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_glue.errors import TrackingError, UserError
from lightning_glue.utils import files
from lightning_glue.utils.paths import sqlite_file, sqlite_uri
from lightning_glue.utils.redact import first_line, hide_secrets

if TYPE_CHECKING:
    from mlflow import MlflowClient

_SERVICES = ("databricks", "databricks-uc", "uc")  # addresses without a scheme
_STILL_SECONDS = 10.0  # without a change, a database that is not up to date is not being made by somebody
_NEW_SECONDS = 3.0  # after which nobody fills an empty file that he has made
_TRIES = 6  # while others make the tables of a database server
_BUSY_SECONDS = 5.0  # for a writer to give an SQLite file free


class Unusable(TrackingError):
    """A store that will not work until a person does something."""


def connect(uri: str | None, retries: int = 0) -> MlflowClient:
    """A client that gives up soon: MLflow's own retries last eight minutes.

    Args:
        uri: None: MLFLOW_TRACKING_URI, else MLflow's default.
        retries: of a call over HTTP; a caller that tries again by itself needs none.

    Raises:
        Unusable: no address of a store, or a database that is damaged or of another version of MLflow.
        Exception: the database is busy, or away.
    """
    settings = {
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": str(retries),
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": str(sys.stderr.isatty()).lower(),
    }
    for name, value in settings.items():
        os.environ.setdefault(name, value)
    uri = store_uri(uri)
    if re.match("https?:", uri) or uri in _SERVICES:
        return _client(uri)
    database = sqlite_file(uri)
    if database:
        return _open_sqlite(database, uri)
    return _open_database(uri)


def store_uri(uri: str | None) -> str:
    """The address of a store as it is used: that of an SQLite file absolute.

    Raises:
        Unusable: it is none.
    """
    import mlflow

    address = uri or mlflow.get_tracking_uri()
    if database := sqlite_file(address):
        return f"{sqlite_uri(database)}{''.join(re.findall('[?].*', address))}"
    if re.fullmatch(r"[\w.-]+:\d+(/.*)?", address):
        raise Unusable(f"{address} is no address of a tracking store; did you mean http://{address}?")
    if address.startswith("file:") or not (re.match(r"[A-Za-z][\w+.-]*:", address) or address in _SERVICES):
        raise Unusable(
            f"{hide_secrets(address)} is no address of a tracking store, which is a database or a server; expected "
            "http://HOST:PORT or sqlite:///FILE"
        )
    return address


def get_ready() -> None:
    """Import what a client of the usual store takes, before there is anything to ask of it."""
    import mlflow

    uri = mlflow.get_tracking_uri()
    if uri.startswith("http"):
        return
    import mlflow.store.tracking.sqlalchemy_store
    import sqlalchemy

    sqlalchemy.make_url(uri).get_dialect()  # imports it
    _head()


def open_store(uri: str | None) -> tuple[MlflowClient, str]:
    """A client for reading, and the address it talks to.

    Raises:
        UserError: an SQLite store that does not exist, where MLflow would make an empty one, or no store.
    """
    uri = store_uri(uri)
    database = sqlite_file(uri)
    if database and not database.is_file():
        raise TrackingError(f"no runs: {uri} does not exist; train first, or give --uri or MLFLOW_TRACKING_URI")
    try:
        return connect(uri, retries=2), uri
    except UserError:
        raise
    except Exception as error:  # of MLflow, of SQLAlchemy, of a driver
        raise TrackingError(f"MLflow at {uri} cannot be opened: {first_line(error)}") from None


def is_missing(uri: str | None) -> bool:
    """Whether an address is that of an SQLite file that is not there."""
    database = sqlite_file(uri)
    return database is not None and not database.is_file()


def _client(uri: str) -> MlflowClient:
    import mlflow
    from mlflow.exceptions import MlflowException

    try:
        return mlflow.MlflowClient(tracking_uri=uri)
    except MlflowException as error:
        text = f"{hide_secrets(uri)} is no tracking store: {first_line(error)}"
        raise (UserError if "out-of-date" in str(error) else Unusable)(text) from error


def _open_sqlite(database: Path, uri: str) -> MlflowClient:
    """A client of an SQLite file with its tables, made or brought to their end by whoever comes first."""
    if _revision(database) == _head():
        return _existing(database, uri)
    with _beside(database):
        if not database.exists():
            _make(database)
        elif _revision(database) is None and not _is_new(database):
            _fill(database)  # another program's, or one that is empty
        elif _revision(database) != _head():
            _wait_for_tables(database)
        client = _existing(database, uri)
        client.search_experiments(max_results=1)  # MLflow's first experiment is made now, and once
        return client


def _existing(database: Path, uri: str) -> MlflowClient:
    from lightning_glue.tracking.relocate import relocate

    relocate(database)
    quoted = Path(uri.partition("?")[0].removeprefix("sqlite:///")).parent
    strange = quoted != database.parent and not quoted.exists()
    client = _client(uri)
    if strange:  # MLflow makes the folder of the address as it is quoted, with each of its stores
        client.search_registered_models(max_results=1)
        with suppress(OSError):
            os.removedirs(quoted)
    return client


@contextmanager
def _beside(database: Path) -> Iterator[None]:
    with ExitStack() as stack:
        try:
            stack.enter_context(files.locked(database))
        except UserError:
            raise Unusable(f"{database} cannot be made or upgraded: no rights in {database.parent}") from None
        yield


def _revision(database: Path) -> str | None:
    """The revision of MLflow's tables in an SQLite file; None where there are none.

    Raises:
        Unusable: it is no database.
        sqlite3.OperationalError: it is busy.
    """
    if not database.exists():
        return None
    # Not read-only: whoever comes first takes back what a killed process was at, or nobody can read. "rw" makes no
    # file, and reads one that this user may not write.
    address = f"{database.as_uri()}?mode=rw"
    try:
        with closing(sqlite3.connect(address, uri=True, timeout=_BUSY_SECONDS)) as connection:
            tables = {name for (name,) in connection.execute("select name from sqlite_master where type = 'table'")}
            if "alembic_version" not in tables or not tables & {"runs", "experiments"}:
                return "" if tables & {"runs", "experiments"} else None
            found = connection.execute("select version_num from alembic_version").fetchone()
    except sqlite3.OperationalError:
        raise
    except sqlite3.DatabaseError as error:
        raise Unusable(f"{database} is no database ({error}); move it away, or set tracking.uri") from None
    return found[0] if found else ""


@functools.cache
def _head() -> str:
    """The revision that this version of MLflow works with."""
    from mlflow.store.db.utils import _get_latest_schema_revision

    return _get_latest_schema_revision()


def _is_new(database: Path) -> bool:
    """Whether somebody has just made the empty file, most likely to fill it now: waits for that."""
    while (age := time.time() - database.stat().st_mtime) < _NEW_SECONDS and _revision(database) is None:
        time.sleep(min(0.2, _NEW_SECONDS - max(age, 0)))
    return _revision(database) is not None


def _make(database: Path) -> None:
    """Make a database with MLflow's tables elsewhere, then put it in its place: nobody sees half of it."""
    database.parent.mkdir(parents=True, exist_ok=True)
    part = database.with_name(f".{uuid.uuid4().hex}.part")
    try:
        _fill(part, hurry=True)
        files.sync(part)
        with suppress(FileExistsError):  # a server of MLflow's own was faster
            os.link(part, database)
    except OSError:  # no hard links here
        if not database.exists():
            shutil.move(part, database)
    finally:
        part.unlink(missing_ok=True)


def _fill(database: Path, *, hurry: bool = False) -> None:
    """Make MLflow's tables in an SQLite file.

    Args:
        hurry: nothing is brought to the disk meanwhile: the file is thrown away where this is interrupted.
    """
    import sqlalchemy
    from mlflow.store.db.utils import _initialize_tables
    from mlflow.store.tracking import sqlalchemy_store  # noqa: F401 - it knows the tables

    engine = sqlalchemy.create_engine(sqlite_uri(database))
    if hurry:
        sqlalchemy.event.listen(engine, "connect", lambda one, _: one.execute("pragma synchronous = off"))
    try:
        _initialize_tables(engine)
    finally:
        engine.dispose()


def _wait_for_tables(database: Path) -> None:
    """Wait while a server of MLflow's own, which knows no lock, makes the tables.

    Raises:
        Unusable: nobody does; they are of another version.
    """
    from alembic.script import ScriptDirectory
    from alembic.util import CommandError
    from mlflow.store.db.utils import _get_alembic_config

    before, since = _revision(database), time.monotonic()
    while time.monotonic() - since < _STILL_SECONDS:
        found = _revision(database)
        if found == _head():
            return
        if found != before:
            before, since = found, time.monotonic()
        try:
            ScriptDirectory.from_config(_get_alembic_config("")).get_revision(found or "base")
        except CommandError:
            raise Unusable(
                f"{database} is of a newer MLflow (its tables have revision {found}); install that version, or set "
                "tracking.uri to another database"
            ) from None
        time.sleep(0.2)
    raise Unusable(
        f"{database} is of an older MLflow (its tables have revision {before or 'none'}): copy it, then "
        f"mlflow db upgrade '{sqlite_uri(database)}'"
    )


def _open_database(uri: str) -> MlflowClient:
    """A client of a database server, whose tables others may be about to make, too."""
    import sqlalchemy.exc

    for attempt in range(1, _TRIES + 1):
        try:
            return _client(uri)
        except (ModuleNotFoundError, sqlalchemy.exc.ArgumentError) as error:
            raise Unusable(f"{hide_secrets(uri)} cannot be used: {first_line(error)}") from None
        except (UserError, sqlalchemy.exc.SQLAlchemyError) as error:
            made = re.search("already exists|duplicate|UniqueViolation|out-of-date", str(error), re.IGNORECASE)
            if not made or isinstance(error, Unusable):
                raise
            if attempt == _TRIES:
                raise Unusable(f"{first_line(error)}; copy the database, then mlflow db upgrade") from None
            time.sleep(0.2 * 2**attempt)
    raise AssertionError
