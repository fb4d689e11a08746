"""Write the leaderboard files of a fine-tuned model: ``python -m lightning_glue.predict RUN``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from lightning_glue.config import compose, quote
from lightning_glue.config.description import is_description
from lightning_glue.utils.console import Parser, run_main
from lightning_glue.utils.files import make_folder
from lightning_glue.utils.quick_imports import quick_imports


def parse_arguments() -> argparse.Namespace:
    parser = Parser(
        prog="python -m lightning_glue.predict",
        description="Predict the unlabelled splits of a fine-tuned model's task, as the GLUE leaderboard wants them.",
    )
    parser.add_argument("checkpoint", metavar="RUN_ID|PATH", help="MLflow run id, or a fairseq directory of a run")
    parser.add_argument("--task", metavar="TASK", help="AX for a model of MNLI (default: the model's own task)")
    parser.add_argument("--data", metavar="DATA", help="glue or sample, or the description of "
                        "files of your own to take instead (default: what the run was trained on)")  # fmt: skip
    parser.add_argument("--gpus", metavar="N", help="0: CPU; 1: one GPU (default: one if there is one)")
    parser.add_argument("--out", metavar="DIR", type=Path, default=Path("predictions"), help="default: %(default)s")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="any key of conf/ (default: the run's own)")
    return parser.parse_intermixed_args()


def main() -> None:
    args = parse_arguments()
    given = [] if args.gpus is None else [f"trainer.gpus={quote(args.gpus)}"]
    source = None if is_description(args.data) else args.data
    config = compose(given + args.overrides, data=source)
    with quick_imports():
        from lightning_glue.training import evaluation
        from lightning_glue.training.messages import quiet

    quiet()
    make_folder(args.out, "--out")
    given_keys = evaluation.given_keys(args.overrides, source)
    loaded = evaluation.load(args.checkpoint, config, given_keys, args.task, args.data, scores=False, predicts=True)
    if loaded.note:
        print(f"note: {loaded.note}", file=sys.stderr)
    for path in evaluation.predict(loaded.config, loaded.fine_tuned, loaded.data, args.out):
        print(f"wrote {path}")


if __name__ == "__main__":
    run_main(main)
