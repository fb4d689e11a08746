"""Deliver what is still in journals to the tracking server: ``python -m lightning_glue.sync [RUN ...]``."""

from __future__ import annotations

import argparse
import os
import sys
from contextlib import suppress
from pathlib import Path

from lightning_glue.addresses import hide_secrets
from lightning_glue.console import Parser
from lightning_glue.delivery import Courier, Undelivered
from lightning_glue.errors import UserError, first_line, run_main
from lightning_glue.journal import JOURNALS, Journal, State, find_journal, is_alive, journals, survey
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
    try:
        return _deliver(folder, uri)
    except Exception as error:  # one that cannot be delivered keeps no other waiting
        print(f"journal {folder}: not delivered: {first_line(error)}", file=sys.stderr)
        return False


def _deliver(folder: Path, uri: str | None) -> bool:
    known = State(folder).run_id
    courier = Courier(folder, uri)
    alive = is_alive(folder)
    unsaid = None if alive else _conclude(courier.journal)
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
    if unsaid:
        print(f"{_name(courier)}: the status cannot be written to {folder}: {unsaid.strerror}", file=sys.stderr)
    return not unsaid


def _conclude(journal: Journal) -> OSError | None:
    """Why the status of a training that is gone without a word cannot be written down; None where it is."""
    try:
        conclude(journal)
    except OSError as error:
        return error
    return None


def _name(courier: Courier) -> str:
    state = State(courier.folder)
    return f"run {state.run_id}" if state.run_id else f"journal {courier.folder.name}"


def _is_empty(folder: Path) -> bool:
    with suppress(OSError):
        return not (folder / "records").stat().st_size
    return False


def main() -> None:
    args = parse_arguments()
    folders = [find_journal(args.journal, run) for run in args.runs]
    for run, folder in zip(args.runs, folders):
        if folder is None:
            raise UserError(f"{run}: no such run in {args.journal}; give another folder with --journal")
    complete = [sync(folder, args.uri) for folder in folders or reversed(journals(args.journal)) if folder]
    if not args.runs:
        _, unusable = survey(args.journal)
        complete += [False for folder in unusable if not _is_empty(folder)]
    print(f"{sum(complete)} of {len(complete)} journals delivered in full")
    sys.exit(0 if all(complete) else 1)


if __name__ == "__main__":
    run_main(main)
