"""Deliver what is still in journals to the tracking server: ``python -m lightning_glue.sync [RUN ...]``."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from lightning_glue.addresses import hide_secrets
from lightning_glue.console import Parser
from lightning_glue.delivery import Courier, Undelivered
from lightning_glue.errors import UserError, run_main
from lightning_glue.journal import JOURNALS, State, find_journal, is_alive, journals
from lightning_glue.watcher import conclude


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


def sync(folder: Path, uri: str | None) -> bool:
    """Deliver one journal and say so; whether all of it is delivered."""
    known = State(folder).run_id
    courier = Courier(folder, uri)
    alive = is_alive(folder)
    if not alive:
        conclude(courier.journal)
    try:
        sent = courier.deliver(wait=True, again=True)
    except Undelivered as error:
        where = hide_secrets(str(courier.state.uri or uri))
        print(f"{_name(courier)}: {courier.left()} records not delivered to {where}: {error}", file=sys.stderr)
        return False
    state = State(folder)
    for what, why in (state.left_out | state.refused).items():
        print(f"{_name(courier)}: {what} was refused: {why}", file=sys.stderr)
    if state.note:
        print(f"{_name(courier)}: {state.note}", file=sys.stderr)
    if not known:
        print(f"journal {folder.name} is {_name(courier)} now")
    if sent or alive:
        print(f"{_name(courier)}: {sent} records delivered" + ", still in training" * alive)
    return True


def _name(courier: Courier) -> str:
    state = State(courier.folder)
    return f"run {state.run_id}" if state.run_id else f"journal {courier.folder.name}"


def main() -> None:
    args = parse_arguments()
    folders = [find_journal(args.journal, run) for run in args.runs] or list(reversed(journals(args.journal)))
    for run, folder in zip(args.runs, folders):
        if folder is None:
            raise UserError(f"{run}: no such run in {args.journal}; give another folder with --journal")
    complete = [sync(folder, args.uri) for folder in folders if folder]
    print(f"{sum(complete)} of {len(complete)} journals delivered in full")
    sys.exit(0 if all(complete) else 1)


if __name__ == "__main__":
    run_main(main)
