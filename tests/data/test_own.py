"""From a description and its training file to a task, and the rows of its splits."""

from __future__ import annotations

import io
import json
import math
import os
import re
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from lightning_glue.config import compose, flatten, identity, task_of, unflatten
from lightning_glue.config.description import read_description
from lightning_glue.data.binarize import prepare
from lightning_glue.data.datamodule import load_split
from lightning_glue.data.own import data_of_call, given_data, other_files, resolve
from lightning_glue.data.own_rows import read_own_split
from lightning_glue.data.text_stream import Layout, read_rows
from lightning_glue.data.tokenizer import load_tokenizer
from lightning_glue.errors import ConfigError, DataError, UserError
from lightning_glue.tasks import TASKS, described_task


def write(folder: Path, name: str, rows: list[tuple[Any, ...]], header: str = "review,stars") -> str:
    path = folder / name
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(dict(zip(header.split(","), row))) + "\n" for row in rows))
    else:
        path.write_text("\n".join([header, *(",".join(map(str, row)) for row in rows)]) + "\n")
    return str(path)


def resolved(folder: Path, column: list[Any], name: str = "t.csv", **keys: Any) -> dict[str, Any]:
    train = write(folder, name, [(f"text {i}", label) for i, label in enumerate(column)])
    return resolve(read_description({"train": train, "text": "review", "label": "stars", **keys}))


@pytest.mark.parametrize(
    ("labels", "keys", "expected", "metrics"),
    [
        (["b", "a", "b"] * 4, {}, ["a", "b"], ["accuracy", "f1"]),
        ([10, 9, -1] * 4, {}, ["-1", "9", "10"], ["accuracy"]),
        (["10", "9", "x"] * 4, {}, ["10", "9", "x"], ["accuracy"]),
        (["b", "a"] * 4, {"labels": ["b", "c", "a"]}, ["b", "c", "a"], ["accuracy"]),
        ([1.5, 2.5] * 4, {"kind": "classes"}, ["1.5", "2.5"], ["accuracy", "f1"]),
        (["a|b", "b", "", "a | c"] * 3, {"kind": "multi-label"}, ["a", "b", "c"], ["f1_micro", "f1_macro"]),
        ([1.5, -2.5, 4] * 4, {"kind": "regression"}, [], ["pearson", "spearman"]),
        (["a", "b"] * 4, {"metrics": ["matthews"]}, ["a", "b"], ["matthews"]),
    ],
)
def test_labels_and_metrics(
    labels: list[Any], keys: dict[str, Any], expected: list[str], metrics: list[str], tmp_path: Path
) -> None:
    said = resolved(tmp_path, labels, **keys)
    assert (said["labels"], said["metrics"]) == (expected, metrics)
    assert said["range"] == ([-2.5, 4.0] if not expected else None)


def test_a_value_of_json_is_the_name_that_it_is_written_as(tmp_path: Path) -> None:
    assert resolved(tmp_path, [True, False] * 4, "t.jsonl")["labels"] == ["false", "true"]
    assert resolved(tmp_path, [3, 20] * 4, "t.jsonl")["labels"] == ["3", "20"]
    several = resolved(tmp_path, [["x y", 1], [], ["x y"]] * 4, "t.jsonl", kind="multi-label")
    assert several["labels"] == ["1", "x y"]


