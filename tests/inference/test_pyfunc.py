"""Exported models behind MLflow's pyfunc: single texts, pairs and scores."""

from __future__ import annotations

import sys
from pathlib import Path

import mlflow
import pandas as pd
import pytest
import torch
from helpers.batches import packed

from lightning_glue import config
from lightning_glue.errors import UserError
from lightning_glue.export.fairseq import export
from lightning_glue.model import pretrained
from lightning_glue.model.roberta import build_model, stock_logits, token_limit
from lightning_glue.tasks import TASKS
from lightning_glue.tracking.registry import describe_model
from lightning_glue.utils.console import draws_bars

FRAME = pd.DataFrame(
    {"text": ["A man sleeps.", " It was a long day. "], "text_pair": ["Somebody is asleep.", "Short."]}, index=[7, 3]
)


def served(name: str, bpe_dir: Path, folder: Path) -> tuple[pd.DataFrame, torch.Tensor]:
    """What the described model answers, and the head's outputs of fairseq's forward, text by text."""
    task = TASKS[name]
    architecture = config.compose(model="tiny").model.architecture
    start = pretrained.load_pretrained("random", "gpt2", str(bpe_dir), architecture)
    model = build_model(start, task.num_outputs, {}).eval()
    export(model, task, start.tokenizer, [], 0, folder)
    describe_model(task, "0" * 32, folder)
    texts = [FRAME[column] for column in ("text", "text_pair")[: task.num_texts]]
    outputs = []
    for row in zip(*texts):
        first, *rest = (start.tokenizer.encode([text.strip()])[0].tolist() for text in row)  # each ends with </s>
        ids = [0, *first] + [token for part in rest for token in (2, *part)]
        with torch.no_grad():
            outputs.append(stock_logits(model, packed(ids))[0])
    columns = ["text", "text_pair"][: task.num_texts]
    return mlflow.pyfunc.load_model(str(folder)).predict(FRAME[columns]), torch.stack(outputs)


@pytest.mark.parametrize("name", ["SST-2", "MNLI"])
def test_labels_and_probabilities(name: str, bpe_dir: Path, tmp_path: Path) -> None:
    answer, outputs = served(name, bpe_dir, tmp_path)
    labels = TASKS[name].labels
    shares = outputs.softmax(-1)
    assert list(answer.index) == [7, 3]
    assert list(answer.columns) == ["label", *(f"probability_{label}" for label in labels)]
    assert list(answer["label"]) == [labels[i] for i in shares.argmax(-1)]
    assert answer[[f"probability_{label}" for label in labels]].to_numpy() == pytest.approx(shares.numpy(), abs=1e-5)


def test_a_request_draws_nothing(
    bpe_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a server's log is a terminal."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert draws_bars()
    served("SST-2", bpe_dir, tmp_path)
    assert "predict" not in capsys.readouterr().err


def test_scores_are_on_the_tasks_scale(bpe_dir: Path, tmp_path: Path) -> None:
    answer, outputs = served("STS-B", bpe_dir, tmp_path)
    assert list(answer.columns) == ["score"]
    assert answer["score"].to_numpy() == pytest.approx((5 * outputs.squeeze(-1)).clamp(0, 5).numpy(), abs=1e-4)


@pytest.mark.parametrize("name", ["RTE", "STS-B"])
def test_no_rows_are_an_empty_answer_and_missing_values_are_named(name: str, bpe_dir: Path, tmp_path: Path) -> None:
    columns = list(served(name, bpe_dir, tmp_path)[0].columns)
    model = mlflow.pyfunc.load_model(str(tmp_path))
    none = model.predict(FRAME.iloc[:0])
    assert list(none.columns) == columns
    assert len(none) == 0
    for missing in (None, float("nan"), pd.NA):
        frame = FRAME.astype(object)
        frame.loc[3, "text_pair"] = missing
        with pytest.raises(UserError, match=f"{name}: column 'text_pair', row 3 holds .*, expected a text"):
            model.predict(frame)
    frame.loc[3, "text_pair"] = "half \ud83d"
    with pytest.raises(UserError, match="row 3 holds half a character"):
        model.predict(frame)
    assert list(model.predict(FRAME.assign(text_pair=["", "x y z " * 1000]).set_axis([5, 5])).index) == [5, 5]


@pytest.mark.parametrize(("positions", "asked", "limit"), [(128, 512, 128), (1024, 1024, 1024), (1024, None, 512)])
def test_texts_are_cut_as_the_run_cut_them(
    positions: int, asked: int | None, limit: int, bpe_dir: Path, tmp_path: Path
) -> None:
    task = TASKS["SST-2"]
    architecture = config.compose(model="tiny").model.architecture | {"max_positions": positions}
    start = pretrained.load_pretrained("random", "gpt2", str(bpe_dir), architecture)
    model = build_model(start, task.num_outputs, {}).eval()
    settings = {"data.max_tokens": token_limit(model, asked)} if asked else None  # None: an export of earlier versions
    export(model, task, start.tokenizer, [], 0, tmp_path, settings)
    describe_model(task, "0" * 32, tmp_path)
    text = " ".join(f"word {i}" for i in range(1500))
    answer = mlflow.pyfunc.load_model(str(tmp_path)).predict(pd.DataFrame({"text": [text]}))
    ids = [0, *start.tokenizer.encode([text])[0].tolist()]
    with torch.no_grad():
        shares = stock_logits(model, packed([*ids[: limit - 1], 2])).softmax(-1)[0]
    found = answer[[f"probability_{label}" for label in task.labels]].to_numpy()[0]
    assert found == pytest.approx(shares.numpy(), abs=1e-6)


def test_a_missing_column_is_named(bpe_dir: Path, tmp_path: Path) -> None:
    served("RTE", bpe_dir, tmp_path)
    with pytest.raises(Exception, match="text_pair"):
        mlflow.pyfunc.load_model(str(tmp_path)).predict(FRAME[["text"]])
