"""Search a task's hyperparameters with Optuna: ``python -m lightning_glue.tune --task SST-2``."""

from __future__ import annotations

import os
import sys

from lightning_glue import config as configuration
from lightning_glue.config.description import is_description
from lightning_glue.execution.engines import add_engine_options, count_or_auto
from lightning_glue.tasks import TRAINABLE
from lightning_glue.tuning.request import DEFAULT_STORAGE, Request
from lightning_glue.utils.console import Parser, run_main
from lightning_glue.utils.redact import hide_secrets


def parse_arguments() -> Request:
    parser = Parser(
        prog="python -m lightning_glue.tune",
        description="Search a GLUE task's hyperparameters with Optuna; every trial is a tracked training.",
        epilog="Run again, or on more machines, with the same --study and --storage: the study goes on, is shared.",
    )
    parser.add_argument("--task", metavar="TASK", help=f"one of {', '.join(TRAINABLE)}; without: see --data")
    parser.add_argument("--model", metavar="MODEL", help=configuration.models_in_words())
    parser.add_argument("--data", metavar="DATA", help="glue (default), sample, or FILE.yaml, which describes your own")
    parser.add_argument("--experiment", metavar="NAME", help="a recipe below experiments/ to start from")
    parser.add_argument("--trials", type=int, metavar="N", help="of the whole study (default: conf/tune/<task>.yaml)")
    parser.add_argument("--study", metavar="NAME", help="default: made of task, model, data and space")
    parser.add_argument("--storage", metavar="URL", default=os.environ.get("OPTUNA_STORAGE") or DEFAULT_STORAGE,
                        help="postgresql://..., grpc://host:port, or the path of a journal file (default: what "
                        "OPTUNA_STORAGE says, which no process list shows, "
                        f"else {DEFAULT_STORAGE})")  # fmt: skip
    parser.add_argument("--workers", type=count_or_auto, metavar="N", help="trials at a time, on all nodes together; "
                        "auto: as many as this machine does best, which it tries first (default: as many as the GPUs "
                        "hold; on CPU 1 a node)")  # fmt: skip
    parser.add_argument(
        "--gpus", type=int, metavar="N", help="GPUs to use, of all nodes together; 0: CPU (default: all)"
    )
    parser.add_argument("--gpus-per-trial", type=int, default=1, metavar="N", help="DDP over N GPUs in every trial")
    parser.add_argument("--trials-per-gpu", type=int, default=1, metavar="N", help="trials that share a GPU")
    parser.add_argument("--procs", type=int, default=1, metavar="N", help="DDP over N CPU processes in every trial")
    parser.add_argument("--retries", type=int, metavar="N", help="times a trial whose process died starts again")
    add_engine_options(parser, "trials")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="any key of conf/, tune.seeds=5 for example; "
                        "a key of the search space is then fixed")  # fmt: skip
    from lightning_glue.data.own import given_data

    given = vars(parser.parse_intermixed_args())
    if given["task"] is None and not is_description(given["data"]):
        parser.error("the following arguments are required: --task")
    return Request(**{**given, "data": given_data(given["data"])})


def main() -> None:
    request = parse_arguments()
    from lightning_glue.tuning.search import run

    done = run(request)
    if done.stopped_by:
        print("stopped; the same command goes on", file=sys.stderr)
        sys.exit(128 + done.stopped_by)
    if done.error:
        print(f"error: {hide_secrets(done.error)}", file=sys.stderr)
    sys.exit(1 if done.error else 0)


if __name__ == "__main__":
    run_main(main, outlives_output=True)