@pytest.mark.parametrize(
    ("labels", "keys", "message"),
    [
        ([1.5, 2.5, 3] * 4, {}, "holds numbers such as 1.5; say kind: regression to predict them, or kind: classes"),
        (["a"] * 4, {}, "every row has the label 'a' in column 'stars'; expected two classes or more"),
        ([f"id {i}" for i in range(30)], {}, "each of 30 rows has another label in column 'stars'"),
        (["a", "x" * 300] * 4, {}, "t.csv:3: a label of 300 characters; is 'stars' the column of the labels?"),
        (["a", "b\x07"] * 4, {}, r"t.csv:3: label 'b\x07' has a line break, a tab or another control character"),
        (["a", "<pad>"] * 4, {}, "t.csv:3: label '<pad>' is a symbol of fairseq's dictionaries"),
        (["", ""] * 4, {}, "t.csv:2: no label, and so every row; expected at least one with a text and a label"),
        (["good"] * 4, {"kind": "regression"}, "t.csv:2: label 'good' is not a number"),
        ([1e35, 1, 2], {"kind": "regression"}, "label: 'stars' has numbers of 1e+30 and more, too large"),
        (["a", "b"] * 4, {"class_weights": {"a": 0, "b": 0}}, "class_weights: all are 0, so nothing would be learned"),
        (["a", "b"] * 4, {"dev": "/dev/zero", "format": "csv"}, "dev: /dev/zero is no file; see dev"),
        (["a", "b"] * 4, {"dev": "."}, "is no file; see dev"),
        (["a", "b"] * 4, {"class_weights": {"c": 2}}, "class_weights: 'c' is no label; expected a, b"),
        (["a", "b"] * 4, {"dev": "gone.csv"}, "gone.csv: No such file or directory; see dev"),
        (["a", "b"] * 4, {"dev": "t.dat"}, "tells no format; say format: tsv, csv, jsonl or parquet"),
    ],
)
def test_labels_that_cannot_be_meant(labels: list[Any], keys: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "t.dat").write_text("")
    keys = {key: str(tmp_path / value) if key == "dev" else value for key, value in keys.items()}
    with pytest.raises(UserError) as error:
        resolved(tmp_path, labels, **keys)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_label_that_json_or_parquet_holds_and_no_file_of_text_can(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"t\.jsonl:2: label 'b.ud800' holds half a character"):
        resolved(tmp_path, ["a", "b\ud800"] * 4, "t.jsonl")
    with pytest.raises(ConfigError, match=r"has the label 'a' .*besides what cannot be read .*:2: no label .NaN"):
        resolved(tmp_path, ["a", math.nan] * 4, "t.jsonl", kind="classes")
    for column, keys, expected in (
        ([Decimal("1.5"), Decimal("2.5"), None], {"kind": "regression"}, [1.5, 2.5]),
        ([Decimal("1.5"), Decimal("2.5"), None], {}, "holds numbers such as 1.5; say kind"),
        ([datetime(2020, 1, 1)], {}, "row 1: label '2020-01-01 00:00:00' is a datetime, neither a text nor a number"),
    ):
        pyarrow.parquet.write_table(pa.table({"x": ["t"] * len(column), "y": column}), tmp_path / "t.parquet")
        said = {"train": str(tmp_path / "t.parquet"), "text": "x", "label": "y", **keys}
        if isinstance(expected, list):
            assert resolve(read_description(said))["range"] == expected
            continue
        with pytest.raises(UserError, match=re.escape(expected)):
            resolve(read_description(said))


def test_a_header_is_no_row(tmp_path: Path) -> None:
    """Columns by their positions, in a file that names them."""
    (tmp_path / "t.csv").write_text("review,stars\n" + "x,good\ny,bad\n" * 4)
    said = {"train": str(tmp_path / "t.csv"), "text": 0, "label": 1}
    with pytest.raises(ConfigError, match=r"t\.csv:1: the label 'stars' stands in no other line: is that a header\?"):
        resolve(read_description(said))
    assert resolve(read_description({**said, "header": False}))["labels"] == ["bad", "good", "stars"]


def test_weights_follow_from_the_counts(tmp_path: Path) -> None:
    from sklearn.utils.class_weight import compute_class_weight

    labels = ["a"] * 7 + ["b"] * 2 + ["c"]
    expected = compute_class_weight("balanced", classes=np.array(["a", "b", "c"]), y=np.array(labels))
    assert resolved(tmp_path, labels, class_weights="balanced")["class_weights"] == pytest.approx(expected)
    assert resolved(tmp_path, labels, class_weights={"b": 3})["class_weights"] == [1.0, 3.0, 1.0]
    several = resolved(tmp_path, ["a|b", "a", "", "a"], kind="multi-label", class_weights="balanced")
    assert several["class_weights"] == [1 / 3, 3.0]  # absent / present


def test_splits_of_one_file_are_all_of_it_and_stay(tmp_path: Path) -> None:
    said = resolved(tmp_path, ["a", "b", "c", "c"] * 10, dev_share=0.25, dev_seed=7)
    task = described_task(said)
    train, dev = (read_own_split(task, task.split(name)) for name in ("train", "dev"))
    assert sorted(train.texts[0] + dev.texts[0]) == sorted(f"text {i}" for i in range(40))
    assert [dev.labels.count(label) for label in "abc"] == [2, 3, 5] or len(dev) == 10
    other = described_task({**said, "dev_seed": 8})
    assert read_own_split(other, other.split("dev")).texts != dev.texts


def prepared(said: dict[str, Any], tmp_path: Path, bpe_dir: Path, on_bad_row: str = "stop"):
    task = described_task(said)
    return task, prepare(task, Path("/"), load_tokenizer("gpt2", str(bpe_dir)), tmp_path / "cache", on_bad_row)


