"""What a task's training minimizes and its evaluation reports: a loss for each example."""

from __future__ import annotations

import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from lightning_glue.model.roberta import task_loss
from lightning_glue.tasks import Task


def example_losses(task: Task, outputs: torch.Tensor, targets: torch.Tensor, *, weighted: bool) -> torch.Tensor:
    """Losses (examples,) of outputs (examples, classes).

    Cross-entropy, or squared error of a regression: :func:`~lightning_glue.model.roberta.task_loss`. With any number of
    labels an example, the mean over the labels of the binary cross-entropies, as torch's BCEWithLogitsLoss has it.

    Args:
        weighted: by ``Task.class_weights``: an example's loss by the weight of its class; with any number of labels the
            part of each label that is present (torch's ``pos_weight``). They are not normalized within a batch, so how
            a step is divided among devices changes nothing; weights that are ``balanced`` are 1 in the mean.
    """
    weights = None
    if weighted and task.class_weights:
        weights = torch.tensor(task.class_weights, dtype=torch.float32, device=outputs.device)
    if task.multilabel:
        each = binary_cross_entropy_with_logits(outputs.float(), targets.float(), pos_weight=weights, reduction="none")
        return each.mean(-1)
    losses = task_loss(outputs, targets)
    return losses if weights is None else losses * weights[targets]
