"""Folders for transformers: loaded there they answer as the model does, and converted back they are the same bytes."""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from helpers.huggingface import LONG, TEXTS
from helpers.project import write_small_bpe
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

import lightning_glue as lg
from lightning_glue import config, convert
from lightning_glue.config import compose
from lightning_glue.data.own import data_of_call
from lightning_glue.data.tokenizer import Tokenizer, load_tokenizer
from lightning_glue.errors import UserError
from lightning_glue.export import fairseq, huggingface
from lightning_glue.inference.finetuned import FineTuned, load_fine_tuned
from lightning_glue.inference.text_model import Model
from lightning_glue.model.pretrained import Pretrained, load_pretrained
from lightning_glue.model.roberta import HEAD, build_model
from lightning_glue.tasks import TASKS, Task, described_task
from lightning_glue.training import evaluation
from lightning_glue.training.card_facts import of_model

TINY = config.compose(model="tiny").model.architecture
PAIRS = [*TEXTS[::-1], "A long one."]
FIRST = [*TEXTS, LONG]


def fine_tuned(task: Task, encoder: Tokenizer, start: Pretrained | None = None, **args: Any) -> FineTuned:
    """A random head (and encoder) whose answers differ from text to text."""
    torch.manual_seed(1)
    model = build_model(
        start or Pretrained({**TINY, "max_positions": 512, **args}, None, encoder, ""), task.num_outputs, {}
    )
    with torch.no_grad():
        for parameter in () if start else model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        for parameter in model.classification_heads[HEAD].parameters():
            parameter.normal_(0, 0.3)
    return FineTuned(model.eval(), task, encoder, Path("none"), "", {"data.max_tokens": 512})


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer("gpt2", str(write_small_bpe(tmp_path_factory.mktemp("bpe"))))


def written(model: FineTuned, form: str, out: Path) -> Path:
    convert.write(model, form, out, of_model(model, "a model"), {})
    return out


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def models(small: Tokenizer) -> dict[str, FineTuned]:
    minilm = load_pretrained("minilm", "wordpiece", None, {})
    several = replace(TASKS["SST-2"], multilabel=True)
    return {
        "single": fine_tuned(TASKS["CoLA"], small),
        "pair": fine_tuned(TASKS["MNLI"], small, layer_norm_eps=1e-3),
        "minilm": fine_tuned(TASKS["RTE"], minilm.tokenizer, minilm),
        "score": fine_tuned(TASKS["STS-B"], small),
        "several": fine_tuned(several, small),
    }


@pytest.mark.parametrize("name", ["single", "pair", "minilm", "score", "several"])
def test_transformers_pipeline_gives_our_labels_and_probabilities(name: str, small: Tokenizer, tmp_path: Path) -> None:
    model = models(small)[name]
    folder = written(model, "hf", tmp_path / "out")
    task = model.task
    theirs = pipeline("text-classification", str(folder), top_k=None, device="cpu")
    assert theirs.model.config.problem_type == task.problem_type
    columns = [[text.strip() for text in column] for column in (FIRST, PAIRS)[: task.num_texts]]
    rows: list[Any] = [{"text": row[0], "text_pair": row[1]} if len(row) == 2 else row[0] for row in zip(*columns)]
    found = [theirs([row], truncation=True)[0] for row in rows]  # one by one: no padding
    outputs = Model(model).outputs(columns).double()
    expected = {"regression": outputs, "multi_label_classification": outputs.sigmoid()}.get(
        task.problem_type, outputs.softmax(-1)
    )
    names = task.labels or ("score",)
    said = np.array([[{one["label"]: one["score"] for one in row}[label] for label in names] for row in found])
    assert expected.std(0).min() > 1e-3
    np.testing.assert_allclose(said, expected.numpy(), atol=1e-5)
    if task.problem_type == "single_label_classification":
        assert [row[0]["label"] for row in found] == Model(model).answer(columns).labels


@pytest.mark.parametrize("name", ["single", "minilm", "score"])
def test_there_and_back_again_is_the_same_bytes(name: str, small: Tokenizer, tmp_path: Path) -> None:
    model = models(small)[name]
    first = written(model, "hf", tmp_path / "first")
    back = written(load_fine_tuned(first), "fairseq", tmp_path / "fairseq")
    second = written(load_fine_tuned(back), "hf", tmp_path / "second")
    names = {path.name for path in first.iterdir()}
    assert names == {path.name for path in second.iterdir()}
    for file in names - {"model_card.json", "README.md"}:
        assert digest(first / file) == digest(second / file), file
    again = written(load_fine_tuned(second), "fairseq", tmp_path / "again")
    one, other = (torch.load(folder / "checkpoint_best.pt", weights_only=True) for folder in (back, again))
    assert one["glue_labels"] == other["glue_labels"] and one["glue_tokenizer"] == other["glue_tokenizer"]
    assert all(torch.equal(tensor, other["model"][name]) for name, tensor in one["model"].items())


