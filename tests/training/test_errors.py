"""The error analysis that a training leaves, and what is made of it: one training for all."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest

import lightning_glue as lg
from lightning_glue.data import sources
from lightning_glue.data.reader import read_split
from lightning_glue.tasks import TASKS

MNLI = TASKS["MNLI"]
HEADER = "Lexical Semantics\tPredicate-Argument Structure\tLogic\tKnowledge\tDomain\tPremise\tHypothesis\tLabel\n"


@pytest.fixture(scope="module")
def run(cache: Path, bpe_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> lg.Run:
    folder = tmp_path_factory.mktemp("errors")
    root = folder / "glue"
    for task in (MNLI, TASKS["AX"]):
        source = sources.glue_directory(task, "sample", None)
        shutil.copytree(source / task.directory, root / task.directory)
    rows = "".join(f"Factivity\t\tNegation\t\tNews\tA man {i} sleeps.\tHe.\t{label}\n"
                   for i, label in enumerate(MNLI.labels))  # fmt: skip
    (root / "diagnostic" / "diagnostic-full.tsv").write_text(HEADER + rows)
    store: dict[str, str | None] = {"data.bpe_dir": str(bpe_dir)}
    store |= {"tracking.uri": f"sqlite:///{folder}/mlflow.db", "tracking.journal": str(folder / "journal"),
             "tracking.system_metrics_seconds": None}  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return lg.fit("MNLI", model="tiny", data="glue", max_steps=2, gpus=0,
                      overrides={"data.glue_dir": str(root), "trainer.predict": False, **store})  # fmt: skip


def test_dev_predictions_worst_rows_and_the_analysis(run: lg.Run) -> None:
    folder = Path(run.folder).parent / "errors"
    analysis = json.loads((folder / "analysis.json").read_text())
    assert {*analysis["splits"]} == {split.name for split in MNLI.dev}
    assert [(one["phenomenon"], one["rows"]) for one in analysis["phenomena"]] == [
        ("all", 3), ("Lexical Semantics", 3), ("Lexical Semantics: Factivity", 3), ("Logic", 3), ("Logic: Negation", 3),
    ]  # fmt: skip
    for split in MNLI.dev:
        found = pq.read_table(folder / f"{split.name}.parquet").to_pydict()
        rows = read_split(MNLI, split, _root(run))
        lines = (_root(run) / "MNLI" / split.file_name).read_text().splitlines()
        assert all(text in lines[line - 1].split("\t") for line, text in zip(found["line"], found["text"]))
        assert (found["text"], found["text_pair"], found["label"]) == (*rows.texts, rows.labels)
        right = sum(a == b for a, b in zip(found["label"], found["predicted"])) / len(rows)
        assert right == pytest.approx(run.metrics[f"{split.name}/accuracy"])
        assert sum(found["loss"]) / len(rows) == pytest.approx(run.metrics[f"{split.name}/loss"], abs=1e-5)
        everything = analysis["splits"][split.name]["slices"][0]
        assert (everything["rows"], everything["metric"]) == (len(rows), pytest.approx(right))
        table = json.loads((folder / f"{split.name}_worst.json").read_text())  # as MLflow's log_table writes it
        losses = [row[table["columns"].index("loss")] for row in table["data"]]
        assert losses == sorted(found["loss"], reverse=True)[:200]


def _root(run: lg.Run) -> Path:
    return Path(lg.load(run).fine_tuned.settings["data.glue_dir"])


def test_the_temperature_goes_with_the_model_and_is_off_unless_asked_for(run: lg.Run) -> None:
    analysis = json.loads((Path(run.folder).parent / "errors" / "analysis.json").read_text())
    plain, calibrated = lg.load(run, device="cpu"), lg.load(run, device="cpu", calibrated=True)
    assert (plain.temperature, calibrated.temperature) == (1.0, analysis["temperature"])
    one, other = (model.predict(["A man."], ["It rains."]) for model in (plain, calibrated))
    assert one.labels == other.labels
    assert abs(one.probabilities - other.probabilities).max() > 0
