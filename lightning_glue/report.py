"""What the tracked runs came to, over their seeds: ``python -m lightning_glue.report [--task RTE] [--out DIR]``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_glue.errors import UserError, suggest
from lightning_glue.tasks import TASKS
from lightning_glue.utils.console import Parser, run_main
from lightning_glue.utils.files import make_folder, new_file
from lightning_glue.utils.quick_imports import quick_imports
from lightning_glue.utils.redact import hide_secrets

if TYPE_CHECKING:
    from lightning_glue.tracking.report_text import Report


def parse_arguments() -> argparse.Namespace:
    parser = Parser(
        prog="python -m lightning_glue.report", description="Compare tracked runs, grouped over their seeds."
    )
    parser.add_argument("--benchmark", metavar="NAME|DIR", help="the runs of one benchmark: its report, which is also "
                        "written into its folder")  # fmt: skip
    parser.add_argument("--errors", metavar="RUN", help="where a run's best model errs: writes errors.html into --out "
                        "(default: the current folder)")  # fmt: skip
    parser.add_argument("--experiment", metavar="NAME", help="MLflow experiment (default: all)")
    parser.add_argument(
        "--task", metavar="TASK", help="one task, of GLUE or the name of data of your own (default: all)"
    )
    parser.add_argument("--trials", action="store_true", help="include the trials of searches")
    parser.add_argument(
        "--uri", metavar="URI", help="tracking store (default: MLFLOW_TRACKING_URI, else mlflow.db here)"
    )
    parser.add_argument("--out", metavar="DIR", type=Path, help="write report.md and report.html here "
                        "(default: of a benchmark its folder, else nowhere)")  # fmt: skip
    args = parser.parse_args()
    if args.benchmark and (args.experiment or args.task or args.trials):
        parser.error("--benchmark has all runs of one benchmark: leave out --experiment, --task and --trials")
    if args.errors and (args.benchmark or args.experiment or args.task or args.trials):
        parser.error("--errors is of one run: leave out --benchmark, --experiment, --task and --trials")
    return args


def write_error_page(run_id: str, uri: str | None, folder: Path) -> Path:
    """Write ``errors.html`` of a run."""
    from lightning_glue.tracking.client import open_store
    from lightning_glue.tracking.error_page import error_page, fetch_analysis
    from lightning_glue.tracking.journals import delivered_run

    client, _ = open_store(uri)
    run_id = delivered_run(run_id)
    page = error_page(fetch_analysis(client, run_id), run_id)
    with new_file(folder / "errors.html") as file:
        file.write(page)
    return folder / "errors.html"


def of_runs(args: argparse.Namespace) -> Report:
    """The report of all runs that are asked for."""
    from lightning_glue.tracking.client import open_store
    from lightning_glue.tracking.comparison import compare
    from lightning_glue.tracking.report_text import Report
    from lightning_glue.tracking.stored_runs import fetch, foreign_note, is_training

    client, uri = open_store(args.uri)
    runs = fetch(client, uri, args.experiment)
    sections = compare(runs, uri, task=args.task, trials=args.trials)
    if not sections:
        known = {*TASKS, *(run.data.params["task.name"] for run in runs if is_training(run))}
        if args.task and args.task not in known:
            raise UserError(f"unknown task {args.task!r}{suggest(args.task, known)}")
        wanted = f" of {args.task}" if args.task else ""
        raise UserError(f"no runs{wanted} at {hide_secrets(uri)}; train first, or give --uri or MLFLOW_TRACKING_URI")
    return Report("Runs", sections, [*filter(None, [foreign_note(runs)])])


def of_benchmark(name: str, uri: str | None) -> tuple[Report, Path]:
    """A benchmark's report, and its folder."""
    from lightning_glue.pipeline.benchmark_folder import find_benchmark

    benchmark = find_benchmark(name)
    with quick_imports():
        from lightning_glue.pipeline.benchmark_report import make_report

    return make_report(benchmark, uri), benchmark.path


def main() -> None:
    args = parse_arguments()
    if args.out:
        make_folder(args.out, "--out")
    if args.errors:
        print(f"wrote {write_error_page(args.errors, args.uri, args.out or Path())}")
        return
    report, folder = of_benchmark(args.benchmark, args.uri) if args.benchmark else (of_runs(args), None)
    from lightning_glue.tracking.report_text import save, show

    show(report)
    if out := args.out or folder:
        for path in save(report, out):
            print(f"wrote {path}", file=sys.stderr)


if __name__ == "__main__":
    run_main(main)
