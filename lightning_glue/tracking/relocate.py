"""A project folder that was moved or copied: MLflow's database remembers where its artifacts were."""

from __future__ import annotations

import sqlite3
from contextlib import closing, suppress
from pathlib import Path

from lightning_glue.utils.logs import log
from lightning_glue.utils.paths import artifact_uri, local_folder

_COLUMNS = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
    ("logged_models", "artifact_location"),
)
_STORE = "mlruns"  # MLflow's default artifact folder, beside its default database


def relocate(database: Path) -> None:
    """Where files of an experiment's runs lie in the folder beside the database, let the database say so.

    The ids of runs are unique: what lies there are these runs' files, moved or copied together with the database.
    """
    with suppress(sqlite3.OperationalError), closing(sqlite3.connect(database, timeout=5)) as connection:
        for old, new in _moved(connection, database.parent / _STORE):
            for table, column in _COLUMNS:
                change = f"update {table} set {column} = ? || substr({column}, ?) where {column} = ? or "
                change += f"substr({column}, 1, ?) = ?"
                values = (artifact_uri(new), len(old) + 1, old, len(old) + 1, f"{old}/")
                with suppress(sqlite3.OperationalError):  # a table that this version of MLflow has not
                    connection.execute(change, values)
            log.info("note: artifacts of %s are in %s now, no longer in %s", database, new, old)
        connection.commit()


def _moved(connection: sqlite3.Connection, store: Path) -> list[tuple[str, Path]]:
    """Addresses of experiments whose files are below ``store``, with the folder there."""
    found = []
    for number, address in connection.execute("select experiment_id, artifact_location from experiments").fetchall():
        old = local_folder(address or "")
        new = store / old.name if old else None
        if not old or not new or old.parent.name != _STORE or not new.is_dir() or old.resolve() == new.resolve():
            continue
        runs = connection.execute("select run_uuid from runs where experiment_id = ?", (number,))
        if any((new / run).is_dir() for (run,) in runs):
            found.append((address, new))
    return found
