"""Write GLUE tasks in fairseq's binary layout: ``python -m lightning_glue.preprocess --task RTE``."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from lightning_glue.errors import UserError, suggest
from lightning_glue.tasks import TASKS, get_task
from lightning_glue.utils.console import Parser, run_main


def parse_arguments() -> argparse.Namespace:
    parser = Parser(
        prog="python -m lightning_glue.preprocess",
        description="Write a GLUE task in fairseq's binary layout, byte for byte as preprocess_GLUE_tasks.sh does.",
    )
    parser.add_argument("--task", required=True, metavar="TASK", help=f"one of {', '.join(TASKS)}, or ALL")
    parser.add_argument("--out", type=Path, help="folder to write (default: TASK-bin); must not exist")
    parser.add_argument("--glue-dir", default=os.environ.get("GLUE_DIR"), help="raw GLUE files (default: $GLUE_DIR, "
                        "else cache, else download)")  # fmt: skip
    parser.add_argument("--data", choices=("glue", "sample"), default="glue", help="where raw files come from")
    parser.add_argument("--tokenizer", choices=("gpt2", "wordpiece"), default="gpt2", help="RoBERTa's BPE or MiniLM's")
    parser.add_argument("--bpe-dir", default=os.environ.get("ROBERTA_BPE_DIR"), help="folder with encoder.json, "
                        "vocab.bpe and dict.txt (default: $ROBERTA_BPE_DIR, else cache, else download)")  # fmt: skip
    parser.add_argument("--on-bad-row", choices=("stop", "skip"), default="stop", help="what a malformed row does")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    if args.task != "ALL" and args.task not in TASKS:
        raise UserError(f"unknown task {args.task!r}{suggest(args.task, [*TASKS, 'ALL'])}")
    if args.task == "ALL" and args.out:
        raise UserError("--out names one folder, but --task ALL writes one for each task; leave --out away")
    from lightning_glue.data import sources
    from lightning_glue.data.binarize import write_layout
    from lightning_glue.data.tokenizer import load_tokenizer

    encoder = load_tokenizer(args.tokenizer, args.bpe_dir)
    for task in TASKS.values() if args.task == "ALL" else [get_task(args.task)]:
        out = args.out or Path(f"{task.name}-bin")
        if out.exists():
            raise UserError(f"{out} exists already; remove it or choose another --out")
        root = sources.glue_directory(task, args.data, args.glue_dir)
        rows = write_layout(task, root, encoder, out, args.on_bad_row)
        counts = ", ".join(f"{name} {len(part)}" for name, part in rows.items())
        lost = sum(part.dropped + part.skipped for part in rows.values())
        print(f"{out}: {counts} rows" + (f" (malformed rows left out: {lost})" if lost else ""))


if __name__ == "__main__":
    run_main(main)
