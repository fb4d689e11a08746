"""The leaderboard's zip of a benchmark, written or checked: ``python -m lightning_glue.submit [BENCHMARK]``."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from lightning_glue.errors import UserError
from lightning_glue.pipeline.benchmark_folder import BenchmarkFolder, find_benchmark
from lightning_glue.utils.console import Parser, run_main
from lightning_glue.utils.quick_imports import quick_imports

_EPILOG = """Exit code 1: a fault was found, or a file is absent and --partial was not given; the zip is written all the
same, with what there is. Rows are compared with those that the benchmark predicted, without a benchmark with the files
of GLUE_DIR, else with the official numbers."""


def parse_arguments() -> argparse.Namespace:
    parser = Parser(
        prog="python -m lightning_glue.submit",
        description="Write a benchmark's predictions as the eleven files that the GLUE leaderboard wants, in a zip, "
        "and check it; or check a zip of anybody's.",
        epilog=_EPILOG,
    )
    parser.add_argument("benchmark", nargs="?", metavar="BENCHMARK", help="name or folder (default: the only one here)")
    parser.add_argument("--from", dest="chosen", metavar="WHO", help="seed:<number>, median or ensemble: whose "
                        "predictions (default: median)")  # fmt: skip
    parser.add_argument("--out", metavar="ZIP", type=Path, help="default: submission.zip in the benchmark's folder")
    parser.add_argument("--check", metavar="ZIP", type=Path, help="write nothing, name each fault of this one")
    parser.add_argument("--partial", action="store_true", help="absent files are no failure")
    args = parser.parse_args()
    if args.check and (args.chosen or args.out):
        parser.error("--check writes nothing: leave out --from and --out")
    return args


def write(benchmark: BenchmarkFolder, chosen: str, out: Path, *, partial: bool) -> bool:
    """Write the zip and say what is in it; whether it is as it should be."""
    with quick_imports():
        from lightning_glue.pipeline.submission import write_submission

    written = write_submission(benchmark.path, chosen, out)
    for name, whose in written.files.items():
        print(f"{name:<12}{whose}")
    for name, why in written.absent.items():
        print(f"{'warning' if partial else 'error'}: {name} is absent: {why}", file=sys.stderr)
    print(f"wrote {out}", file=sys.stderr)
    return check(out, benchmark, partial=True) and (partial or not written.absent)


def check(path: Path, benchmark: BenchmarkFolder | None, *, partial: bool) -> bool:
    """Print each fault of a zip, or that there is none; whether there is none."""
    with quick_imports():
        from lightning_glue.pipeline import submission_check

    if benchmark:
        expected = submission_check.rows_of_benchmark(benchmark)
    else:
        expected = submission_check.rows_of_files(os.environ.get("GLUE_DIR"))
    checked = submission_check.check_submission(path, expected, partial=partial)
    for fault in checked.faults:
        print(fault)
    for note in checked.notes:
        print(f"note: {note}", file=sys.stderr)
    count = len(checked.faults)
    found = f"{count} fault{'s' * (count > 1)}" if count else "no fault"
    print(f"{path}: {found} in {len(checked.rows)} files, {sum(checked.rows.values())} rows", file=sys.stderr)
    return not checked.faults


def main() -> None:
    args = parse_arguments()
    if args.check and not args.check.is_file():
        raise UserError(f"--check {args.check}: no such file")
    benchmark = find_benchmark(args.benchmark) if args.benchmark or not args.check else None
    if args.check:
        right = check(args.check, benchmark, partial=args.partial)
    else:
        assert benchmark
        out = args.out or benchmark.path / "submission.zip"
        right = write(benchmark, args.chosen or "median", out, partial=args.partial)
    sys.exit(0 if right else 1)


if __name__ == "__main__":
    run_main(main)
