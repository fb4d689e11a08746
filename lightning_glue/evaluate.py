"""Score a fine-tuned model on its dev splits and predict the test splits: ``python -m lightning_glue.evaluate RUN``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from lightning_glue.config import compose, quote
from lightning_glue.config.description import is_description
from lightning_glue.errors import UserError
from lightning_glue.tasks import Task
from lightning_glue.utils.console import Parser, run_main
from lightning_glue.utils.files import make_folder
from lightning_glue.utils.launch import end_with_launcher, is_distributed_child
from lightning_glue.utils.quick_imports import quick_imports


def parse_arguments() -> argparse.Namespace:
    parser = Parser(
        prog="python -m lightning_glue.evaluate",
        description="Score a fine-tuned model on its task's dev splits; with --predict also write leaderboard files.",
    )
    parser.add_argument("checkpoint", metavar="RUN_ID|PATH", help="MLflow run id, models:/name@alias, or a "
                        "directory for fairseq or of Hugging Face, or a *.pt in one")  # fmt: skip
    parser.add_argument("--task", metavar="TASK", help="AX for a model of MNLI (default: the model's own task)")
    parser.add_argument("--data", metavar="DATA", help="glue or sample, or the description of "
                        "files of your own to take instead (default: what the run was trained on)")  # fmt: skip
    parser.add_argument("--gpus", metavar="N", help="GPUs on this machine; 0: CPU (default: one if there is one)")
    parser.add_argument("--procs", metavar="N", help="DDP processes on the CPU")
    parser.add_argument("--predict", metavar="DIR", type=Path, help="write predictions for the unlabelled splits here")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="any key of conf/ (default: the run's own "
                        "data.max_tokens, data.on_bad_row, data.glue_dir and trainer.precision)")  # fmt: skip
    return parser.parse_intermixed_args()


def show(name: str, task: Task, values: dict[str, float]) -> None:
    """On a terminal with the digits that a training prints; a program that reads them gets all."""
    terminal = sys.stdout.isatty()
    if terminal:
        print(f"{name} on {task.name}: {', '.join(split.file_name for split in task.dev)}")
    width = max([23, *map(len, values)]) + 1
    for metric, value in sorted(values.items()):
        print(f"{metric:<{width}}{value:.4f}" if terminal else f"{metric:<{width}}{value!r}")


def main() -> None:
    end_with_launcher()
    args = parse_arguments()
    flags = {"trainer.gpus": args.gpus, "trainer.procs": args.procs}
    given = [f"{key}={quote(value)}" for key, value in flags.items() if value is not None]
    source = None if is_description(args.data) else args.data
    config = compose(given + args.overrides, data=source)
    with quick_imports():
        from lightning_glue.training import evaluation
        from lightning_glue.training.messages import quiet

    quiet()
    leader = not is_distributed_child()
    if args.predict:
        make_folder(args.predict, "--predict")
    given_keys = evaluation.given_keys(args.overrides, source)
    loaded = evaluation.load(args.checkpoint, config, given_keys, args.task, args.data, predicts=bool(args.predict))
    task = loaded.data.task
    if loaded.note and leader:
        print(f"note: {loaded.note}", file=sys.stderr)
    if task.splits and not task.dev and not args.predict:
        raise UserError(f"{task.name} has no labels to score; add --predict DIR to write its predictions")
    loaded.data.prepare_data()
    scored = any(split.name in loaded.data.prepared.splits for split in task.dev)
    if task.dev and not scored and leader:
        print(f"note: nothing is scored, there is no {task.dev[0].file_name} beside the test files", file=sys.stderr)
    if scored:
        values = evaluation.evaluate(loaded.config, loaded.fine_tuned, loaded.data)
        if leader:
            show(args.checkpoint, task, values)
            for file in evaluation.other_files(loaded.data, loaded.fine_tuned.settings):
                print(f"note: {file} is not the file that the run was scored on", file=sys.stderr)
    if args.predict and leader:
        for path in evaluation.predict(loaded.config, loaded.fine_tuned, loaded.data, args.predict):
            print(f"wrote {path}")


if __name__ == "__main__":
    run_main(main)
