"""The whole benchmark, from data to the leaderboard's zip: ``python -m lightning_glue.glue --model roberta.base``."""

from __future__ import annotations

import sys

from lightning_glue import config as configuration
from lightning_glue.execution.engines import add_engine_options, count_or_auto
from lightning_glue.pipeline.request import KEEP, SEEDS, Request
from lightning_glue.tasks import TRAINABLE
from lightning_glue.utils.console import Parser, run_main
from lightning_glue.utils.redact import hide_secrets


def parse_arguments() -> Request:
    parser = Parser(
        prog="python -m lightning_glue.glue",
        description="Train every GLUE task with several seeds, predict, combine, report; every training is a tracked "
        "run below one of the benchmark.",
        epilog="Run again, it does what is missing. With --join it works beside others that share its folder.",
    )
    parser.add_argument("--tasks", metavar="TASKS", help="names with blanks between them (default: all of "
                        f"{', '.join(TRAINABLE)})")  # fmt: skip
    parser.add_argument("--seeds", type=int, metavar="N", help=f"1 to N for each task (default: {SEEDS})")
    parser.add_argument("--model", metavar="MODEL", help=configuration.models_in_words())
    parser.add_argument("--data", metavar="DATA", help="glue (default) or sample")
    parser.add_argument("--experiment", metavar="NAME", help="a recipe below experiments/ for every task; {task} in it "
                        "stands for the task: tuned/{task}")  # fmt: skip
    parser.add_argument("--name", metavar="NAME", help="of the benchmark (default: made of model and data)")
    parser.add_argument("--transfer", action="store_true", help="RTE, MRPC and STS-B start from the best model of MNLI "
                        "with their seed")  # fmt: skip
    parser.add_argument("--gpus", type=int, metavar="N", help="GPUs to use, of all nodes together; 0: CPU "
                        "(default: all)")  # fmt: skip
    parser.add_argument(
        "--workers",
        type=count_or_auto,
        metavar="N",
        help="jobs at a time; auto: as many as this "
        "machine does best, which it tries first (default: as many as the GPUs hold; 1 on CPU)",
    )
    parser.add_argument("--jobs-per-gpu", type=int, default=1, metavar="N", help="jobs that share a GPU")
    parser.add_argument("--ddp", type=int, default=1, metavar="N", help="MNLI and QQP over N GPUs, or N slots of the "
                        "CPU, where so many are idle")  # fmt: skip
    parser.add_argument("--procs", type=int, default=1, metavar="N", help="DDP over N CPU processes in each training")
    parser.add_argument("--retries", type=int, default=2, metavar="N", help="times a job whose process died is tried "
                        "again (default: 2)")  # fmt: skip
    parser.add_argument("--keep", default="best", metavar="SEEDS", help=f"whose models stay once the report exists: "
                        f"{', '.join(KEEP)} (default: best)")  # fmt: skip
    add_engine_options(parser, "jobs")
    parser.add_argument("--join", action="store_true", help="work beside drivers that are at it, here or elsewhere")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="any key of conf/, for every training")
    given = vars(parser.parse_intermixed_args())
    tasks = given.pop("tasks")
    return Request(tasks=tasks.replace(",", " ").split() if tasks else None, **given)


def main() -> None:
    request = parse_arguments()
    from lightning_glue.pipeline.benchmark import run

    done = run(request)
    if done.stopped_by:
        print("stopped; the same command goes on", file=sys.stderr)
        sys.exit(128 + done.stopped_by)
    for job, why in done.failed.items():
        print(f"error: {job} failed: {hide_secrets(why)}", file=sys.stderr)
    if done.lost:
        print(f"error: not done because of that: {', '.join(done.lost)}", file=sys.stderr)
    sys.exit(1 if done.failed or done.lost else 0)


if __name__ == "__main__":
    run_main(main, outlives_output=True)
