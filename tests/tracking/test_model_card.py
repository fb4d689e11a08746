"""Model cards: the whole text of one, and cases in which something is not known."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
import pytest

from lightning_glue.tracking import model_card
from lightning_glue.tracking.model_card import Facts

FACTS = Facts(
    name="minilm seed 1",
    task="RTE",
    problem_type="single_label_classification",
    labels=["entailment", "not_entailment"],
    texts=2,
    source="minilm",
    start_sha256="53aa",
    data="glue",
    splits={"train": {"rows": 2490, "sha256": "41e3"}, "dev": {"rows": 277, "sha256": "8023"}},
    recipe={"optimizer.lr": 1e-4, "data.batch_size": 16},
    seed="1",
    step=30,
    scores={"dev/accuracy": 0.7, "dev/loss": 0.5},
    majority=0.5271,
    confusion={"dev": [[100, 46, 0], [31, 100, 0]]},
    precision="32-true",
    devices="1 x cpu",
    minutes=1.25,
    run="1553e772",
    commit="9ea29354",
)
SEEDS = {"1": {"dev/accuracy": 0.7, "dev/loss": 0.5}, "2": {"dev/accuracy": 0.6, "dev/loss": 0.4},
         "3": {"dev/accuracy": 0.65, "dev/loss": 0.6}}  # fmt: skip


def test_the_whole_card() -> None:
    expected = (Path(__file__).parent / "model_card.md").read_text(encoding="utf-8")
    version = model_card.__version__
    assert model_card.card(FACTS, "hf", SEEDS) == expected.replace("VERSION", version)


@pytest.mark.parametrize("form", ["hf", "fairseq", "onnx"])
def test_the_hub_reads_it(form: str) -> None:
    read = huggingface_hub.ModelCard(model_card.card(FACTS, form, SEEDS)).data
    assert (read.license, read.pipeline_tag, read.metrics) == ("apache-2.0", "text-classification", ["accuracy"])
    (result,) = read.eval_results
    assert (result.dataset_name, result.metric_type, result.metric_value) == ("GLUE RTE", "accuracy", 0.7)


def test_what_is_not_known_is_said_or_left_out() -> None:
    bare = Facts("somebody's", "topics", "multi_label_classification", [f"label | {i}" for i in range(60)])
    text = model_card.card(bare, "hf")
    assert huggingface_hub.ModelCard(text).data.license == "unknown"
    assert "The licence of its weights is not known." in text and "## Scores\n\nNot known." in text
    assert "and 10 more" in text and "## Recipe" not in text and "English" not in text


def test_limits_that_only_some_formats_have() -> None:
    facts = Facts("scores", "STS-B", "regression", [], scale=5.0, epsilon=1e-12, data="sample", source="random")
    assert "Its output times 5 is the score" in model_card.card(facts, "onnx")
    assert "epsilon of 1e-5; this model has 1e-12" in model_card.card(facts, "fairseq")
    assert "epsilon" not in model_card.card(facts, "hf") and "was generated to try the program out" in text_of(facts)


def text_of(facts: Facts) -> str:
    return model_card.description(facts)


def test_of_many_classes_the_most_frequent_confusions() -> None:
    names = [f"c{i}" for i in range(20)]
    counts = [[3 * (i == j) + (i == 4 and j == 7) * 9 for j in range(21)] for i in range(20)]
    text = text_of(Facts("m", "t", "single_label_classification", names, confusion={"dev": counts}))
    assert "Most frequent confusions, dev" in text and "| c4 | c7 | 9 |" in text and "| c3 | c3 |" not in text


def test_a_description_has_room_in_mlflow() -> None:
    long = Facts(
        "m", "t", "single_label_classification", ["x" * 3000, "y"], recipe={f"key.{i}": "z" * 50 for i in range(99)}
    )
    text = model_card.description(long, first="dev/accuracy 0.7.")
    assert text.startswith("dev/accuracy 0.7.\n\nFine-tuned") and 3000 < len(text) <= 5000 and "## Recipe" not in text


def test_facts_are_kept_and_read_again(tmp_path: Path) -> None:
    model_card.write(tmp_path, FACTS, "fairseq")
    assert model_card.read(tmp_path) == FACTS
    for damaged in ("[]", "{", "{}", ""):
        (tmp_path / model_card.FACTS).write_text(damaged)
        assert model_card.read(tmp_path) is None
    assert model_card.read(tmp_path / "nowhere") is None
