"""Fine-tune RoBERTa on a GLUE task: ``python -m lightning_glue.train --task RTE``."""

from __future__ import annotations

import argparse
import os
import sys
from functools import partial
from typing import TYPE_CHECKING, Any

from lightning_glue import config as configuration
from lightning_glue.config import Config
from lightning_glue.errors import Diverged
from lightning_glue.tasks import TRAINABLE
from lightning_glue.training.default_model import with_default_model
from lightning_glue.training.messages import quiet, report
from lightning_glue.training.own_config import asked_keys, continued
from lightning_glue.training.preemption import end_at_once
from lightning_glue.training.resuming_caller import ResumingCaller
from lightning_glue.training.run import train
from lightning_glue.utils.console import Parser, run_main
from lightning_glue.utils.launch import end_with_launcher, is_distributed_child

if TYPE_CHECKING:
    from lightning_glue.training.resume import Resume


def parse_arguments() -> argparse.Namespace:
    parser = Parser(
        prog="python -m lightning_glue.train",
        description="Fine-tune fairseq's RoBERTa on a GLUE task, or on data of your own, and track the run in MLflow.",
        epilog="Without --task and --experiment: the demo, generated SST-2 sentences and a small encoder.",
    )
    parser.add_argument("--task", metavar="TASK", help=f"one of {', '.join(TRAINABLE)}")
    parser.add_argument("--model", metavar="MODEL", help=configuration.models_in_words())
    parser.add_argument("--data", metavar="DATA", help="glue: $GLUE_DIR, else cache, else download (default); "
                        "sample: generated sentences; FILE.yaml: your own, which it describes")  # fmt: skip
    parser.add_argument("--experiment", metavar="NAME", help="a recipe below experiments/, such as paper/roberta_base")
    parser.add_argument("--gpus", metavar="N", help="GPUs on this machine; 0: CPU (default: one if there is one)")
    parser.add_argument("--procs", metavar="N", help="DDP processes on the CPU")
    parser.add_argument("--init-from", metavar="PATH|RUN_ID", help="start from this checkpoint's or run's encoder")
    parser.add_argument("--resume", metavar="auto|RUN_ID|PATH", help="continue an interrupted run; auto: the newest of "
                        "this configuration, if any; a run id or a last.ckpt needs no other argument")  # fmt: skip
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="any key of conf/, such as optimizer.lr=3e-5")
    return parser.parse_intermixed_args()


def overrides(args: argparse.Namespace) -> list[str]:
    """All ``key=value`` of the command line, those of flags first."""
    flags = {"trainer.gpus": args.gpus, "trainer.procs": args.procs, "init_from": args.init_from}
    return [f"{key}={configuration.quote(value)}" for key, value in flags.items() if value is not None] + args.overrides


def compose(args: argparse.Namespace) -> Config:
    """The run's configuration from the command line."""
    from lightning_glue.data.own import given_data

    data = given_data(args.data)
    named = args.task or isinstance(data, dict) or any(override.startswith("task=") for override in args.overrides)
    experiment = args.experiment or (None if named else "demo")
    of = partial(configuration.compose, overrides(args), task=args.task, data=data, experiment=experiment)
    return with_default_model(
        lambda model: of(model=model), args.model, experiment, args.overrides, lambda config: config.trainer.gpus
    )


def check_arguments(args: argparse.Namespace, own: dict[str, Any]) -> Config:
    """A resumed run's configuration, ``own``, with what may differ; UserError: a flag contradicts it."""
    named = {name: getattr(args, name) for name in ("task", "model", "data", "experiment")}
    return continued(args.resume, own, compose(args), asked_keys(args.resume, named, overrides(args)))


def run(config: Config, resume: str | Resume | None) -> None:
    """Train, and say what came out."""
    try:
        done = train(config, ResumingCaller(resume), register=config.tracking.register and config.tracking.checkpoints)
    except Diverged as error:
        sys.exit(0 if is_distributed_child() else f"error: {error}")
    if done.best and not is_distributed_child():
        report(config, done.tracker, done.best)


def main() -> None:
    end_with_launcher()
    end_at_once()
    args = parse_arguments()
    config = compose(args)
    if args.resume in (None, "auto"):
        requeued = os.environ.get("SLURM_RESTART_COUNT", "0") != "0"
        return run(config, "auto" if requeued else args.resume)
    from lightning_glue.training.resume import find

    quiet()
    found = find(args.resume, config)
    assert found, "only auto may find nothing"
    run(check_arguments(args, found.record["config"]), found)


if __name__ == "__main__":
    run_main(main, outlives_output=True)
