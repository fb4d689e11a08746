"""Models as ONNX: the same logits in onnxruntime, for any batch and length."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from helpers.huggingface import LONG, TEXTS
from helpers.project import write_small_bpe
from transformers import AutoTokenizer

from lightning_glue import config, convert
from lightning_glue.data.tokenizer import load_tokenizer
from lightning_glue.export import onnx
from lightning_glue.inference.finetuned import FineTuned
from lightning_glue.inference.text_model import Model
from lightning_glue.model.pretrained import Pretrained
from lightning_glue.model.roberta import HEAD, build_model
from lightning_glue.tasks import TASKS
from lightning_glue.training.card_facts import of_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> FineTuned:
    encoder = load_tokenizer("gpt2", str(write_small_bpe(tmp_path_factory.mktemp("bpe"))))
    torch.manual_seed(1)
    args = {**config.compose(model="tiny").model.architecture, "max_positions": 512, "layer_norm_eps": 1e-3}
    found = build_model(Pretrained(args, None, encoder, ""), 3, {}).eval()
    with torch.no_grad():
        for parameter in found.classification_heads[HEAD].parameters():
            parameter.normal_(0, 0.3)
    return FineTuned(found, TASKS["MNLI"], encoder, Path("none"), "", {"data.source": "sample"})


@pytest.fixture(scope="module")
def folder(model: FineTuned, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("onnx") / "out"
    convert.write(model, "onnx", out, of_model(model, "a model"), {}, int8=True)
    return out


@pytest.mark.parametrize(("name", "tolerance"), [(onnx.MODEL, 1e-5), (onnx.INT8, 0.5)])
def test_onnxruntime_gives_our_logits_for_any_batch_and_length(
    name: str, tolerance: float, model: FineTuned, folder: Path
) -> None:
    session = onnxruntime.InferenceSession(folder / name, providers=["CPUExecutionProvider"])
    encoder = AutoTokenizer.from_pretrained(folder)
    pairs = [*TEXTS[::-1], LONG]
    ours = Model(model)
    for texts, others in (([*TEXTS, LONG], pairs), (["a"], ["b"]), ([LONG], [LONG])):
        texts, others = ([text.strip() for text in column] for column in (texts, others))
        batch = encoder(texts, others, truncation=True, padding=True, return_tensors="np")
        fed = {name: batch[name].astype(np.int64) for name in ("input_ids", "attention_mask")}
        (found,) = session.run(["logits"], fed)
        np.testing.assert_allclose(found, ours.outputs([texts, others]), atol=tolerance)


@pytest.mark.torture
def test_the_comparison_is_on_the_whole_dev_set(
    model: FineTuned, folder: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from lightning_glue.training.onnx_comparison import compare

    results = compare(model, folder, config.compose(["trainer.gpus=0"], data="sample"), {"data.source"})
    assert [one.name for one in results] == ["torch", onnx.MODEL, onnx.INT8]
    assert [*results[0].scores] == ["dev_matched/accuracy", "dev_mismatched/accuracy"]
    first, second, third = results
    assert first.scores == second.scores and first.difference == 0 < second.difference < 1e-5 < third.difference < 0.5
    assert second.same == 1.0 and second.batched > 0 < second.single
    convert.compare(model, folder, "sample")
    said = capsys.readouterr().out
    assert "dev_mismatched/accuracy" in said and "logits differ by" in said and onnx.INT8 in said


def test_without_data_it_says_so(
    model: FineTuned, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GLUE_DIR", str(tmp_path))
    convert.compare(model, folder, "glue")
    assert "not compared on a dev set: GLUE_DIR" in capsys.readouterr().out
