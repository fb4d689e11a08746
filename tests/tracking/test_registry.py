"""Real runs registered, and the champion loaded by a process that knows only MLflow."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import pytest
from helpers.project import ROOT, run, torture
from mlflow.entities import Dataset, DatasetInput, InputTag
from mlflow.utils.virtualenv import _get_python_env
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from lightning_glue.errors import UserError
from lightning_glue.tracking import registry

LOAD = """
import json, sys
from importlib.metadata import packages_distributions
import mlflow, pandas as pd

model = mlflow.pyfunc.load_model("models:/glue-wnli-sample@champion")
rows = [line.rstrip("\\n").split("\\t") for line in open(sys.argv[1], encoding="utf-8")][1:]
frame = pd.DataFrame({"text": [row[1] for row in rows], "text_pair": [row[2] for row in rows]})
predicted = model.predict(frame)
sums = predicted[["probability_0", "probability_1"]].sum(axis=1)
found = packages_distributions()
used = sorted({name for module in {one.partition(".")[0] for one in sys.modules} for name in found.get(module, ())})
print(json.dumps([list(predicted["label"]), float((sums - 1).abs().max()), used]))
"""


@pytest.fixture(scope="module")
def project(cache: Path, bpe_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """Two runs of one task, made one after the other."""
    folder = tmp_path_factory.mktemp("registry")
    flags = ["--task", "WNLI", "--data", "sample", "--model", "tiny", "--gpus", "0", "trainer.max_epochs=1"]
    for seed in (1, 2):
        command = ["lightning_glue.train", *flags, f"seed={seed}", "trainer.predict=true", "trainer.precision=32-true"]
        run(*command, cwd=folder, ROBERTA_BPE_DIR=str(bpe_dir))
    store = mlflow.MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    found = store.search_runs([store.get_experiment_by_name("glue-wnli-sample").experiment_id])
    return folder, [entry.info.run_id for entry in sorted(found, key=lambda entry: entry.info.start_time)]


@pytest.fixture
def client(tmp_path: Path, new_store: Callable[[Path], None]) -> mlflow.MlflowClient:
    new_store(tmp_path)
    return mlflow.MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")


def finished_run(
    client: mlflow.MlflowClient, folder: Path, accuracy: float, dev: str = "a" * 32, loss: float = 0.5
) -> str:
    """A run as a training on real data leaves it; registration looks at no weights."""
    experiment = client.get_experiment_by_name("glue-rte")
    experiment_id = experiment.experiment_id if experiment else client.create_experiment("glue-rte", str(folder))
    run_id = client.create_run(experiment_id, tags={"lineage.start_sha256": "b" * 64}).info.run_id
    client.log_param(run_id, "task.name", "RTE")
    client.log_metric(run_id, "best/dev/accuracy", accuracy)
    client.log_metric(run_id, "best/dev/loss", loss)
    dataset = Dataset("RTE/dev", dev, "local", "{}")
    client.log_inputs(run_id, datasets=[DatasetInput(dataset, [InputTag("mlflow.data.context", "dev")])])
    client.log_text(run_id, "weights", "fairseq/checkpoint_best.pt")
    client.set_terminated(run_id)
    return run_id


def test_a_diverged_model_is_not_registered(client: mlflow.MlflowClient, tmp_path: Path) -> None:
    run_id = finished_run(client, tmp_path, 0.5, loss=float("nan"))
    with pytest.raises(UserError, match=r"best/dev/loss is no finite number, so the training diverged"):
        registry.register(client, run_id)
    assert not client.search_registered_models()


def test_the_champion_gives_way_only_to_a_better_one(client: mlflow.MlflowClient, tmp_path: Path) -> None:
    scores = (0.7, 0.8, 0.75, 0.8)
    said = [registry.register(client, finished_run(client, tmp_path, score)) for score in scores]
    assert [version for _, version, _ in said] == [1, 2, 3, 4]
    assert [decision for *_, decision in said] == [
        "the champion: dev/accuracy 0.7000",
        "the champion: dev/accuracy 0.8000",
        "version 2 stays champion: dev/accuracy 0.8000 against 0.7500",
        "version 2 stays champion: dev/accuracy 0.8000 against 0.8000",
    ]
    assert str(client.get_model_version_by_alias("glue-rte", "champion").version) == "2"


def test_a_champion_no_better_than_the_majority_class_comes_with_a_warning(
    client: mlflow.MlflowClient, tmp_path: Path
) -> None:
    said = []
    for score, level in ((0.5, "0.5"), (0.6, "0.5"), (0.7, "none")):
        run_id = finished_run(client, tmp_path, score)
        client.set_tag(run_id, registry.MAJORITY, level)
        said.append(registry.register(client, run_id)[2])
    assert said == [
        "the champion: dev/accuracy 0.5000; warning: no better than the majority class (0.5000 against 0.5000)",
        "the champion: dev/accuracy 0.6000",
        "the champion: dev/accuracy 0.7000",
    ]


def test_a_champion_of_other_data_is_not_compared(client: mlflow.MlflowClient, tmp_path: Path) -> None:
    registry.register(client, finished_run(client, tmp_path, 0.7))
    _, _, decision = registry.register(client, finished_run(client, tmp_path, 0.9, dev="c" * 32))
    assert decision == "not compared with the champion, version 1: dev aaaaaaaaaaaa against cccccccccccc"
    assert str(client.get_model_version_by_alias("glue-rte", "champion").version) == "1"


def test_a_champion_whose_run_was_deleted_is_still_measured_against(
    client: mlflow.MlflowClient, tmp_path: Path
) -> None:
    first = finished_run(client, tmp_path, 0.7)
    registry.register(client, first)
    client.delete_run(first)
    assert registry.register(client, finished_run(client, tmp_path, 0.6))[2].startswith("version 1 stays champion")


@pytest.mark.parametrize("status", ["KILLED", "FAILED", "RUNNING"])  # a diverged training has FAILED
def test_an_unfinished_run_is_refused(status: str, client: mlflow.MlflowClient, tmp_path: Path) -> None:
    run_id = finished_run(client, tmp_path, 0.7)
    client.update_run(run_id, status)
    with pytest.raises(UserError, match=f"is {status}; only a finished training"):
        registry.register(client, run_id)
    assert not client.search_registered_models()


class Interrupted(mlflow.MlflowClient):
    """Another process does ``meanwhile`` just before ``call`` reaches the store."""

    def __init__(self, uri: str, call: str, meanwhile: Callable[[], object]) -> None:
        super().__init__(uri)
        real = getattr(self, call)

        def late(*arguments: Any, **named: Any) -> Any:
            setattr(self, call, real)
            meanwhile()
            return real(*arguments, **named)

        setattr(self, call, late)


@pytest.mark.parametrize("call", ["set_model_version_tag", "get_registered_model", "set_registered_model_alias"])
@pytest.mark.parametrize(("mine", "theirs"), [(0.8, 0.9), torture(0.9, 0.8)])
def test_of_two_that_end_together_the_better_is_champion(
    mine: float, theirs: float, call: str, client: mlflow.MlflowClient, tmp_path: Path
) -> None:
    registry.register(client, finished_run(client, tmp_path, 0.7))
    one, other = finished_run(client, tmp_path, mine), finished_run(client, tmp_path, theirs)
    late = Interrupted(client.tracking_uri, call, lambda: registry.register(client, other))
    _, _, decision = registry.register(late, one)
    holder = client.get_model_version_by_alias("glue-rte", "champion")
    assert float(holder.tags["score"]) == 0.9
    assert ("the champion" in decision) == (mine > theirs)


def test_a_champion_put_back_by_hand_is_the_one_to_beat(client: mlflow.MlflowClient, tmp_path: Path) -> None:
    first, *_ = (registry.register(client, finished_run(client, tmp_path, score)) for score in (0.7, 0.9))
    client.set_registered_model_alias("glue-rte", "champion", first[1])
    _, version, decision = registry.register(client, finished_run(client, tmp_path, 0.8))
    assert decision == "the champion: dev/accuracy 0.8000"
    assert client.get_model_version_by_alias("glue-rte", "champion").version == version


def test_versions_made_by_hand_do_not_stand_in_the_way(client: mlflow.MlflowClient, tmp_path: Path) -> None:
    """The same run under another name, and a champion without a score."""
    run_id = finished_run(client, tmp_path, 0.7)
    for name in ("mine", "glue-rte"):
        client.create_registered_model(name)
    client.create_model_version("mine", f"runs:/{run_id}/fairseq", run_id)
    client.create_model_version("mine", f"runs:/{run_id}/fairseq", run_id)
    assert registry.register(client, run_id)[:2] == ("glue-rte", 1)
    by_hand = client.create_model_version("glue-rte", f"runs:/{run_id}/fairseq", None)
    client.set_registered_model_alias("glue-rte", "champion", by_hand.version)
    _, version, decision = registry.register(client, finished_run(client, tmp_path, 0.8))
    assert (version, decision) == (3, "not compared with the champion, version 2: its tag 'score' is no number")


def test_one_run_registered_twice_at_once_is_one_version(client: mlflow.MlflowClient, tmp_path: Path) -> None:
    run_id = finished_run(client, tmp_path, 0.7)
    late = Interrupted(client.tracking_uri, "create_model_version", lambda: registry.register(client, run_id))
    assert registry.register(late, run_id)[1] == 1
    assert [version.version for version in client.search_model_versions("name = 'glue-rte'")] == [1]


def test_a_version_says_what_it_comes_from(project: tuple[Path, list[str]]) -> None:
    folder, runs = project
    store = mlflow.MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    (version,) = store.search_model_versions(f"run_id = '{runs[0]}'")
    tags = store.get_run(runs[0]).data.tags
    assert version.tags["lineage.labels"] == '["0", "1"]'
    assert version.tags["lineage.start_sha256"] == "random weights"
    assert len(version.tags["lineage.tokenizer_sha256"]) == 64
    assert {key: value for key, value in version.tags.items() if key.startswith("lineage.")} == {
        key: value for key, value in tags.items() if key.startswith("lineage.")
    }
    assert {"data.train", "data.dev"} <= version.tags.keys()
    accuracy = store.get_run(runs[0]).data.metrics["best/dev/accuracy"]
    assert version.description.partition("\n\n")[0] == (
        f"dev/accuracy {accuracy:.4f}, of run tiny lr 0.001 batch 16 1 epoch seed 1. "
        "Labels: 0 is not entailed, 1 is entailed."
    )


def test_the_champion_is_evaluated_by_its_name(project: tuple[Path, list[str]]) -> None:
    folder, _ = project
    store = mlflow.MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    champion = store.get_run(store.get_model_version_by_alias("glue-wnli-sample", "champion").run_id)
    said = run("lightning_glue.evaluate", "models:/glue-wnli-sample@champion", "--gpus", "0", cwd=folder).stdout
    (line,) = [line for line in said.splitlines() if line.startswith("dev/accuracy")]
    assert float(line.split()[1]) == champion.data.metrics["best/dev/accuracy"]
    said = run("lightning_glue.evaluate", "models:/glue-wnli-sample@none", cwd=folder, check=False).stderr
    assert said.startswith("error: models:/glue-wnli-sample@none: ") and said.count("\n") == 1


@pytest.mark.torture
def test_the_champion_predicts_what_the_run_predicted(project: tuple[Path, list[str]], cache: Path) -> None:
    folder, runs = project
    store = mlflow.MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    holder = store.get_model_version_by_alias("glue-wnli-sample", "champion")
    values = {run_id: store.get_run(run_id).data.metrics["best/dev/accuracy"] for run_id in runs}
    assert holder.run_id == max(runs, key=lambda run_id: values[run_id])  # the earlier one if they are equal

    test = next(cache.rglob("WNLI/test.tsv"))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    loaded = subprocess.run(
        [sys.executable, "-c", LOAD, str(test)],  # an interpreter that has imported nothing before
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert loaded.returncode == 0, loaded.stderr
    labels, error, used = json.loads(loaded.stdout.splitlines()[-1])
    written = (
        next((folder / "mlruns").rglob(f"{holder.run_id}/artifacts/predictions/WNLI.tsv")).read_text().splitlines()
    )
    assert labels == [line.split("\t")[1] for line in written[1:]]
    assert error < 1e-6
    (model,) = (folder / "mlruns").rglob(f"{holder.run_id}/artifacts/fairseq")
    asked = {line.partition("==")[0] for line in (model / "requirements.txt").read_text().splitlines()}
    # imported where something else has brought them: transformers by torchmetrics, trio by httpcore, triton by torch
    optional = {"sniffio", "pysocks", "transformers", "trio", "outcome", "sortedcontainers", "triton"}
    assert {canonicalize_name(name) for name in used} - optional <= asked


def test_mlflow_finds_the_environment_of_a_model(
    project: tuple[Path, list[str]], caplog: pytest.LogCaptureFixture
) -> None:
    """Where there is none it takes the model for one of a much older MLflow."""
    folder, runs = project
    (model,) = (folder / "mlruns").rglob(f"{runs[0]}/artifacts/fairseq")
    environment = _get_python_env(model)
    assert "older version" not in caplog.text
    assert environment.python == platform.python_version()
    assert environment.dependencies == ["-r requirements.txt"]
    lines = [line for line in (model / "requirements.txt").read_text().splitlines() if not line.startswith("#")]
    pinned = {line.partition("==")[0]: Requirement(line) for line in lines}
    assert {"torch", "mlflow", "lightning-glue"} <= pinned.keys()
    assert pinned.keys() & {"ve-fairseq", "fairseq-fixed"}
    assert "torchaudio" not in pinned


def test_registering_again_makes_no_second_version(project: tuple[Path, list[str]]) -> None:
    folder, runs = project
    first = run("lightning_glue.registry", runs[0], cwd=folder).stdout
    assert run("lightning_glue.registry", runs[0], cwd=folder).stdout == first


def test_an_unknown_run_is_one_line(project: tuple[Path, list[str]]) -> None:
    result = run("lightning_glue.registry", "0" * 32, cwd=project[0], check=False)
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: run {'0' * 32} cannot be registered")
    assert result.stderr.count("\n") == 1


def test_a_version_is_described_by_its_card_with_the_seeds_until_then(project: tuple[Path, list[str]]) -> None:
    folder, (first, second) = project
    store = mlflow.MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    texts = {one.run_id: one.description for one in store.search_model_versions("name = 'glue-wnli-sample'")}
    assert texts[first].startswith("dev/accuracy 0.") and "Labels: 0 is not entailed, 1 is entailed." in texts[first]
    assert "One seed: how far others are from it is not known." in texts[first]
    values = [store.get_run(run_id).data.metrics["best/dev/accuracy"] for run_id in (first, second)]
    row = f"| dev/accuracy | {values[1]:.4f} | {sum(values) / 2:.4f} | {min(values):.4f} to {max(values):.4f} | 2 |"
    assert row in texts[second] and "(seeds 1, 2)" in texts[second]
    for section in ("Confusion, dev", "Data", "Limits", "Training", "Licence", "Recipe"):
        assert f"## {section}\n" in texts[second]
    alone = (Path(*folder.glob(f"mlruns/*/{second}/artifacts/fairseq")) / "README.md").read_text(encoding="utf-8")
    assert "| 1 |" in alone and "One seed" in alone and f"run: {second}" in alone  # no request at a training's end


@pytest.mark.torture
def test_a_run_is_converted_with_the_seeds_in_its_card(project: tuple[Path, list[str]], tmp_path: Path) -> None:
    from transformers import pipeline

    folder, (first, second) = project
    said = run("lightning_glue.convert", first, "--to", "hf", str(tmp_path / "out"), cwd=folder)
    assert said.stderr == "" and f"wrote {tmp_path / 'out'}: README.md, config.json" in said.stdout
    text = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "(seeds 1, 2)" in text and "library_name: transformers" in text
    assert str(folder) not in text + (tmp_path / "out" / "config.json").read_text(encoding="utf-8")
    found = pipeline("text-classification", str(tmp_path / "out"), device="cpu")([{"text": "a", "text_pair": "b"}])
    assert found[0]["label"] in ("0", "1")
    scores = [
        json.loads(run("lightning_glue.evaluate", model, "--gpus", "0", cwd=folder).stdout.split()[1])
        for model in (first, str(tmp_path / "out"))
    ]
    assert scores[0] == scores[1]
    again = run("lightning_glue.convert", second, "--to", "hf", str(tmp_path / "out"), cwd=folder, check=False)
    assert again.returncode == 2 and "exists already" in again.stderr
    elsewhere = f"sqlite:///{tmp_path / 'nowhere.db'}"
    back = ["--to", "fairseq", str(tmp_path / "back"), "--uri", elsewhere]
    moved = run("lightning_glue.convert", str(tmp_path / "out"), *back, cwd=tmp_path)
    assert f"note: run {first} was not looked up" in moved.stderr and not (tmp_path / "nowhere.db").exists()
