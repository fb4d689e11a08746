"""Deliver what is still in journals to the tracking server: ``python -m lightning_glue.sync [RUN ...]``."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from lightning_glue.tracking.journals import JOURNALS
from lightning_glue.utils.console import Parser, run_main


def parse_arguments() -> argparse.Namespace:
    parser = Parser(
        prog="python -m lightning_glue.sync",
        description="Deliver what trainings could not send to their MLflow server; each record arrives once.",
    )
    parser.add_argument("runs", nargs="*", metavar="RUN", help="id of a run or of its journal (default: all)")
    parser.add_argument("--journal", type=Path, default=Path(JOURNALS), metavar="DIR", help="default: %(default)s")
    parser.add_argument("--uri", default=os.environ.get("MLFLOW_TRACKING_URI"), metavar="URI",
                        help="server for runs that have none yet (default: the training's own)")  # fmt: skip
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    from lightning_glue.tracking.sync import sync_all

    complete = sync_all(args.journal, args.runs, args.uri)
    print(f"{sum(complete)} of {len(complete)} journals delivered in full")
    sys.exit(0 if all(complete) else 1)


if __name__ == "__main__":
    run_main(main)
