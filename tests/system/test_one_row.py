"""The smallest dev set there is, in real trainings: one row, shared by two processes."""

from __future__ import annotations

from pathlib import Path

import mlflow
import pytest
from helpers.project import run, torture

HEADERS = {
    "RTE": "index\tsentence1\tsentence2",
    "STS-B": "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2",
}


def write_task(root: Path, task: str, labels: list[str]) -> None:
    """Train rows with these labels, the first of them as the dev set, and a test set of one row."""
    columns = HEADERS[task].count("\t") - 2
    rows = ["\t".join([str(i), *["-"] * columns, f"Boat {i} waits.", f"A boat {i}."]) for i in range(len(labels))]
    labelled = [f"{row}\t{label}\n" for row, label in zip(rows, labels, strict=True)]
    header = f"{HEADERS[task]}\t{'score' if task == 'STS-B' else 'label'}\n"
    (root / task).mkdir(parents=True)
    (root / task / "train.tsv").write_text(header + "".join(labelled))
    (root / task / "dev.tsv").write_text(header + labelled[0])
    (root / task / "test.tsv").write_text(f"{HEADERS[task]}\n507{rows[0][1:]}\n")


@pytest.mark.torture
@pytest.mark.parametrize(
    ("task", "labels", "figures"),
    [
        ("RTE", ["entailment", "not_entailment", "entailment"], ["confusion_matrix", "precision_recall"]),
        torture("STS-B", ["2.5", "0.000", "5.0"], ["scatter"]),
    ],
)
def test_a_training_with_one_dev_row(
    task: str, labels: list[str], figures: list[str], cache: Path, bpe_dir: Path, tmp_path: Path
) -> None:
    write_task(tmp_path / "glue", task, labels)
    places = {"GLUE_DIR": str(tmp_path / "glue"), "ROBERTA_BPE_DIR": str(bpe_dir)}
    flags = ["--gpus", "0", "--procs", "2", "trainer.max_epochs=1", "data.batch_size=2", "trainer.predict=true"]
    run("lightning_glue.train", "--task", task, "--model", "tiny", *flags, cwd=tmp_path, **places)

    client = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    (found,) = client.search_runs([client.get_experiment_by_name(f"glue-{task.lower()}").experiment_id])
    assert found.info.status == "FINISHED"
    drawn = {Path(entry.path).stem for entry in client.list_artifacts(found.info.run_id, "figures")}
    assert drawn == {"learning_curves", *(f"dev_{name}" for name in figures)}
    predicted = Path(found.info.artifact_uri.removeprefix("file://"), "predictions", f"{task}.tsv")
    assert [line.split("\t")[0] for line in predicted.read_text().splitlines()] == ["index", "507"]

    alone = run("lightning_glue.evaluate", found.info.run_id, "--gpus", "0", cwd=tmp_path, **places).stdout
    values = {name: float(value) for name, value in map(str.split, alone.splitlines())}
    best = {name.removeprefix("best/"): found.data.metrics[name] for name in found.data.metrics if "best/" in name}
    assert values == best
    if task == "STS-B":
        assert (values["dev/pearson"], values["dev/spearman"]) == (0.0, 0.0)
    else:
        assert values["dev/accuracy"] in (0.0, 1.0)
