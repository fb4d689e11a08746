"""MLflow's server for one person or a team, with users and passwords.

Everything is MLflow's own server; this module checks what it is given before MLflow answers with a traceback, and keeps
passwords out of command lines.
"""

from __future__ import annotations

import argparse
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from types import FrameType

from lightning_glue.errors import TrackingError
from lightning_glue.tracking.known_runs import trouble_with
from lightning_glue.utils import processes
from lightning_glue.utils.addresses import is_loopback
from lightning_glue.utils.redact import first_line, hide_secrets

PASSWORD = "MLFLOW_AUTH_ADMIN_PASSWORD"
LOCAL_DB, ARTIFACTS = "sqlite:///mlflow.db", "mlruns"
_REMOTE = {"s3": "boto3", "gs": "google.cloud.storage", "abfss": "azure.storage.filedatalake"}  # what each scheme needs
# Users of a team go on with each other's experiments; MANAGE, to delete or to grant, stays with the owner.
_AUTH = """[mlflow]
default_permission = EDIT
database_uri = {database}
admin_username = admin
authorization_function = mlflow.server.auth:authenticate_request_basic_auth
auth_cache_ttl_seconds = 60
"""


def with_driver(url: str) -> str:
    """The database URL with the installed driver: SQLAlchemy takes plain ``postgresql://`` for psycopg2."""
    scheme, separator, rest = url.partition("://")
    return f"postgresql+psycopg{separator}{rest}" if scheme in ("postgres", "postgresql") else url


def check_database(url: str) -> None:
    """Raise UserError where the database does not answer; the message shows no password."""
    import sqlalchemy

    shown = hide_secrets(url)
    try:
        with sqlalchemy.create_engine(url).connect():
            return
    except sqlalchemy.exc.ArgumentError:
        raise TrackingError("--db is no database URL; expected postgresql://user:password@host/name") from None
    except ImportError as error:
        raise TrackingError(
            f"--db {shown} needs a package: {first_line(error)}; pip install 'lightning-glue[server]'"
        ) from None
    except sqlalchemy.exc.SQLAlchemyError as error:
        raise TrackingError(f"--db {shown} cannot be reached: {first_line(error)}") from None


def check_address(host: str, port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except (OSError, OverflowError) as error:
            why = getattr(error, "strerror", None) or error
            raise TrackingError(f"{host}:{port} cannot be used ({why}); choose another --port") from None


def check_access(host: str, db: str | None, without_users: bool) -> None:
    """Raise UserError where others than this machine would reach a server that asks nobody for a password."""
    if db or without_users or is_loopback(host):
        return
    raise TrackingError(
        f"--host {host} lets everybody in who can reach this machine, with no password; give --db for a server with "
        "users, or --without-users where that is meant"
    )


def check_artifacts(place: str) -> None:
    import importlib.util

    scheme, separator, _ = place.partition("://")
    package = _REMOTE.get(scheme) if separator else None
    if package and importlib.util.find_spec(package.partition(".")[0]) is None:
        raise TrackingError(
            f"--artifacts {hide_secrets(place)} needs the package {package}; pip install 'lightning-glue[server]'"
        )
    if not separator and (trouble := trouble_with(Path(place))):
        raise TrackingError(f"--artifacts {place} cannot be written: {trouble}; expected a folder, or a place for one")


def allowed_hosts(host: str, names: str) -> str:
    """Host headers the server answers to: this machine's own names and ``names``, each with any port."""
    own = {"localhost", "127.0.0.1", host, socket.gethostname(), socket.getfqdn()}
    known = own | {name.strip() for name in names.split(",")}
    return ",".join(pattern for name in sorted(known - {"", "0.0.0.0"}) for pattern in (name, f"{name}:*"))


def team_environment(url: str, folder: Path) -> dict[str, str]:
    """Environment of a server with users, who are kept in the same database."""
    if not os.environ.get(PASSWORD):
        raise TrackingError(f"--db: set {PASSWORD} to the password of the user admin, 12 characters or more")
    import importlib.util

    if importlib.util.find_spec("flask_wtf") is None:
        raise TrackingError("--db: users need the package Flask-WTF; pip install 'lightning-glue[server]'")
    config = folder / "auth.ini"
    config.touch(mode=0o600)
    config.write_text(_AUTH.format(database=url.replace("%", "%%")))  # configparser reads % as its own
    return {
        "MLFLOW_AUTH_CONFIG_PATH": str(config),
        "MLFLOW_FLASK_SERVER_SECRET_KEY": os.environ.get("MLFLOW_FLASK_SERVER_SECRET_KEY", secrets.token_hex(32)),
    }


def serve(args: argparse.Namespace) -> int:
    """Run the server until it is stopped; its exit status."""
    check_access(args.host, args.db, args.without_users)
    check_address(args.host, args.port)
    check_artifacts(args.artifacts)
    url = with_driver(args.db or LOCAL_DB)
    check_database(url)
    ending = [sys.executable, processes.__file__, str(os.getpid())]  # it ends with this process
    command = [*ending, sys.executable, "-m", "mlflow", "server", "--host", args.host, "--port", str(args.port)]
    command += ["--workers", str(args.workers), "--allowed-hosts", allowed_hosts(args.host, args.allowed_hosts)]
    environment = {
        "PYTHONWARNINGS": "ignore:starlette.middleware.wsgi",  # MLflow's own, nothing that anybody here can change
        **os.environ,
        "MLFLOW_BACKEND_STORE_URI": url,
        "MLFLOW_ARTIFACTS_DESTINATION": args.artifacts,
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # for MLflow's own evaluation jobs; starts in half the time
    }
    with tempfile.TemporaryDirectory(prefix="lightning-glue-") as folder:
        if args.db:
            environment |= team_environment(url, Path(folder))
            command += ["--app-name", "basic-auth"]
        process = subprocess.Popen(command, env=environment, start_new_session=True)
        stopped: list[int] = []

        def stop(number: int, frame: FrameType | None) -> None:
            stopped.append(number)
            process.terminate()

        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, stop)
        print(f"serving {'a team' if args.db else 'this folder'} on http://{args.host}:{args.port}", flush=True)
        print(f"  train elsewhere with MLFLOW_TRACKING_URI=http://{args.host}:{args.port}", flush=True)
        status = process.wait()
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)  # what it started ends with it, however it ended
        return status if stopped or status else 1  # MLflow says 0 when its own server was killed
