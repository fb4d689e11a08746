"""A model with random weights behind a scorer, and texts for it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from lightning_glue import config
from lightning_glue.export.fairseq import export
from lightning_glue.inference.finetuned import load_fine_tuned
from lightning_glue.inference.scorer import Scorer
from lightning_glue.inference.text_model import Model
from lightning_glue.model import pretrained
from lightning_glue.model.roberta import build_model
from lightning_glue.tasks import TASKS

WORDS = "a an the film story plot dull fine terrible wonderful slowly never ever told".split()  # noqa: SIM905


def make_scorer(name: str, bpe_dir: Path, folder: Path) -> Scorer:
    """Random weights, large enough that labels differ."""
    task = TASKS[name]
    architecture = config.compose(model="tiny").model.architecture
    start = pretrained.load_pretrained("random", "gpt2", str(bpe_dir), architecture)
    model = build_model(start, task.num_outputs, {}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    return Scorer(Model(load_fine_tuned(export(model, task, start.tokenizer, [], 0, folder))))


def texts(count: int, seed: int = 0, longest: int = 40) -> list[str]:
    generator = np.random.default_rng(seed)
    return [" ".join(generator.choice(WORDS, generator.integers(1, longest))) for _ in range(count)]
