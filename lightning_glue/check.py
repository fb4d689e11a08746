"""Look at data before a training: ``python -m lightning_glue.check films.yaml``, or a GLUE task's name.

Exit code: 0, also with warnings; 1 where there is a fault that a training stops at; 2 for a mistake in the command.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from lightning_glue import config as configuration
from lightning_glue.config.description import is_description
from lightning_glue.errors import DataError, UserError
from lightning_glue.tasks import TRAINABLE, get_task
from lightning_glue.utils.console import Parser, run_main


def parse_arguments() -> argparse.Namespace:
    parser = Parser(
        prog="python -m lightning_glue.check",
        description="Read a task's files as a training does, and say what is in them and what looks wrong.",
    )
    parser.add_argument("data", metavar="FILE.yaml|TASK", help=f"description of your own data, or one of "
                        f"{', '.join(TRAINABLE)}")  # fmt: skip
    parser.add_argument("--source", metavar="DATA", help="of a GLUE task: glue (default) or sample")
    parser.add_argument("--model", metavar="MODEL", default="minilm", help="whose tokens are counted (default: "
                        "%(default)s)")  # fmt: skip
    parser.add_argument("--show", type=int, default=5, metavar="N", help="of each kind (default: %(default)s)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="any key of conf/, data.max_tokens=128 for "
                        "example")  # fmt: skip
    return parser.parse_intermixed_args()


def main() -> None:
    args = parse_arguments()
    from lightning_glue.data.own import given_data

    if is_description(args.data):
        try:
            data = given_data(args.data)
        except DataError as error:
            print(f"fault: {error}")
            sys.exit(1)
        config = configuration.compose(args.overrides, model=args.model, data=data)
    else:
        if Path(args.data).suffix:
            raise UserError(
                f"{args.data}: no such file; expected a description's file or a task: {', '.join(TRAINABLE)}"
            )
        get_task(args.data)
        config = configuration.compose(args.overrides, task=args.data, model=args.model, data=args.source)
    from lightning_glue.data import sources
    from lightning_glue.data.check import check, grouped, tables
    from lightning_glue.data.tokenizer import load_tokenizer

    task, model = configuration.task_of(config), config.model
    if args.model in configuration.options("model"):
        encoder = load_tokenizer(model.tokenizer, config.data.bpe_dir)
    else:  # the files of a checkpoint, which brings torch along
        from lightning_glue.model.pretrained import load_pretrained

        encoder = load_pretrained(model.source, model.tokenizer, config.data.bpe_dir, model.architecture).tokenizer
    root = sources.glue_directory(task, config.data.source, config.data.glue_dir)
    report = check(task, root, encoder, config.data.max_tokens)
    for table in tables(task, report):
        show(table)
    for group in grouped(report.findings):
        shown = group[: max(args.show, 0)]
        for finding in shown:
            print(finding)
        if more := report.counts[group[0].severity, group[0].kind] - len(shown):
            print(f"  and {more} more like this")
    counts = {"fault": 0, "warning": 0}
    for (severity, _), count in report.counts.items():
        counts[severity] += count
    print(f"faults: {counts['fault']}, warnings: {counts['warning']}")
    sys.exit(1 if report.faulty else 0)


def show(table: list[list[str]]) -> None:
    """Print columns beside one another, and a blank line."""
    widths = [max(map(len, column)) for column in zip(*table)]
    for first, *others in table:
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:]))]
        print("  ".join(cells).rstrip())
    print()


if __name__ == "__main__":
    run_main(main)
