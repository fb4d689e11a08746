"""Data of one's own, from the file to the registered model: one training on pairs, looked at from all sides."""

from __future__ import annotations

import csv
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
import yaml
from helpers.project import ROOT, run
from helpers.zygote import FORKED

import lightning_glue as lg
from lightning_glue import train as training
from lightning_glue.config import compose, identity, recorded
from lightning_glue.data.own import given_data
from lightning_glue.errors import UserError
from lightning_glue.tracking.comparison import compare
from lightning_glue.tracking.own_tasks import TASK, task_of_run, whole_task
from lightning_glue.tracking.stored_runs import fetch
from lightning_glue.training.module import GlueModule

LABELS = ["très bien", "so so", "$bad {one}"]
DESCRIPTION = """
train: train.csv
test: new.csv
text: [title, review]
label: stars
index: id
labels: [très bien, so so, "$bad {one}"]
class_weights: {so so: 2}
metrics: [f1_macro, accuracy, cohen_kappa]
dev_share: 0.2
"""
FLAGS = ["--model", "tiny", "--gpus", "0"]
OVERRIDES = ["trainer.max_epochs=2", "trainer.log_every=2", "tracking.system_metrics_seconds=null"]


def write_films(folder: Path, rows: int = 60) -> None:
    chance = random.Random(1)
    with open(folder / "train.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["stars", "title", "review"])
        for i in range(rows):
            writer.writerow([LABELS[i % 3], f"film {i}", f'A "{chance.choice(["fine", "usual", "dull"])}"\nfilm, {i}'])
    (folder / "new.csv").write_text("title,id,review\nfilm,x7,A fine film\nfilm,x3,A dull film\n")
    (folder / "films.yaml").write_text(DESCRIPTION, encoding="utf-8")


@pytest.fixture(scope="session")
def bpe_dir(small_bpe: Path) -> Path:
    return small_bpe


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory, cache: Path, bpe_dir: Path) -> Path:
    folder = tmp_path_factory.mktemp("films")
    write_films(folder)
    flags = ["--data", "films.yaml", *FLAGS, *OVERRIDES, "trainer.predict=true"]
    run("lightning_glue.train", *flags, cwd=folder, ROBERTA_BPE_DIR=str(bpe_dir))
    return folder


def client_of(folder: Path) -> mlflow.MlflowClient:
    return mlflow.MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")


def run_of(folder: Path, name: str = "films") -> mlflow.entities.Run:
    client = client_of(folder)
    return client.search_runs([client.get_experiment_by_name(name).experiment_id], order_by=["start_time"])[0]


def artifacts(folder: Path) -> Path:
    return Path(run_of(folder).info.artifact_uri.removeprefix("file://"))


