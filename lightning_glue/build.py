"""Model and data of a configuration, made before there is a run."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from lightning_glue import config as configuration
from lightning_glue.config import Config
from lightning_glue.errors import UserError
from lightning_glue.imports import quick_imports
from lightning_glue.tasks import Task, get_task

if TYPE_CHECKING:
    from lightning_glue.data import GlueDataModule
    from lightning_glue.module import GlueModule
    from lightning_glue.pretrained import Pretrained


def build(config: Config, warm: dict[Any, Any] | None = None) -> tuple[GlueModule, GlueDataModule, Pretrained]:
    """Model and data of a configuration.

    Args:
        warm: keeps pretrained weights and tokenized splits for the next call with the same dictionary.
    """
    with quick_imports():
        from lightning_glue import sources
        from lightning_glue.checkpoint import locate, model_state, reading
        from lightning_glue.data import GlueDataModule
        from lightning_glue.hardware import resolve_eval_tokens
        from lightning_glue.model import build_model, load_encoder, token_limit
        from lightning_glue.module import GlueModule
        from lightning_glue.preprocess import prepare
        from lightning_glue.pretrained import file_sha256, load_pretrained

    task, data = get_task(config.task.name), config.data
    warm = {} if warm is None else warm
    origin = (config.model.source, config.model.tokenizer, data.bpe_dir)
    start = warm.get(origin) or load_pretrained(*origin, config.model.architecture)
    dropouts = {name: getattr(config.model, name) for name in ("dropout", "attention_dropout", "pooler_dropout")}
    with reading("model.architecture" if config.model.source == "random" else config.model.source):
        model = build_model(start, task.num_outputs, dropouts)
        max_tokens = token_limit(model, data.max_tokens)
    record = {"config": configuration.recorded(config), "task": task.name, "lineage": lineage(task, start)}
    if config.init_from:
        path = locate(config.init_from, config.tracking.uri)
        with reading(str(path)):
            load_encoder(model, model_state(path))
        record["lineage"]["start_sha256"] = file_sha256(path)
    module = GlueModule(model, task, config.optimizer, config.lr, record)
    datamodule = GlueDataModule(
        task,
        lambda: prepare(
            task,
            sources.glue_directory(task, data.source, data.glue_dir),
            start.tokenizer,
            sources.cache_dir(),
            data.on_bad_row,
        ),
        batch_size=data.batch_size,
        eval_tokens=resolve_eval_tokens(config),
        max_tokens=max_tokens,
        accumulate=config.trainer.accumulate,
        pool=data.length_pool,
        seed=config.seed,
    )
    texts = (task.name, data.source, data.glue_dir, data.on_bad_row, max_tokens, origin)
    if texts in warm:
        datamodule.prepared, datamodule.splits = warm[texts]
    else:
        datamodule.setup("fit")
    check_data_fits(config, datamodule)
    warm.clear()
    warm |= {origin: start, texts: (datamodule.prepared, datamodule.splits)}
    return module, datamodule, start


def check_data_fits(config: Config, data: GlueDataModule) -> None:
    """Raise UserError, before there is a run, where the files lack what the configuration asks of them."""
    from lightning_glue import sources
    from lightning_glue.predict import read_indices

    batches = len(data.train_dataloader())
    if config.trainer.val_check_interval > batches:
        raise UserError(
            f"trainer.val_check_interval={config.trainer.val_check_interval:g} batches, but an epoch of "
            f"{config.task.name} has {batches}; lower it, or leave it out to evaluate after every epoch"
        )
    if config.trainer.predict:
        if not any(split.name in data.splits for split in data.task.test):
            names = ", ".join(split.file_name for split in data.task.test)
            raise UserError(f"trainer.predict=true, but {config.task.name} is there without {names}")
        read_indices(data.task, data.prepared)
        if config.task.name == "MNLI":
            sources.glue_directory(get_task("AX"), config.data.source, config.data.glue_dir)


def lineage(task: Task, start: Pretrained) -> dict[str, str]:
    """What a model comes from, besides its data, configuration and commit, which are on its run anyway."""
    return {
        "labels": json.dumps(task.labels),
        "tokenizer_sha256": start.tokenizer.digest,
        "start_sha256": start.sha256 or "random weights",
    }
