"""A fine-tuned model scored on its dev splits, or its predictions of the test splits, as its run would make them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_glue.config import Config, DataConfig, flatten, unflatten
from lightning_glue.errors import DataError, UserError
from lightning_glue.tasks import Task, described_task, get_task

if TYPE_CHECKING:
    from lightning_glue.data.binarize import Prepared
    from lightning_glue.data.datamodule import GlueDataModule
    from lightning_glue.data.tokenizer import Tokenizer
    from lightning_glue.inference.finetuned import FineTuned


def evaluated_task(requested: str | None, own: Task) -> Task:
    """The task to evaluate on: the model's own, or AX for a model of MNLI."""
    task = get_task(requested) if requested else own
    if task is not own and (own.name, task.name) != ("MNLI", "AX"):
        raise UserError(f"the model was trained on {own.name} and cannot be evaluated on {task.name}: leave --task out")
    return task


def with_files_of(data: str, task: Task) -> Task:
    """The task with the files that a description says; labels, range and metrics stay those of the model.

    Raises:
        UserError: the description cannot be used, or the model is of a built-in task.
    """
    from lightning_glue.config.description import read_description
    from lightning_glue.data.own import other_files

    if not task.own:
        raise UserError(f"a model of {task.name} is not scored on files of your own; leave --data {data} out")
    return described_task(other_files(json.loads(task.description), read_description(data)))


def given_keys(overrides: list[str], data: str | None) -> set[str]:
    """The keys of the configuration that a command line has a value for."""
    keys = {override.partition("=")[0].lstrip("+~") for override in overrides}
    return keys | ({"data.source"} if data or "data" in keys else set())


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


def make_data(
    config: Config, task: Task, fine_tuned: FineTuned, *, scores: bool = True, predicts: bool = True
) -> GlueDataModule:
    """The splits that are to be scored or predicted; no other file is needed."""
    from lightning_glue.data.datamodule import GlueDataModule
    from lightning_glue.model.roberta import token_limit
    from lightning_glue.training.devices import resolve_eval_tokens

    return GlueDataModule(
        task,
        lambda: _prepared(config.data, task, fine_tuned.tokenizer, scores, predicts),
        batch_size=1,
        eval_tokens=resolve_eval_tokens(config),
        max_tokens=token_limit(fine_tuned.model, config.data.max_tokens),
    )


def _prepared(files: DataConfig, task: Task, tokenizer: Tokenizer, scores: bool, predicts: bool) -> Prepared:
    """The dev splits, the test splits, or both; of these the test splits alone where there are no dev files.

    Raises:
        UserError: there is nothing to score, or nothing to predict.
    """
    from lightning_glue.data import reader, sources
    from lightning_glue.data.binarize import prepare

    if not task.splits:
        raise DataError(f"{task.name}: the model names no files; describe some with --data FILE.yaml, see docs/data.md")
    root = sources.glue_directory(task, files.source, files.glue_dir)
    to_score, to_predict = (
        any(reader.has_split(task, split, root) for split in splits) for splits in (task.dev, task.test)
    )
    if predicts and not to_predict:
        raise _nothing_to_predict(task, root / task.directory)
    wanted = task.dev if scores and (to_score or not predicts) else ()
    wanted += task.test if predicts else ()
    return prepare(task, root, tokenizer, sources.cache_dir(), files.on_bad_row, wanted=wanted)


def _nothing_to_predict(task: Task, folder: Path) -> DataError:
    if not task.test:
        return DataError(f"{task.name}: nothing to predict, its description names no test file; give one with --data")
    names = ", ".join(split.file_name for split in task.test)
    return DataError(f"{task.name}: nothing to predict, no {names} in {folder}; nothing was written")


def other_files(data: GlueDataModule, own: dict[str, Any]) -> list[str]:
    """Dev files that are not those the run was scored on."""
    scored = own.get("sha256", {})
    files = data.prepared.splits
    return [info.file for name, info in files.items() if scored.get(name, info.sha256) != info.sha256]


def evaluate(config: Config, fine_tuned: FineTuned, data: GlueDataModule) -> dict[str, float]:
    """Metrics of the dev splits by name; the same on every process and for any number of them."""
    import pytorch_lightning as pl

    from lightning_glue.training.callbacks import dev_metrics
    from lightning_glue.training.devices import resolve_devices, resolve_precision, resolve_strategy
    from lightning_glue.training.distributed import children_end_with_us, cluster_environment
    from lightning_glue.training.messages import quiet
    from lightning_glue.training.module import GlueModule

    quiet()  # Lightning speaks from its import on
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
    module = GlueModule(fine_tuned.model, data.task, config.optimizer, config.lr)
    with children_end_with_us():
        trainer.validate(module, data, verbose=False)
    return dev_metrics(trainer, module)


def predict(config: Config, fine_tuned: FineTuned, data: GlueDataModule, out: Path) -> list[Path]:
    """Write the leaderboard files of the unlabelled splits, on the device and with the precision of the evaluation."""
    from lightning_glue.inference.submission import write_submissions
    from lightning_glue.training.devices import resolve_devices, resolve_precision

    accelerator, task = resolve_devices(config.trainer).accelerator, data.task
    data.setup("predict")
    fine_tuned.model.to(accelerator)  # Lightning takes it back to the CPU
    return write_submissions(
        fine_tuned.model,
        task,
        data.prepared,
        out,
        eval_tokens=data.eval_tokens,
        max_tokens=data.max_tokens,
        precision=resolve_precision(config.trainer, accelerator),
    )


@dataclass(frozen=True)
class Loaded:
    """A model to be evaluated, the configuration for that, and its data.

    Attributes:
        note: what is to be said of the files; empty if nothing is.
    """

    fine_tuned: FineTuned
    config: Config
    data: GlueDataModule
    note: str


def load(
    reference: str,
    config: Config,
    given: set[str],
    task_name: str | None,
    data: str | None = None,
    *,
    scores: bool = True,
    predicts: bool = False,
) -> Loaded:
    """The model behind a run id or a path, with the settings of its run except those that were given.

    Args:
        config: devices, and the settings that were ``given`` (keys).
        task_name: another task than the model's own: AX for a model of MNLI.
        data: description of other files of one's own, see :func:`with_files_of`.
        scores: whether the dev splits are wanted.
        predicts: whether the test splits are wanted.

    Raises:
        UserError: there is no such model, or it cannot be evaluated so.
    """
    from lightning_glue.config.description import is_description
    from lightning_glue.inference.finetuned import load_fine_tuned
    from lightning_glue.model.checkpoint_file import reading
    from lightning_glue.tracking.artifacts import locate
    from lightning_glue.training.allocator import keep_freed_memory
    from lightning_glue.training.devices import check_port, resolve_devices
    from lightning_glue.training.distributed import prepare

    prepare()
    devices = resolve_devices(config.trainer)
    check_port(devices)
    if devices.accelerator == "cpu":
        keep_freed_memory()
    fine_tuned = load_fine_tuned(locate(reference, config.tracking.uri))
    task = evaluated_task(task_name, fine_tuned.task)
    if is_description(data):
        task = with_files_of(str(data), task)
    elif data and task.own:
        raise UserError(
            f"the model was trained on {task.name}, not on {data}; leave --data out, or describe other files"
        )
    with reading(str(fine_tuned.path)):
        config, note = with_own_settings(config, task, fine_tuned.settings, given)
    module = make_data(config, task, fine_tuned, scores=scores, predicts=predicts)
    return Loaded(fine_tuned, config, module, note)