def test_the_run_says_what_it_was_made_from(films: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found, said = run_of(films), given_data(str(films / "films.yaml"))
    assert found.info.status == "FINISHED"
    assert json.loads(found.data.tags[TASK]) == said
    assert [entry.dataset.name for entry in found.inputs.dataset_inputs] == ["films/train", "films/dev", "films/test"]
    rows = [json.loads(entry.dataset.profile)["rows"] for entry in found.inputs.dataset_inputs]
    assert rows == [48, 12, 2]
    task = task_of_run(found)
    assert (task.labels, task.selection_metric, task.class_weights) == (tuple(LABELS), "dev/f1_macro", (1, 2, 1))
    assert whole_task(client_of(films), found) == task

    errors = pa.parquet.read_table(artifacts(films) / "errors/dev.parquet").to_pydict()
    with open(films / "train.csv", encoding="utf-8", newline="") as file:
        written = {(title, review): stars for stars, title, review in list(csv.reader(file))[1:]}
    assert len(errors["label"]) == 12
    assert errors["line"] == [2 + 2 * int(title.split()[1]) for title in errors["text"]]  # each has two lines
    assert [written[pair] for pair in zip(errors["text"], errors["text_pair"])] == errors["label"]

    card = (artifacts(films) / "fairseq/README.md").read_text()
    assert " on films" in card and "path: train.csv" in card and str(films) not in card

    (films / "experiments").mkdir(exist_ok=True)
    shutil.copy(artifacts(films) / "config.yaml", films / "experiments/again.yaml")
    monkeypatch.chdir(films)
    again = compose(experiment="again")
    assert (again.task.description, again.experiment) == (said, "films")
    first = compose([*OVERRIDES, "trainer.gpus=0", "trainer.predict=true"], data=said, model="tiny")
    assert identity(again) == identity(first)


def test_evaluation_gives_the_same_numbers_by_one_process_and_by_two(films: Path, bpe_dir: Path) -> None:
    found = run_of(films)
    best = {name.removeprefix("best/"): value for name, value in found.data.metrics.items() if "best/" in name}
    assert set(best) == {"dev/f1_macro", "dev/accuracy", "dev/cohen_kappa", "dev/loss"}
    for flags in ([], ["--procs", "2"]):
        scored = run("lightning_glue.evaluate", found.info.run_id, "--gpus", "0", *flags, cwd=films)
        assert dict(line.split() for line in scored.stdout.splitlines()) == {k: repr(v) for k, v in best.items()}

    other = films / "other.yaml"
    (films / "other.jsonl").write_text(
        '{"a": "film", "b": "A fine film", "c": "so so"}\n{"a": "", "b": "", "c": "so so"}\n'
    )
    other.write_text("train: other.jsonl\ndev: other.jsonl\ntext: [a, b]\nlabel: c\n")
    scored = run("lightning_glue.evaluate", found.info.run_id, "--gpus", "0", "--data", "other.yaml", cwd=films)
    assert "dev/f1_macro" in scored.stdout and "is not the file that the run was scored on" in scored.stderr
    refused = run("lightning_glue.evaluate", found.info.run_id, "--data", "gone.yaml", cwd=films, check=False)
    assert refused.stderr.count("\n") == 1 and "gone.yaml: No such file" in refused.stderr


def test_the_model_predicts_wherever_it_is_loaded_from(films: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [line.split("\t") for line in (artifacts(films) / "predictions/films.tsv").read_text().splitlines()]
    assert [row[0] for row in rows] == ["index", "x7", "x3"]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{films / 'mlflow.db'}")
    monkeypatch.chdir(films)
    titles, reviews = ["film", "film"], ["A fine film", "A dull film"]
    expected = lg.load("models:/films@champion").predict(titles, reviews)
    assert expected.classes == tuple(LABELS)
    assert expected.labels == [row[1] for row in rows[1:]]
    for other in (run_of(films).info.run_id, artifacts(films) / "fairseq", artifacts(films) / "checkpoints/best.ckpt"):
        answer = lg.load(other).predict(titles, reviews)
        assert (answer.classes, answer.labels) == (expected.classes, expected.labels)
        assert np.array_equal(answer.probabilities, expected.probabilities)
    frame = mlflow.pyfunc.load_model("models:/films@champion").predict(
        pd.DataFrame({"text": titles, "text_pair": reviews})
    )
    assert list(frame.columns) == ["label", *(f"probability_{label}" for label in LABELS)]
    assert list(frame.label) == expected.labels


def test_fairseq_loads_the_export_with_labels_in_the_same_order(films: Path) -> None:
    code = (
        "from fairseq.models.roberta import RobertaModel\n"
        "r = RobertaModel.from_pretrained('.', 'checkpoint_best.pt', '.')\n"
        "r.eval()\nd = r.task.label_dictionary\n"
        "p = r.predict('sentence_classification_head', r.encode('film', 'A fine film')).exp().tolist()[0]\n"
        "print([[d.symbols[i + d.nspecial], p[i]] for i in range(3)])"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", FORKED + code], cwd=artifacts(films) / "fairseq", capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=200,
    )  # fmt: skip
    assert loaded.returncode == 0, loaded.stderr
    theirs = eval(loaded.stdout.splitlines()[-1])
    ours = lg.load(artifacts(films) / "fairseq").predict("film", "A fine film")
    assert [name for name, _ in theirs] == LABELS
    assert [share for _, share in theirs] == pytest.approx(ours.probabilities[0], abs=1e-5)


def test_a_report_has_the_metric_of_the_task(films: Path, tmp_path: Path) -> None:
    uri = f"sqlite:///{films / 'mlflow.db'}"
    (section,) = compare(fetch(client_of(films), uri, None), uri, task="films", trials=False)
    assert (section.title, section.groups[0].best.metric) == ("films", "dev/f1_macro")
    said = run("lightning_glue.report", "--task", "filns", cwd=films, check=False)
    assert said.stderr == "error: unknown task 'filns'; did you mean 'films'?\n"


def test_a_training_is_resumed_exactly_and_never_on_a_changed_file(
    films: Path, tmp_path: Path, bpe_dir: Path, monkeypatch: pytest.MonkeyPatch, new_store: Callable[[Path], None]
) -> None:
    write_films(tmp_path)
    new_store(tmp_path)
    monkeypatch.setenv("ROBERTA_BPE_DIR", str(bpe_dir))
    monkeypatch.chdir(tmp_path)
    step, calls = GlueModule.training_step, iter(range(10**6))

    def crash_once(self: GlueModule, *arguments: Any) -> torch.Tensor:
        if next(calls) == 4:
            raise RuntimeError("interrupted")
        return step(self, *arguments)

    def config() -> Any:
        overrides = [*OVERRIDES, "trainer.gpus=0", "trainer.predict=true"]
        return compose(overrides, data=given_data("films.yaml"), model="tiny")

    with monkeypatch.context() as patch:
        patch.setattr(GlueModule, "training_step", crash_once)
        with pytest.raises(RuntimeError, match="interrupted"):
            training.train(config(), training.ResumingCaller(None))
    before = (tmp_path / "train.csv").read_bytes()
    (tmp_path / "train.csv").write_bytes(before.replace(b"film 7", b"film 77"))
    with pytest.raises(UserError, match=r"other data: split dev was sha256 .*train\.csv\); restore the files"):
        training.train(config(), training.ResumingCaller("auto"))
    (tmp_path / "train.csv").write_bytes(before)
    training.train(config(), training.ResumingCaller("auto"))
    assert run_of(tmp_path).info.status == "FINISHED"
    first, second = (torch.load(artifacts(folder) / "checkpoints/last.ckpt") for folder in (films, tmp_path))
    assert first["global_step"] == second["global_step"] == 6
    assert all(torch.equal(first["state_dict"][name], second["state_dict"][name]) for name in first["state_dict"])


def write_table(folder: Path, name: str, column: str, labels: list[Any]) -> Path:
    texts = [f"a {'red' if i % 2 else 'cold'} day {i}" for i in range(len(labels))]
    if name.endswith(".parquet"):
        pyarrow.parquet.write_table(pa.table({"body": texts, column: labels}), folder / name)
    else:
        rows = [{"body": text, column: label} for text, label in zip(texts, labels)]
        (folder / name).write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return folder / name


@pytest.fixture
def here(
    cache: Path, bpe_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, new_store: Callable[[Path], None]
) -> Path:
    new_store(tmp_path)
    monkeypatch.setenv("ROBERTA_BPE_DIR", str(bpe_dir))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_any_number_of_labels(here: Path) -> None:
    train = write_table(here, "tags.parquet", "tags", [["cold"], ["red", "a b"]] * 20)
    found = lg.fit(
        train=train, text="body", label="tags", kind="multi-label", model="tiny", gpus=0, max_epochs=10, lr=5e-3,
        data={"class_weights": "balanced"}, overrides={"trainer.val_check_interval": 1.0},
    )  # fmt: skip
    assert found.metrics["dev/f1_micro"] == found.metrics["dev/f1_macro"] == 1.0  # every second row is alike
    answer = lg.load("models:/tags@champion").predict(["a red day 1", "a cold day 2"])
    assert answer.labels == [("a b", "red"), ("cold",)]
    assert ((answer.probabilities > 0.5) == [[True, False, True], [False, True, False]]).all()
    frame = mlflow.pyfunc.load_model("models:/tags@champion").predict(pd.DataFrame({"text": ["a red day 1"]}))
    assert [list(names) for names in frame["labels"]] == [["a b", "red"]]
    drawn = {Path(entry.path).name for entry in client_of(here).list_artifacts(found.id, "figures")}
    assert drawn == {"learning_curves.png", "dev_precision_recall.png"}
    errors = pa.parquet.read_table(Path(found.folder).parent / "errors/dev.parquet").to_pydict()
    assert errors["label"] == errors["predicted"] == [["a b", "red"] if "red" in text else ["cold"]
                                                      for text in errors["text"]]  # fmt: skip
    assert np.mean(errors["loss"]) == pytest.approx(found.metrics["dev/loss"], abs=1e-5)


def test_a_regression_of_any_range(here: Path) -> None:
    train = write_table(here, "scores.jsonl", "score", [-20.5, 300] * 20)
    test = here / "new.jsonl"
    test.write_text('{"body": "a red day 1"}\n')
    found = lg.fit(
        train=train, test=test, text="body", label="score", kind="regression", model="tiny", gpus=0, max_epochs=16,
        lr=5e-3, data={"metrics": ["pearson", "mean_absolute_error"]},
        overrides={"trainer.predict": True, "trainer.precision": "32-true"},
    )  # fmt: skip
    assert found.metrics["dev/pearson"] > 0.9
    (score,) = lg.load(found).predict(["a red day 1"]).scores
    (line,) = (Path(found.folder).parent / "predictions/scores.tsv").read_text().splitlines()[1:]
    assert float(line.split("\t")[1]) == pytest.approx(score, rel=1e-4)
    assert score == pytest.approx(300, abs=found.metrics["dev/mean_absolute_error"] + 30)
    errors = pa.parquet.read_table(Path(found.folder).parent / "errors/dev.parquet").to_pydict()
    assert errors["label"] == pytest.approx([300 if "red" in text else -20.5 for text in errors["text"]])
    wrong = np.abs(np.subtract(errors["label"], errors["predicted"]))
    assert wrong.mean() == pytest.approx(found.metrics["dev/mean_absolute_error"], rel=1e-4)


@pytest.mark.torture
def test_a_search_keeps_its_data_and_writes_a_recipe_that_brings_them(here: Path) -> None:
    train = write_table(here, "days.jsonl", "kind", ["cold ${x}", "red"] * 20)
    asked = {"train": train, "text": "body", "label": "kind", "model": "tiny", "gpus": 0, "max_epochs": 1}
    study = lg.search(trials=1, **asked)
    assert [trial.state for trial in study.trials] == ["complete"]
    recipe = compose(experiment="tuned/days")
    assert (recipe.task.name, recipe.task.description["labels"]) == ("days", ["cold ${x}", "red"])
    assert recorded(recipe)["optimizer.lr"] == study.best_params["optimizer.lr"]
    assert yaml.safe_load((here / "experiments/tuned/days.yaml").read_text())["task"]["name"] == "days"
    write_table(here, "days.jsonl", "kind", ["cold ${x}", "green"] * 20)
    with pytest.raises(UserError, match=r"made with another configuration: task\.description\.labels is .* there"):
        lg.search(trials=2, **asked)


@pytest.mark.parametrize("command", ["train", "tune"])
def test_a_mistake_is_one_line_before_anything_is_made(command: str, here: Path) -> None:
    (here / "x.csv").write_text("text,label\na,1.5\nb,2.5\n")
    (here / "x.yaml").write_text("train: x.csv\ntext: text\nlabel: label\n")
    said = run(f"lightning_glue.{command}", "--data", "x.yaml", *FLAGS, cwd=here, check=False)
    assert said.returncode == 2
    assert said.stderr.count("\n") == 1 and "say kind: regression to predict them" in said.stderr
    assert {path.name for path in here.iterdir()} == {"x.csv", "x.yaml", "mlflow.db"}
