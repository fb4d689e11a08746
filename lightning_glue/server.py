"""Serve the runs: ``python -m lightning_glue.server``; with ``--db`` for a team, with users and passwords."""

from __future__ import annotations

import argparse
import os
import signal
import sys

from lightning_glue.errors import UserError
from lightning_glue.tracking.server import ARTIFACTS, LOCAL_DB, PASSWORD, serve
from lightning_glue.utils.console import Parser, run_main


def parse_arguments() -> argparse.Namespace:
    parser = Parser(
        prog="python -m lightning_glue.server",
        description="Serve runs and models over HTTP with MLflow's own server.",
        epilog=f"With --db every request needs a user: admin, with the password in {PASSWORD}, adds the others.",
    )
    parser.add_argument("--db", metavar="URL", default=os.environ.get("MLFLOW_BACKEND_STORE_URI"),
                        help="postgresql://user:password@host/name, better given as MLFLOW_BACKEND_STORE_URI, which "
                        f"nobody else sees (default: {LOCAL_DB})")  # fmt: skip
    parser.add_argument("--artifacts", metavar="PLACE", default=ARTIFACTS, help="folder or s3://bucket/path, which "
                        "clients reach through the server (default: %(default)s)")  # fmt: skip
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=5000, help="default: %(default)s")
    parser.add_argument("--allowed-hosts", metavar="NAMES", default="",
                        help="names under which clients reach the server, separated by commas")  # fmt: skip
    parser.add_argument("--workers", type=int, default=2, help="server processes (default: %(default)s)")
    parser.add_argument("--without-users", action="store_true", help="without --db, let everybody in who reaches "
                        "--host: to read, to change and to delete")  # fmt: skip
    args = parser.parse_args()
    if args.workers < 1:
        raise UserError(f"--workers {args.workers}; expected at least 1")
    return args


def main() -> None:
    status = serve(parse_arguments())
    sys.exit(0 if status == -signal.SIGTERM else status)


if __name__ == "__main__":
    run_main(main)
