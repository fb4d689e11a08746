"""What a model card says of a training, or of a model that was loaded again."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_glue import config as configuration
from lightning_glue.config import Config
from lightning_glue.tasks import Task
from lightning_glue.tracking import provenance
from lightning_glue.tracking.model_card import Facts
from lightning_glue.training import metrics

if TYPE_CHECKING:
    from torch import Tensor

    from lightning_glue.data.datamodule import GlueDataModule
    from lightning_glue.inference.finetuned import FineTuned
    from lightning_glue.training.callbacks import BestEvaluation
    from lightning_glue.training.module import GlueModule

_MOST = 200  # classes of a confusion matrix that is kept


def of_training(
    config: Config, module: GlueModule, data: GlueDataModule, best: BestEvaluation, run_id: str, minutes: float | None
) -> Facts:
    """What is known at the end of a training, without a look into the tracking store.

    Args:
        minutes: wall time times devices; None where nobody counted.
    """
    from lightning_glue.training.describe import in_force

    task = module.task
    resolved = in_force(config)
    evaluations = {name: one for name, one in best.evaluations.items() if name in {split.name for split in task.dev}}
    majority = metrics.majority_value(task, best.evaluations[task.dev[0].name].targets)
    return Facts(
        **of_task(task),
        name=config.run_name,
        source=plain_source(config.model.source),
        start_sha256=module.origin.lineage.get("start_sha256", ""),
        data=task.name if task.own else config.data.source,
        splits={name: {"rows": one.rows, "sha256": one.sha256} for name, one in data.prepared.splits.items()},
        recipe=recipe(configuration.recorded(config)),
        seed=str(config.seed),
        step=best.step,
        scores=dict(best.values),
        majority=majority,
        confusion={
            name: counts
            for name, one in evaluations.items()
            if (counts := confusion(task, one.outputs, one.targets)) is not None
        },
        max_tokens=data.max_tokens,
        epsilon=epsilon(module.model),
        precision=resolved["resolved.precision"],
        devices=resolved["resolved.devices"],
        minutes=minutes,
        run=run_id,
        commit=provenance.git_commit(),
    )


def of_model(fine_tuned: FineTuned, name: str) -> Facts:
    """What a model says of itself, whose export has no card."""
    settings = fine_tuned.settings
    return Facts(
        **of_task(fine_tuned.task),
        name=name,
        data=fine_tuned.task.name if fine_tuned.task.own else str(settings.get("data.source", "")),
        splits={split: {"sha256": digest} for split, digest in settings.get("sha256", {}).items()},
        max_tokens=settings.get("data.max_tokens", 512),
        epsilon=epsilon(fine_tuned.model),
        precision=str(settings.get("trainer.precision", "")),
    )


def of_task(task: Task) -> dict[str, Any]:
    return {
        "task": task.name,
        "problem_type": task.problem_type,
        "labels": list(task.labels),
        "meanings": list(task.meanings),
        "texts": task.num_texts,
        "scale": task.label_scale,
        "offset": getattr(task, "label_offset", 0.0),
    }


def recipe(flat: dict[str, Any]) -> dict[str, Any]:
    """The keys that decide what comes out; of paths of this machine their last part."""
    return {key: _without_folders(value) for key, value in flat.items() if configuration.decides(key)}


def _without_folders(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_folders(part) for key, part in value.items()}
    return plain_source(value) if isinstance(value, str) else value


def plain_source(source: str) -> str:
    return Path(source).name if os.path.isabs(source) else source


def epsilon(model: Any) -> float:
    return float(getattr(model.args, "layer_norm_eps", 1e-5))


def confusion(task: Task, outputs: Tensor, targets: Tensor) -> list[list[int]] | None:
    """Counts (true label, predicted label); None where there are none, or too many classes."""
    if task.problem_type != "single_label_classification" or len(task.labels) > _MOST:
        return None
    predictions = metrics.predicted_labels(outputs).numpy()
    return metrics.confusion_matrix(predictions, targets.numpy(), len(task.labels)).tolist()