def test_written_without_transformers(small: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = fine_tuned(TASKS["SST-2"], small)
    for name in [name for name in sys.modules if name.partition(".")[0] in ("transformers", "huggingface_hub")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "transformers", None)  # importing it fails
    folder = written(model, "hf", tmp_path / "out")
    assert {path.name for path in folder.iterdir()} == {
        "README.md", "config.json", "merges.txt", "model.safetensors", "model_card.json", "special_tokens_map.json",
        "tokenizer.json", "tokenizer_config.json", "vocab.json",
    }  # fmt: skip
    said = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert (said["id2label"], said["label2id"]) == ({"0": "0", "1": "1"}, {"0": 0, "1": 1})


def test_loaded_by_the_library_and_by_transformers_classes(small: Tokenizer, tmp_path: Path) -> None:
    model = fine_tuned(TASKS["RTE"], small)
    folder = written(model, "hf", tmp_path / "out")
    ours = lg.load(folder, device="cpu")
    np.testing.assert_array_equal(ours.outputs([FIRST, PAIRS]), Model(model).outputs([FIRST, PAIRS]))
    their, encoder = AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    batch = encoder(["a b"], ["c"], return_tensors="pt")
    logits = their.eval()(**batch).logits.detach()
    torch.testing.assert_close(logits, ours.outputs([["a b"], ["c"]]), atol=1e-5, rtol=0)
    huggingface_hub.ModelCard.load(folder / "README.md").validate  # noqa: B018


def change(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")


def test_a_classifier_of_somebody_else(small: Tokenizer, tmp_path: Path) -> None:
    """transformers' own scripts say the task in finetuning_task; labels are in any order."""
    model = fine_tuned(TASKS["RTE"], small)
    folder = written(model, "hf", tmp_path / "out")
    change(folder, lightning_glue=None, finetuning_task="rte", id2label={"0": "not_entailment", "1": "entailment"})
    turned = load_fine_tuned(folder)
    assert turned.task is TASKS["RTE"]
    torch.testing.assert_close(Model(turned).outputs([["a"], ["b"]]), Model(model).outputs([["a"], ["b"]]).flip(1))
    change(folder, id2label={"0": "LABEL_0", "1": "LABEL_1"})
    with pytest.raises(UserError, match="its 'glue_labels' are .*LABEL_0.*expected RTE's: entailment, not_entailment"):
        load_fine_tuned(folder)
    change(folder, finetuning_task=None)
    assert load_fine_tuned(folder).task.labels == ("LABEL_0", "LABEL_1")


@pytest.mark.parametrize("form", ["hf", "fairseq"])
def test_of_ones_own_files_only_the_names_travel(form: str, small: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret/films.csv").write_text("review,stars\n" + "fine,good\ndull,bad\n" * 9)
    said = data_of_call(None, train=tmp_path / "secret/films.csv", text="review", label="stars")
    settings = {"data.source": "own", "data.max_tokens": 512, "GLUE_DIR": str(tmp_path), "data.glue_dir": "/ann"}
    model = replace(fine_tuned(described_task(said), small), settings=settings)
    folder = written(model, form, tmp_path / "out")
    for path in folder.rglob("*"):
        assert not path.is_file() or str(tmp_path).encode() not in path.read_bytes(), path
    again = load_fine_tuned(folder)
    assert again.settings == {"data.source": "own", "data.max_tokens": 512}
    assert [split.path for split in again.task.splits] == ["films.csv", "films.csv"]
    torch.testing.assert_close(Model(again).outputs([TEXTS]), Model(model).outputs([TEXTS]))


def test_a_converted_model_is_scored_where_its_files_are_or_on_others(
    small: Tokenizer, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "films.csv").write_text("review,stars\n" + "".join(f"fine {i},good\ndull {i},bad\n" for i in range(9)))
    said = data_of_call(None, train=tmp_path / "films.csv", text="review", label="stars")
    folder = written(fine_tuned(described_task(said), small), "hf", tmp_path / "elsewhere/out")
    config = compose(["trainer.gpus=0"])

    def rows(data: str | None = None) -> dict[str, int]:
        loaded = evaluation.load(str(folder), config, set(), None, data)
        loaded.data.prepare_data()
        return {name: info.rows for name, info in loaded.data.prepared.splits.items()}

    monkeypatch.chdir(tmp_path)
    assert rows() == {"dev": 2}
    (tmp_path / "new.yaml").write_text("train: films.csv\ndev: films.csv\ntext: review\nlabel: stars\n")
    assert rows("new.yaml") == {"dev": 18}
    monkeypatch.chdir(tmp_path / "elsewhere")
    with pytest.raises(
        UserError, match=r"no file films\.csv; the model knows it by its name alone: go to its folder, or"
    ):
        rows()


def test_an_architecture_without_a_counterpart_is_refused(small: Tokenizer, tmp_path: Path) -> None:
    other = fine_tuned(TASKS["RTE"], small, encoder_normalize_before=True)
    with pytest.raises(UserError, match="has no counterpart in transformers' RoBERTa"):
        huggingface.export(other.model, other.task, small, tmp_path, {})
    with pytest.raises(UserError, match="activation_fn=relu"):
        huggingface.check(fine_tuned(TASKS["RTE"], small, activation_fn="relu").model)


def test_a_folder_that_holds_files_is_left_alone(small: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="exists already"):
        written(fine_tuned(TASKS["RTE"], small), "hf", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_fairseq_export_keeps_what_is_unusual(tmp_path: Path, small: Tokenizer) -> None:
    """The space before a text and the epsilon of LayerNorm."""
    from lightning_glue.data.tokenizer import SETTINGS

    spaced = replace(small, prefix_space=True, files=small.files | {SETTINGS: b'{"add_prefix_space": true}'})
    model = fine_tuned(TASKS["CoLA"], spaced, layer_norm_eps=1e-3)
    fairseq.export(model.model, model.task, spaced, ["0", "1"], 0, tmp_path / "out")
    again = load_fine_tuned(tmp_path / "out")
    assert again.tokenizer.prefix_space and again.tokenizer.digest == spaced.digest
    torch.testing.assert_close(Model(again).outputs([TEXTS]), Model(model).outputs([TEXTS]))
    plain = fine_tuned(TASKS["CoLA"], small)
    assert (Model(plain).outputs([TEXTS]) - Model(model).outputs([TEXTS])).abs().max() > 1e-3
