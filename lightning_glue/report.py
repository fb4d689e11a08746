"""What the tracked runs came to, over their seeds: ``python -m lightning_glue.report [--task RTE] [--out DIR]``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from lightning_glue.errors import UserError
from lightning_glue.tasks import get_task
from lightning_glue.tracking.client import open_store
from lightning_glue.tracking.comparison import compare, fetch, markdown, page, show
from lightning_glue.utils.console import Parser, run_main
from lightning_glue.utils.files import make_folder, new_file


def parse_arguments() -> argparse.Namespace:
    parser = Parser(
        prog="python -m lightning_glue.report", description="Compare tracked runs, grouped over their seeds."
    )
    parser.add_argument("--experiment", metavar="NAME", help="MLflow experiment (default: all)")
    parser.add_argument("--task", metavar="TASK", help="one GLUE task (default: all)")
    parser.add_argument("--trials", action="store_true", help="include the trials of searches")
    parser.add_argument(
        "--uri", metavar="URI", help="tracking store (default: MLFLOW_TRACKING_URI, else mlflow.db here)"
    )
    parser.add_argument("--out", metavar="DIR", type=Path, help="write report.md and report.html here")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    if args.task:
        get_task(args.task)
    if args.out:
        make_folder(args.out, "--out")
    client, uri = open_store(args.uri)
    sections = compare(fetch(client, uri, args.experiment), uri, task=args.task, trials=args.trials)
    if not sections:
        wanted = f" of {args.task}" if args.task else ""
        raise UserError(f"no runs{wanted} at {uri}; train first, or give --uri or MLFLOW_TRACKING_URI")
    show(sections)
    if args.out:
        for name, text in {"report.md": markdown(sections), "report.html": page(sections)}.items():
            with new_file(args.out / name) as file:
                file.write(text)
            print(f"wrote {args.out / name}", file=sys.stderr)


if __name__ == "__main__":
    run_main(main)
