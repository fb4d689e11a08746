"""Score a fine-tuned model on its dev splits and predict the test splits: ``python -m lightning_glue.evaluate RUN``."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_glue.atomic import make_folder
from lightning_glue.config import Config, compose, flatten, quote, unflatten
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
    parser.add_argument("--data", metavar="DATA", help="glue or sample (default: what the run was trained on)")
    parser.add_argument("--gpus", metavar="N", help="GPUs on this machine; 0: CPU (default: one if there is one)")
    parser.add_argument("--procs", metavar="N", help="DDP processes on the CPU")
    parser.add_argument("--predict", metavar="DIR", type=Path, help="write predictions for the unlabelled splits here")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="any key of conf/ (default: the run's own "
                        "data.max_tokens, data.on_bad_row, data.glue_dir and trainer.precision)")  # fmt: skip
    return parser.parse_intermixed_args()


def evaluated_task(requested: str | None, own: Task) -> Task:
    """The task to evaluate on: the model's own, or AX for a model of MNLI."""
    task = get_task(requested) if requested else own
    if task is not own and (own.name, task.name) != ("MNLI", "AX"):
        raise UserError(f"the model was trained on {own.name} and cannot be evaluated on {task.name}: leave --task out")
    return task


def given_keys(args: argparse.Namespace) -> set[str]:
    """The keys of the configuration that the command line has a value for."""
    keys = {override.partition("=")[0].lstrip("+~") for override in args.overrides}
    return keys | ({"data.source"} if args.data or "data" in keys else set())


def with_own_settings(config: Config, task: Task, own: dict[str, Any], given: set[str]) -> tuple[Config, str]:
    """``config`` with the settings of the model's run, except those that were given, and what is to be said of it.

    Files are looked for in the folder that the run's command line named, then in $GLUE_DIR, then where the run found
    them by $GLUE_DIR, as far as these are on this machine; else in the cache.
    """
    flat = flatten(config)
    flat |= {key: value for key, value in own.items() if key in flat.keys() - given - {"data.glue_dir"}}
    named, inherited = own.get("data.glue_dir"), own.get("GLUE_DIR")
    note = ""
    if flat["data.source"] == "glue" and "data.glue_dir" not in given:
        candidates = [named, config.data.glue_dir, inherited]
        here = (
            folder for folder in candidates if folder and (folder == config.data.glue_dir or has_task(task, folder))
        )
        flat["data.glue_dir"] = next(here, None)
        was = named or inherited
        if was and not has_task(task, was):
            taken = flat["data.glue_dir"] or "the cache or a download"
            note = f"the run read {task.directory} in {was}, which is not there; now from {taken}"
    return unflatten(flat), note


def has_task(task: Task, folder: str) -> bool:
    return (Path(folder) / task.directory).is_dir()


def make_data(config: Config, task: Task, fine_tuned: FineTuned) -> GlueDataModule:
    from lightning_glue import sources
    from lightning_glue.data import GlueDataModule
    from lightning_glue.hardware import resolve_eval_tokens
    from lightning_glue.model import token_limit
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
        max_tokens=token_limit(fine_tuned.model, data.max_tokens),
    )


def other_files(data: GlueDataModule, own: dict[str, Any]) -> list[str]:
    """Dev files that are not those the run was scored on."""
    scored = own.get("sha256", {})
    return [info.file for name, info in data.prepared.splits.items() if scored.get(name, info.sha256) != info.sha256]


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


def predict(config: Config, fine_tuned: FineTuned, data: GlueDataModule, out: Path) -> None:
    """Write the leaderboard files of the unlabelled splits, on the device and with the precision of the evaluation."""
    from lightning_glue.hardware import resolve_devices, resolve_precision
    from lightning_glue.predict import write_submissions

    accelerator, task = resolve_devices(config.trainer).accelerator, data.task
    fine_tuned.model.to(accelerator)  # Lightning takes it back to the CPU
    written = write_submissions(
        fine_tuned.model,
        task,
        data.prepared,
        out,
        eval_tokens=data.eval_tokens,
        max_tokens=data.max_tokens,
        precision=resolve_precision(config.trainer, accelerator),
    )
    for path in written:
        print(f"wrote {os.fspath(path)}")
    if not written:
        names = ", ".join(split.file_name for split in task.test)
        raise UserError(f"{task.name}: nothing to predict, no {names} beside the dev files; nothing was written")


def main() -> None:
    end_with_launcher()
    args = parse_arguments()
    flags = {"trainer.gpus": args.gpus, "trainer.procs": args.procs}
    config = compose(
        [f"{key}={quote(value)}" for key, value in flags.items() if value is not None] + args.overrides, data=args.data
    )
    with quick_imports():
        from lightning_glue.checkpoint import load_fine_tuned, reading
        from lightning_glue.distributed import prepare
        from lightning_glue.hardware import check_port, resolve_devices
        from lightning_glue.memory import keep_freed_memory
        from lightning_glue.messages import quiet

    quiet()
    leader = not is_distributed_child()
    if args.predict:
        make_folder(args.predict, "--predict")
    prepare()
    devices = resolve_devices(config.trainer)
    check_port(devices)
    if devices.accelerator == "cpu":
        keep_freed_memory()
    fine_tuned = load_fine_tuned(args.checkpoint, config.tracking.uri)
    task = evaluated_task(args.task, fine_tuned.task)
    with reading(str(fine_tuned.path)):
        config, note = with_own_settings(config, task, fine_tuned.settings, given_keys(args))
    if note and leader:
        print(f"note: {note}", file=sys.stderr)
    data = make_data(config, task, fine_tuned)
    if task.dev:
        values = evaluate(config, fine_tuned, data)
        if leader:
            for name, value in sorted(values.items()):
                print(f"{name:<24}{value!r}")
            for file in other_files(data, fine_tuned.settings):
                print(f"note: {file} is not the file that the run was scored on", file=sys.stderr)
    if args.predict and leader:
        data.setup("predict")
        predict(config, fine_tuned, data, args.predict)
    elif not task.dev and not args.predict:
        raise UserError(f"{task.name} has no labels to score; add --predict DIR to write its predictions")


if __name__ == "__main__":
    run_main(main)
