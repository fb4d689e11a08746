"""Model and data of a configuration, made before there is a run."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lightning_glue import config as configuration
from lightning_glue.config import Config
from lightning_glue.errors import UserError
from lightning_glue.tasks import Task, get_task
from lightning_glue.utils.quick_imports import quick_imports

if TYPE_CHECKING:
    from lightning_glue.data.binarize import Prepared
    from lightning_glue.data.datamodule import GlueDataModule, TokenizedSplit
    from lightning_glue.model.pretrained import Pretrained
    from lightning_glue.training.module import GlueModule


_TAG = 6000  # characters


@dataclass
class Warm:
    """What a training leaves in its process for the next one: pretrained weights and tokenized splits."""

    origin: tuple[Any, ...] = ()  # of the weights
    pretrained: Pretrained | None = None
    texts: tuple[Any, ...] = ()  # which, cut to which length, for which tokenizer
    prepared: Prepared | None = None
    splits: dict[str, TokenizedSplit] = field(default_factory=dict)


def build(config: Config, warm: Warm | None = None) -> tuple[GlueModule, GlueDataModule, Pretrained]:
    """Model and data of a configuration.

    Args:
        warm: what is kept from one call to the next.
    """
    with quick_imports():
        from lightning_glue.data.binarize import prepare_configured
        from lightning_glue.data.datamodule import GlueDataModule
        from lightning_glue.model.checkpoint_file import model_state, reading, weights_file
        from lightning_glue.model.pretrained import load_pretrained
        from lightning_glue.model.roberta import build_model, load_encoder, token_limit
        from lightning_glue.tracking.artifacts import locate
        from lightning_glue.training.devices import resolve_eval_tokens
        from lightning_glue.training.metrics import check_metrics
        from lightning_glue.training.module import GlueModule, Origin
        from lightning_glue.utils.digests import file_sha256

    task, data = configuration.task_of(config), config.data
    check_metrics(task)
    warm = warm or Warm()
    origin = (config.model.source, config.model.tokenizer, data.bpe_dir, str(config.model.architecture))
    if warm.origin != origin or warm.pretrained is None:
        warm.origin, warm.pretrained = origin, load_pretrained(*origin[:3], config.model.architecture)
    start = warm.pretrained
    dropouts = {name: getattr(config.model, name) for name in ("dropout", "attention_dropout", "pooler_dropout")}
    with reading("model.architecture" if config.model.source == "random" else config.model.source):
        model = build_model(start, task.num_outputs, dropouts)
        max_tokens = token_limit(model, data.max_tokens)
    come_from = Origin(configuration.recorded(config), task.name, lineage(task, start))
    if config.init_from:
        path = weights_file(locate(config.init_from, config.tracking.uri))
        with reading(str(path)):
            load_encoder(model, model_state(path))
        come_from.lineage["start_sha256"] = file_sha256(path)
    replays = config.trainer.cuda_graphs
    module = GlueModule(model, task, config.optimizer, config.lr, come_from, replays=replays)
    datamodule = GlueDataModule(
        task,
        lambda: prepare_configured(task, data, start.tokenizer, predicts=config.trainer.predict),
        batch_size=data.batch_size,
        eval_tokens=resolve_eval_tokens(config),
        max_tokens=max_tokens,
        accumulate=config.trainer.accumulate,
        pool=data.length_pool,
        seed=config.seed,
    )
    texts = (task, data.source, data.glue_dir, data.on_bad_row, max_tokens, config.trainer.predict, origin)
    if warm.texts == texts:
        datamodule.prepared, datamodule.splits = warm.prepared, warm.splits
    else:
        datamodule.setup("fit")
    check_data_fits(config, datamodule)
    warm.texts, warm.prepared, warm.splits = texts, datamodule.prepared, datamodule.splits
    return module, datamodule, start


def check_data_fits(config: Config, data: GlueDataModule) -> None:
    """Raise UserError, before there is a run, where the files lack what the configuration asks of them."""
    from lightning_glue.data import sources
    from lightning_glue.inference.submission import read_indices

    batches = len(data.train_dataloader())
    if config.trainer.val_check_interval > batches:
        raise UserError(
            f"trainer.val_check_interval={config.trainer.val_check_interval:g} batches, but an epoch of "
            f"{config.task.name} has {batches}; lower it, or leave it out to evaluate after every epoch"
        )
    if config.trainer.predict:
        if not any(split.name in data.splits for split in data.task.test):
            names = ", ".join(split.file_name for split in data.task.test) or "a test file in its description"
            raise UserError(f"trainer.predict=true, but {config.task.name} is there without {names}")
        read_indices(data.task, data.prepared)
        if config.task.name == "MNLI":
            sources.glue_directory(get_task("AX"), config.data.source, config.data.glue_dir)


def _of_tag(labels: str) -> str:
    """Labels as MLflow's tags hold them, 8000 characters at most."""
    if len(labels) <= _TAG:
        return labels
    return f"{labels[:100]}... (sha256 {hashlib.sha256(labels.encode()).hexdigest()})"


def lineage(task: Task, start: Pretrained) -> dict[str, str]:
    """What a model comes from, besides its data, configuration and commit, which are on its run anyway."""
    return {
        "labels": _of_tag(json.dumps(task.labels)),
        "tokenizer_sha256": start.tokenizer.digest,
        "start_sha256": start.sha256 or "random weights",
    }
