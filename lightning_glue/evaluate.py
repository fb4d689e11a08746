"""Score a fine-tuned model on its dev splits and predict the test splits: ``python -m lightning_glue.evaluate RUN``."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_glue.atomic import make_folder
from lightning_glue.config import Config, compose, quote
from lightning_glue.console import Parser
from lightning_glue.errors import UserError, run_main
from lightning_glue.imports import quick_imports
from lightning_glue.launch import end_with_launcher, is_distributed_child
from lightning_glue.tasks import Task, get_task

if TYPE_CHECKING:
    from lightning_glue.checkpoint import FineTuned
    from lightning_glue.data import GlueDataModule


def parse_arguments() -> argparse.Namespace:
    parser = Parser(
        prog="python -m lightning_glue.evaluate",
        description="Score a fine-tuned model on its task's dev splits; with --predict also write leaderboard files.",
    )
    parser.add_argument("checkpoint", metavar="RUN_ID|PATH", help="MLflow run id, or a fairseq directory of a run")
    parser.add_argument("--task", metavar="TASK", help="AX for a model of MNLI (default: the model's own task)")
    parser.add_argument("--data", metavar="DATA", default="glue", help="glue (default) or sample")
    parser.add_argument("--gpus", metavar="N", help="GPUs on this machine; 0: CPU (default: one if there is one)")
    parser.add_argument("--procs", metavar="N", help="DDP processes on the CPU")
    parser.add_argument("--predict", metavar="DIR", type=Path, help="write predictions for the unlabelled splits here")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="any key of conf/")
    return parser.parse_intermixed_args()


def evaluated_task(requested: str | None, own: Task) -> Task:
    """The task to evaluate on: the model's own, or another with the same labels (AX for MNLI)."""
    task = get_task(requested) if requested else own
    if (task.labels, task.num_texts) != (own.labels, own.num_texts):
        raise UserError(f"the model was trained on {own.name} and cannot be evaluated on {task.name}: other labels")
    return task


def make_data(config: Config, task: Task, fine_tuned: FineTuned) -> GlueDataModule:
    from lightning_glue import sources
    from lightning_glue.data import GlueDataModule
    from lightning_glue.hardware import resolve_eval_tokens
    from lightning_glue.preprocess import prepare

    data = config.data
    return GlueDataModule(
        task,
        lambda: prepare(
            task,
            sources.glue_directory(task, data.source, data.glue_dir),
            fine_tuned.tokenizer,
            sources.cache_dir(),
            data.on_bad_row,
        ),
        batch_size=1,
        eval_tokens=resolve_eval_tokens(config),
        max_tokens=data.max_tokens,
    )


def evaluate(config: Config, fine_tuned: FineTuned, data: GlueDataModule) -> dict[str, float]:
    """Metrics of the dev splits by name; the same on every process and for any number of them."""
    import pytorch_lightning as pl

    from lightning_glue.distributed import children_end_with_us, cluster_environment
    from lightning_glue.hardware import resolve_devices, resolve_precision, resolve_strategy
    from lightning_glue.module import GlueModule
    from lightning_glue.monitor import dev_metrics

    devices = resolve_devices(config.trainer)
    trainer = pl.Trainer(
        accelerator=devices.accelerator,
        devices=devices.devices,
        num_nodes=devices.nodes,
        strategy=resolve_strategy(devices),
        precision=resolve_precision(config.trainer, devices.accelerator),
        plugins=[cluster_environment()],
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    module = GlueModule(fine_tuned.model, data.task, config.optimizer, config.lr, {})
    with children_end_with_us():
        trainer.validate(module, data, verbose=False)
    return dev_metrics(trainer, module)


def main() -> None:
    end_with_launcher()
    args = parse_arguments()
    flags = {"trainer.gpus": args.gpus, "trainer.procs": args.procs}
    config = compose(
        [f"{key}={quote(value)}" for key, value in flags.items() if value is not None] + args.overrides, data=args.data
    )
    with quick_imports():
        from lightning_glue.checkpoint import load_fine_tuned
        from lightning_glue.distributed import prepare
        from lightning_glue.hardware import check_port, resolve_devices, resolve_eval_tokens
        from lightning_glue.memory import keep_freed_memory
        from lightning_glue.predict import write_submissions
        from lightning_glue.train import quiet

    quiet()
    if args.predict:
        make_folder(args.predict, "--predict")
    prepare()
    devices = resolve_devices(config.trainer)
    check_port(devices)
    if devices.accelerator == "cpu":
        keep_freed_memory()
    fine_tuned = load_fine_tuned(args.checkpoint, config.tracking.uri)
    task = evaluated_task(args.task, fine_tuned.task)
    data = make_data(config, task, fine_tuned)
    if task.dev:
        values = evaluate(config, fine_tuned, data)
        if not is_distributed_child():
            for name, value in sorted(values.items()):
                print(f"{name:<24}{value!r}")
    if args.predict and not is_distributed_child():
        data.setup("predict")
        limits = {"eval_tokens": resolve_eval_tokens(config), "max_tokens": config.data.max_tokens}
        written = write_submissions(fine_tuned.model, task, data.prepared, args.predict, **limits)
        for path in written:
            print(f"wrote {os.fspath(path)}")
        if not written:
            names = ", ".join(split.file_name for split in task.test)
            raise UserError(f"{task.name}: nothing to predict, no {names} beside the dev files; nothing was written")
    elif not task.dev and not args.predict:
        raise UserError(f"{task.name} has no labels to score; add --predict DIR to write its predictions")


if __name__ == "__main__":
    run_main(main)
