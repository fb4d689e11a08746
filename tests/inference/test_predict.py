"""Scoring the rows of a split, whatever forward the model has."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.scorers import make_scorer, texts

from lightning_glue.data.batching import EvalSampler, Packed, padded_size
from lightning_glue.inference import predict as module
from lightning_glue.inference.predict import predict
from lightning_glue.model.roberta import logits


def test_a_model_with_fairseqs_own_forward_computes_what_caches_hold(
    bpe_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scorer = make_scorer("SST-2", bpe_dir, tmp_path)
    model = scorer.model.fine_tuned.model
    rows = scorer.encode([texts(300, longest=60)])
    whole = rows[next(iter(EvalSampler(rows.lengths, 100_000)))]
    with torch.no_grad():
        expected = logits(model, whole)[torch.argsort(whole["rows"])]
    model.runs_unpadded = False
    sizes: list[int] = []

    def counted(model: torch.nn.Module, batch: Packed) -> torch.Tensor:
        sizes.append(padded_size(batch))
        return logits(model, batch)

    monkeypatch.setattr(module, "logits", counted)
    torch.testing.assert_close(predict(model, rows, 100_000), expected, rtol=1e-4, atol=1e-5)
    assert padded_size(whole) > 6000 and len(sizes) > 2
    assert max(sizes) < 2500  # the longest rows have more padding beside them than the others
