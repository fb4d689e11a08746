"""What a process reads and computes once, however many trainings it makes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import pytorch_lightning as pl

from lightning_glue import config
from lightning_glue.training.build import Warm, build
from lightning_glue.utils import digests


def test_raw_files_are_hashed_once(cache: Path, bpe_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the first training; neither Lightning's hooks nor a second training on the same texts read them again."""
    asked: Counter[Path] = Counter()
    known_sha256 = digests.known_sha256

    def counting(path: Path) -> str:
        asked[path] += 1
        return known_sha256(path)

    monkeypatch.setattr(digests, "known_sha256", counting)
    given = [f"data.bpe_dir={bpe_dir}", "data.batch_size=4", "trainer.gpus=0"]
    chosen, warm = config.compose(given, task="WNLI", model="tiny", data="sample"), Warm()
    for _ in range(2):
        module, data, _ = build(chosen, warm)
        trainer = pl.Trainer(
            accelerator="cpu",
            devices=1,
            max_steps=1,
            limit_val_batches=1,
            logger=False,
            use_distributed_sampler=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, data)
        assert trainer.global_step == 1
        raw = {path.name: count for path, count in asked.items() if path.suffix == ".tsv"}
        assert raw == {"train.tsv": 1, "dev.tsv": 1, "test.tsv": 1}
        assert set(asked.values()) == {1}  # nor the arrays made of them