def test_arrays_hold_the_labels_by_their_ids(tmp_path: Path, bpe_dir: Path) -> None:
    """Also those with blanks and of any script, which no dictionary of fairseq's needs to have."""
    names = ["très bien", "a b", "好", "x 1"]
    dev = write(tmp_path, "d.csv", [("one", names[1]), ("two", names[0])])
    task, found = prepared(resolved(tmp_path, names * 3, dev=dev, labels=names), tmp_path, bpe_dir)
    assert load_split(task, task.train, found.directory, 64).targets.tolist() == [0, 1, 2, 3] * 3
    assert load_split(task, task.dev[0], found.directory, 64).targets.tolist() == [1, 0]

    said = resolved(tmp_path, ["a|b", "", "b"] * 3, kind="multi-label")
    task, found = prepared({**said, "dev_share": None}, tmp_path, bpe_dir)
    targets = load_split(task, task.train, found.directory, 64).targets
    assert targets.tolist()[:3] == [[1, 1], [0, 0], [0, 1]]
    assert targets.dtype == np.float32

    said = resolved(tmp_path, [1000.25, -1000, 0] * 3, kind="regression")
    task, found = prepared({**said, "dev_share": None}, tmp_path, bpe_dir)
    scaled = load_split(task, task.train, found.directory, 64).targets
    assert scaled * task.label_scale + task.label_offset == pytest.approx([1000.25, -1000, 0] * 3, abs=1e-3)


def test_a_faulty_row_stops_or_is_skipped_and_a_test_row_always_stops(tmp_path: Path, bpe_dir: Path) -> None:
    rows = [("one", "a"), ("two", "b"), ("three", "other"), ("four", "")]
    dev, test = write(tmp_path, "d.csv", rows), write(tmp_path, "e.csv", [(5, "x"), (5, "y")], "id,review")
    said = resolved(tmp_path, ["a", "b"] * 4, dev=dev, test=test, index="id")
    with pytest.raises(DataError, match=r"d\.csv:4: label 'other' is not one of a, b; .*labels: of the description"):
        prepared(said, tmp_path, bpe_dir)
    with pytest.raises(DataError, match=r"e\.csv:3: index '5' stands in row 2 already; predictions go by index"):
        prepared(said, tmp_path, bpe_dir, "skip")
    write(tmp_path, "e.csv", [('"a\tb"', "x")], "id,review")
    with pytest.raises(DataError, match=r"e\.csv:2: index 'a.tb' has a line break, a tab or another control character"):
        prepared(said, tmp_path, bpe_dir, "skip")
    write(tmp_path, "e.csv", [(5, "x"), ("k", "y")], "id,review")
    _, found = prepared(said, tmp_path, bpe_dir, "skip")
    assert (found.splits["dev"].rows, found.splits["dev"].skipped, found.index("test")) == (2, 2, ["5", "k"])
    (tmp_path / "d.csv").write_text("review,stars\nx\n")
    with pytest.raises(DataError, match=r"d\.csv: all 1 rows are malformed"):
        prepared(said, tmp_path, bpe_dir, "skip")


def test_a_digest_tells_which_part_of_a_file_a_split_is(tmp_path: Path, bpe_dir: Path) -> None:
    said = resolved(tmp_path, ["a", "b"] * 20)
    one, other = (prepared({**said, "dev_seed": seed}, tmp_path, bpe_dir)[1].splits for seed in (1, 2))
    digests = {info.sha256 for splits in (one, other) for info in splits.values()}
    assert len(digests) == 4
    moved = tmp_path / "moved.csv"
    os.rename(said["files"]["train"]["path"], moved)
    for file in said["files"].values():
        file["path"] = str(moved)
    _, found = prepared({**said, "metrics": ["matthews"]}, tmp_path, bpe_dir)
    assert {name: info.sha256 for name, info in found.splits.items()} == {k: v.sha256 for k, v in one.items()}
    assert found.splits["dev"].file != str(moved)  # the same arrays, which other metrics leave as they are


def test_a_configuration_holds_the_description_and_where_files_lie_is_no_part_of_what_it_is(tmp_path: Path) -> None:
    said = resolved(tmp_path, ["a ${b}", "c"] * 4, name="t.csv")
    config = compose(data=said, model="tiny")
    assert (config.task.name, config.data.source, config.experiment) == ("t", "own", "t")
    assert task_of(unflatten(flatten(config))) == task_of(config) == described_task(said)
    moved = json.loads(json.dumps(said).replace(str(tmp_path), "/elsewhere"))
    assert identity(compose(data=moved, model="tiny")) == identity(config)
    other = compose(data={**said, "dev_seed": 5}, model="tiny")
    differing = [key for key, value in identity(other).items() if identity(config)[key] != value]
    assert differing == ["task.description.dev_seed"]
    assert not [key for key in flatten(compose(task="RTE")) if "description" in key]
    with pytest.raises(ConfigError, match="--task RTE, but --data describes t; leave --task out"):
        compose(task="RTE", data=said)
    for overrides in (["data=_own"], ["task=_own"], ["data.source=own"]):
        with pytest.raises(ConfigError):
            compose(overrides)


