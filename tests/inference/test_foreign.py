"""A classifier of Hugging Face that nobody made here: its task is what ``id2label`` and ``problem_type`` say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.huggingface import TEXTS, bert_tokenizer, random_model, roberta_tokenizer, save
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertForSequenceClassification,
    RobertaForSequenceClassification,
    RobertaModel,
)

import lightning_glue as lg
from lightning_glue import convert
from lightning_glue.config import compose
from lightning_glue.errors import UserError
from lightning_glue.inference.finetuned import load_fine_tuned
from lightning_glue.training import evaluation
from lightning_glue.training.card_facts import of_model

LABELS = ["très bien", "so so", "bad"]


def classifier(folder: Path, bpe_dir: Path, labels: list[str], kind: str | None = None, bert: bool = False) -> Path:
    """Of random weights, as ``save_pretrained`` writes it."""
    tokenizer = bert_tokenizer() if bert else roberta_tokenizer(bpe_dir)
    of = BertForSequenceClassification if bert else RobertaForSequenceClassification
    more = {} if bert else {"max_position_embeddings": 514}
    model = random_model(of, tokenizer, num_labels=len(labels), **more)
    with torch.no_grad():
        model.classifier.weight.normal_(0, 1) if bert else model.classifier.out_proj.weight.normal_(0, 1)
    model.config.id2label, model.config.label2id = dict(enumerate(labels)), {one: i for i, one in enumerate(labels)}
    model.config.problem_type = kind
    return save(folder, model, tokenizer)


def theirs(folder: Path, *columns: list[str]) -> np.ndarray:
    """Logits by transformers, one example at a time."""
    model, encode = (
        AutoModelForSequenceClassification.from_pretrained(folder).eval(),
        AutoTokenizer.from_pretrained(folder),
    )
    with torch.no_grad():
        rows = [model(**encode(*row, return_tensors="pt")).logits[0].numpy() for row in zip(*columns)]
    return np.stack(rows).astype(np.float64)


STRIPPED = [text.strip() for text in TEXTS]


def softmax(logits: np.ndarray) -> np.ndarray:
    shares = np.exp(logits - logits.max(-1, keepdims=True))
    return shares / shares.sum(-1, keepdims=True)


@pytest.mark.parametrize("bert", [False, True])
def test_classes_are_those_of_id2label(bert: bool, tmp_path: Path, bpe_dir: Path, cache: Path) -> None:
    folder = classifier(tmp_path / "étude 3", bpe_dir, LABELS, bert=bert)
    model = lg.load(folder, device="cpu")
    assert (model.task.name, model.task.problem_type) == ("tude-3", "single_label_classification")
    answer, logits = model.predict(STRIPPED), theirs(folder, STRIPPED)
    np.testing.assert_allclose(answer.probabilities, softmax(logits), atol=1e-5)
    assert (answer.classes, answer.labels) == (tuple(LABELS), [LABELS[i] for i in logits.argmax(-1)])


def test_scores_and_any_number_of_labels(tmp_path: Path, bpe_dir: Path) -> None:
    folder = classifier(tmp_path / "score", bpe_dir, ["LABEL_0"])
    np.testing.assert_allclose(
        lg.load(folder, device="cpu").predict(STRIPPED).scores, theirs(folder, STRIPPED)[:, 0], atol=1e-5
    )
    folder = classifier(tmp_path / "tags", bpe_dir, LABELS, "multi_label_classification")
    answer, logits = lg.load(folder, device="cpu").predict(STRIPPED), theirs(folder, STRIPPED)
    np.testing.assert_allclose(answer.probabilities, 1 / (1 + np.exp(-logits)), atol=1e-5)
    assert answer.labels == [tuple(LABELS[i] for i in np.flatnonzero(row > 0)) for row in logits]


def test_inference_of_two_texts(tmp_path: Path, bpe_dir: Path, cache: Path) -> None:
    """As ``roberta-large-mnli`` of the hub calls its labels."""
    names = ["CONTRADICTION", "NEUTRAL", "ENTAILMENT"]
    folder, other = classifier(tmp_path / "nli", bpe_dir, names), STRIPPED[::-1]
    answer = lg.load(folder, device="cpu").predict(STRIPPED, other)
    np.testing.assert_allclose(answer.probabilities, softmax(theirs(folder, STRIPPED, other)), atol=1e-5)
    with pytest.raises(UserError, match="it is a BERT fine-tuned on pairs, whose second text has segment 1"):
        load_fine_tuned(classifier(tmp_path / "bert", bpe_dir, names, bert=True))


def test_it_is_converted_and_scored_on_files_of_ones_own(
    tmp_path: Path, bpe_dir: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = classifier(tmp_path / "films", bpe_dir, ["bad", "good"])
    model = load_fine_tuned(folder)
    for form in ("hf", "fairseq"):
        convert.write(model, form, tmp_path / form, of_model(model, "films"), {})
        again = load_fine_tuned(tmp_path / form)
        assert again.task == model.task
        assert all(torch.equal(a, b) for a, b in zip(again.model.parameters(), model.model.parameters()))
    with pytest.raises(UserError, match=r"films: the model names no files; describe some with --data FILE\.yaml"):
        evaluation.load(str(folder), compose(["trainer.gpus=0"]), set(), None).data.prepare_data()
    (tmp_path / "new.csv").write_text("review,stars\n" + "fine,good\ndull,bad\n" * 3)
    (tmp_path / "new.yaml").write_text("train: new.csv\ndev: new.csv\ntext: review\nlabel: stars\n")
    config = compose(["trainer.gpus=0"])
    loaded = evaluation.load(str(folder), config, set(), None, str(tmp_path / "new.yaml"))
    values = evaluation.evaluate(loaded.config, loaded.fine_tuned, loaded.data)
    right = [label == name for label, name in zip(lg.load(folder).predict(["fine", "dull"]).labels, ("good", "bad"))]
    assert values["dev/accuracy"] == pytest.approx(sum(right) / 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"problem_type": "token_classification"},
            "problem_type is 'token_classification' of 3 outputs, which is no task",
        ),
        ({"problem_type": "regression"}, "problem_type is 'regression' of 3 outputs, which is no task here"),
        ({"id2label": {"0": "a", "1": "a", "2": "b"}}, "its id2label has a label twice"),
        ({"id2label": {"0": "a", "1": "b\nc", "2": ""}}, "has a line break, a tab or another control character"),
        ({"id2label": {"0": "a", "1": 5, "2": "b"}}, r"its id2label has \['a', 5, 'b'\], expected names"),
        ({"id2label": {"0": "a", "1": "b"}}, "its head is none of .* with 2 outputs"),
        ({"id2label": {"zero": "a"}}, "invalid literal"),
        ({"id2label": ["a", "b", "c"]}, "."),
        ({"lightning_glue": {"task": "../../x"}}, "unknown task"),
    ],
)
def test_what_is_no_task_is_one_line(change: dict[str, Any], message: str, tmp_path: Path, bpe_dir: Path) -> None:
    folder = classifier(tmp_path / "x", bpe_dir, LABELS)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=message) as error:
        load_fine_tuned(folder)
    assert "\n" not in str(error.value)


def test_an_encoder_alone_predicts_nothing(tmp_path: Path, bpe_dir: Path) -> None:
    tokenizer = roberta_tokenizer(bpe_dir)
    save(tmp_path / "x", random_model(RobertaModel, tokenizer, max_position_embeddings=514), tokenizer)
    with pytest.raises(UserError, match="it has no classifier, only an encoder: train with the folder as the model"):
        lg.load(tmp_path / "x")
