"""What a description of one's own data may say: each mistake is one line that names the key."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from lightning_glue.config.description import is_description, read_description, usual_name
from lightning_glue.errors import UserError

USUAL = {"train": "t.csv", "text": "review", "label": "stars"}


class Table:
    """What somebody gives in place of a path: it shows itself on two lines."""

    def __str__(self) -> str:
        return "a b\n1 2"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"txet": "a"}, "unknown key 'txet'; did you mean 'text'?"),
        ({"label": None}, "label=None; expected"),
        ({"kind": "regresion"}, "kind=regresion; did you mean 'regression'?"),
        ({"text": ["a", "b", "c"]}, "text: 3 columns; expected one, or two for a pair"),
        ({"text": 0}, "names and positions; expected one or the other"),
        ({"text": 0, "label": 1, "header": True}, "positions count from 0, in files without a header"),
        ({"text": 0, "label": -1}, "positions count from 0"),
        ({"header": False}, "header: false, but columns are given by name"),
        ({"text": ["a", "a"]}, "name the same column twice"),
        ({"labels": ["a", "a"]}, "labels: a, a; expected two or more, each once"),
        ({"labels": ["", "a"]}, "labels: an empty label"),
        ({"labels": ["a", " a "]}, "labels: a, a; expected two or more, each once"),
        ({"labels": ["a\nb", "a"]}, "labels: label 'a\\nb' has a line break, a tab or another control character"),
        ({"labels": ["<s>", "a"]}, "labels: label '<s>' is a symbol of fairseq's dictionaries"),
        ({"labels": ["\ud800", "a"]}, "labels: label '\\ud800' holds half a character"),
        ({"class_weights": {"a": True}}, "YAML reads yes, no, true and false as truth values"),
        ({"train": ""}, "'' is no path of a file"),
        ({"train": "a\0b.csv"}, "'a\\x00b.csv' is no path of a file"),
        ({"train": "https://ann:pw@example.org/t.csv"}, "https://ann:***@example.org/t.csv is an address; expected a"),
        ({"train": ["t.csv"]}, "train=['t.csv']; expected a text"),
        ({"train": Table()}, "train=a b; expected a text"),
        ({"dev": {"a": "d.csv", "dev_a": "e.csv"}}, "dev: 'dev_a' is dev_a too; give each file a name of its own"),
        ({"labels": [True, False]}, "labels: YAML reads yes, no, true and false as truth values; put them into quotes"),
        ({"labels": ["a", "b"], "kind": "regression"}, "labels: a regression has none"),
        ({"range": [0, 1]}, "range: only a regression has one"),
        ({"range": [1, 1], "kind": "regression"}, "range: [1.0, 1.0]; expected the lowest and the highest label"),
        ({"class_weights": {"a": -1}}, "class_weights: expected numbers that are not negative"),
        ({"class_weights": "balanced", "kind": "regression"}, "class_weights: a regression has no classes"),
        ({"dev": "d.csv", "dev_share": 0.2}, "dev_share and dev_seed are of a dev set that is taken from train"),
        ({"dev_share": 1}, "dev_share=1; expected less than 1"),
        ({"dev_seed": -1}, "dev_seed=-1 is too small"),
        ({"separator": "::"}, "separator: '::'; expected one character"),
        ({"metrics": []}, "metrics: expected a list"),
        ({"name": "a/b"}, "name 'a/b' cannot be a name"),
        ({"name": "rte"}, "name: rte is the name of a built-in task"),
        ({"name": "glue-x"}, "name: glue-x is the name of a built-in task or its model"),
        ({"dev": {"../x": "d.csv"}}, "cannot be a name"),
        ({"dev": ["a/d.csv", "b/d.csv"]}, "dev: two files are called d"),
        ({"test": []}, "test: no file"),
    ],
)
def test_a_mistake_is_one_line(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        read_description({**USUAL, **change})
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_paths_are_relative_to_the_file_and_splits_have_names(tmp_path: Path) -> None:
    file = tmp_path / "films.yaml"
    file.write_text(
        "train: data/t.tsv\ndev: {easy: e.csv, dev_hard: ../h.csv}\ntest: [a.csv, /b/c d.csv]\ntext: [a, b]\nlabel: c\n"
        "labels: [1, 0]\nclass_weights: {1: 2}\n"
    )
    own = read_description(file)
    assert own.name == "films"
    assert own.files == {
        "train": f"{tmp_path}/data/t.tsv",
        "dev_easy": f"{tmp_path}/e.csv",
        "dev_hard": f"{tmp_path.parent}/h.csv",
        "test_a": f"{tmp_path}/a.csv",
        "test_c-d": "/b/c d.csv",
    }
    assert (own.texts, own.labels, own.class_weights) == (["a", "b"], ["1", "0"], {"1": 2.0})


def test_a_path_that_goes_up_from_behind_a_link_is_the_systems(tmp_path: Path) -> None:
    (tmp_path / "data/films").mkdir(parents=True)
    (tmp_path / "data/films/films.yaml").write_text("train: ../t.csv\ntext: a\nlabel: b\n")
    (tmp_path / "data/t.csv").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "data/films")
    own = read_description(tmp_path / "link/films.yaml")
    assert Path(own.train).resolve() == tmp_path / "data/t.csv"
    assert read_description(tmp_path / "data/films/films.yaml").train == str(tmp_path / "data/t.csv")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"train: [", "is no YAML"),
        (b"train: t.csv\n\ttext: a\n", "x.yaml:2 is no YAML: found character"),
        (b"train: t.csv\ntext: a\nlabel: b\ntext: c\n", "x.yaml:4: 'text' stands in line 2 already"),
        (b"- a\n- b\n", "holds no description: expected keys such as train, text and label"),
        (b"", "holds no description"),
        (b"train: \xff", "is no YAML"),
        (b"!!python/object/apply:os.system [id]", "is no YAML"),
        (b"train: t.csv\ntext: a\n", "x.yaml: label is missing"),
    ],
)
def test_a_file_that_is_none(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_bytes(content)
    with pytest.raises(UserError) as error:
        read_description(tmp_path / "x.yaml")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_the_data_themselves_and_a_missing_file_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--data .*t\.csv: expected a description of it"):
        read_description(tmp_path / "t.csv")
    with pytest.raises(UserError, match=r"--data .*x\.yaml: No such file"):
        read_description(tmp_path / "x.yaml")
    os.mkfifo(tmp_path / "pipe.yaml")
    for name in ("pipe.yaml", "."):
        with pytest.raises(UserError, match=r"--data .* is no file; expected glue, sample, or a description's file"):
            read_description(tmp_path / name)
    assert not any(is_description(data) for data in (None, "glue", "sample", "smaple"))
    assert all(is_description(data) for data in ("x.yaml", "a/b"))


def test_data_without_a_name_are_called_after_the_file(tmp_path: Path) -> None:
    assert usual_name("films/reviews of 2020.csv") == "reviews-of-2020"
    assert usual_name("films/train.csv") == "films"
    assert usual_name("/train.csv") == "own"