def test_a_model_is_scored_on_other_files_with_its_own_labels(tmp_path: Path) -> None:
    said = resolved(tmp_path, ["a", "b", "c"] * 4, class_weights="balanced")
    new = write(tmp_path, "new.jsonl", [("x", "c"), ("y", "a")], "body,tag")
    other = other_files(said, read_description({"train": new, "dev": new, "text": "body", "label": "tag"}))
    task = described_task(other)
    assert (task.labels, task.metrics) == (("a", "b", "c"), ("accuracy",))
    assert read_own_split(task, task.dev[0]).labels == ["c", "a"]
    with pytest.raises(ConfigError, match="text: 2 columns, but the model takes 1"):
        other_files(said, read_description({"train": new, "text": ["body", "b"], "label": "tag"}))


def test_a_call_describes_data_by_its_arguments_or_a_dictionary(tmp_path: Path) -> None:
    train = Path(write(tmp_path, "films.csv", [("x", "a"), ("y", "b")] * 4))
    by_arguments = data_of_call({"labels": ["b", "a"]}, train=train, text="review", label="stars", kind=None)
    assert by_arguments == data_of_call({"train": train, "text": "review", "label": "stars", "labels": ["b", "a"]})
    assert by_arguments["name"] == "films"
    assert (data_of_call("sample"), given_data(None)) == ("sample", None)
    with pytest.raises(ConfigError, match="data='sample' and train="):
        data_of_call("sample", train=train)
    with pytest.raises(ConfigError, match="label is missing"):
        data_of_call(None, train=train, text="review")


@pytest.mark.parametrize(
    "damage", [{"files": {"../x": {"path": "/x", "format": "csv"}}}, {"name": "../x"}, {"text": None}]
)
def test_a_description_of_a_stranger_makes_no_path(damage: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        described_task({**resolved(tmp_path, ["a", "b"] * 4), **damage})


def test_a_built_in_task_is_one_yaml_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bpe_dir: Path) -> None:
    """``conf/task/<name>.yaml``: nothing else says what it is."""
    import shutil

    from lightning_glue import tasks
    from lightning_glue.config import compose_tune, paths
    from lightning_glue.pipeline.leaderboard import FILES, files_of
    from lightning_glue.utils import project

    conf = shutil.copytree(project.CONF, tmp_path / "conf")
    rte = (conf / "task/RTE.yaml").read_text()
    for old, new in {
        "RTE": "SICK",
        "[entailment, not_entailment]": "[yes it is, 'no']",
        "label]": "gold]",
        "label: label": "label: gold",
    }.items():
        rte = rte.replace(old, new)
    (conf / "task/SICK.yaml").write_text(rte)
    monkeypatch.setattr(project, "CONF", conf)
    monkeypatch.setattr(paths, "CONF", conf)
    tasks._built_in.cache_clear()
    try:
        task = TASKS["SICK"]
        assert tasks._trainable() == (*tasks.TRAINABLE, "SICK")
        assert (task.labels, task.dev[0].label_column) == (("yes it is", "no"), 3)
        folder = tmp_path / "glue/SICK"
        folder.mkdir(parents=True)
        for name in ("train", "dev"):
            (folder / f"{name}.tsv").write_text("index\tsentence1\tsentence2\tgold\n0\ta\tb\tyes it is\n1\tc\td\tno\n")
        found = prepare(task, tmp_path / "glue", load_tokenizer("gpt2", str(bpe_dir)), tmp_path / "cache")
        assert load_split(task, task.train, found.directory, 64).targets.tolist() == [0, 1]
        config, tune = compose_tune([], task="SICK", model="tiny")
        assert (config.experiment, tune.space) == ("glue-sick", "wide")
        assert files_of(TASKS.values()) == FILES  # what the leaderboard takes stays as it is
    finally:
        tasks._built_in.cache_clear()


def test_texts_to_predict_are_found_by_the_names_of_the_training_file(tmp_path: Path) -> None:
    task = described_task(resolved(tmp_path, ["a", "b"] * 4))
    for content in (b"stars,Review\na,fine\n", b"text,review\na,fine\n"):
        assert [row.texts for row in read_rows(io.BytesIO(content), "f", Layout(task, "csv"))] == [("fine",)]
