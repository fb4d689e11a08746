"""Tasks: files, columns, labels and metrics, each from a description; GLUE's nine (and AX) are built in.

A description is what ``conf/task/<name>.yaml`` has under ``description`` (GLUE: Wang et al. 2019,
https://gluebenchmark.com/tasks), and what a run on data of one's own records, see :mod:`lightning_glue.data.own`. Label
ids are positions in ``Task.labels``: fixed, never derived from label frequency as ``fairseq-preprocess`` does.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import PurePath
from typing import Any

from lightning_glue.errors import ConfigError, suggest
from lightning_glue.utils import project
from lightning_glue.utils.paths import plain_name

_FIRST = ("CoLA", "SST-2", "MRPC", "STS-B", "QQP", "MNLI", "QNLI", "RTE", "WNLI")  # GLUE's order
_LAST_COLUMN = -1
_LONGEST_LABEL = 200
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_FAIRSEQ = ("<s>", "<pad>", "</s>", "<unk>")


@dataclass(frozen=True)
class Split:
    """One file of a task, and where its fields are.

    That of a built-in task is ``<GLUE_DIR>/<task folder>/<name>.tsv``, with its fields in fixed 0-based columns. One of
    one's own has a ``path``, and its fields where ``Task.own`` says.

    Attributes:
        part: of the rows of a file that train and dev set share, see :mod:`lightning_glue.data.dev_part`.
    """

    name: str
    text_columns: tuple[int, ...] = ()
    label_column: int | None = None  # None: unlabelled; -1: the last column
    columns: tuple[str, ...] = ()  # their names in the official file
    header: bool = True  # line 1 holds these names; a file without a header has just these columns
    drop_malformed: bool = False  # drop rows with a wrong number of fields, as fairseq's awk does for QQP
    path: str = ""
    format: str = ""  # of an own file: tsv, csv, jsonl or parquet
    part: str = ""  # of an own file: train or dev; empty: all of it
    labelled: bool = True

    @property
    def file_name(self) -> str:
        return self.path or f"{self.name}.tsv"

    @property
    def index_column(self) -> int | None:
        """Where an unlabelled file has the index that the leaderboard wants back with each prediction."""
        return None if self.labelled else 0


@dataclass(frozen=True)
class OwnFiles:
    """How the files of one's own are read: columns by name, or by 0-based position where there is no header.

    Attributes:
        separator: between fields, of CSV.
        quoted: fields may be quoted as RFC 4180 has it; of TSV.
        label_separator: between the labels of an example, where it has any number of them and its cell is a text.
        dev_share, dev_seed: of the training file, where there is no file of its own for the dev set.
    """

    text: tuple[str | int, ...]
    label: str | int
    index: str | int | None
    header: bool
    separator: str
    quoted: bool
    label_separator: str
    dev_share: float | None
    dev_seed: int


@dataclass(frozen=True)
class Task:
    """A task. ``metrics[0]`` on ``dev[0]`` selects the best checkpoint.

    Attributes:
        class_weights: of each label in the loss of training; of several labels an example, of its presence. Empty: 1.
        own: of data of one's own; None for a built-in task.
        description: what the task was made from, as JSON; empty for a built-in task.
    """

    name: str
    labels: tuple[str, ...]  # empty: regression
    metrics: tuple[str, ...]
    train: Split | None
    dev: tuple[Split, ...]
    test: tuple[Split, ...]
    folder: str = ""  # folder below GLUE_DIR; empty: the task's name
    submission: tuple[str, ...] = ()  # predictions' file per test split; empty: <name>.tsv
    label_scale: float = 1.0  # regression targets are (label - label_offset) / label_scale
    label_offset: float = 0.0
    bounded: bool = True  # regression: labels and predictions lie from label_offset to label_offset + label_scale
    multilabel: bool = False  # each example has any number of labels, also none
    meanings: tuple[str, ...] = ()  # what each of ``labels`` says, where it is a number
    class_weights: tuple[float, ...] = ()
    own: OwnFiles | None = None
    description: str = ""

    @property
    def problem_type(self) -> str:
        """``regression``, ``single_label_classification`` or ``multi_label_classification``, as transformers say it."""
        if self.is_regression:
            return "regression"
        return f"{'multi' if self.multilabel else 'single'}_label_classification"

    @property
    def is_regression(self) -> bool:
        return not self.labels

    @property
    def num_outputs(self) -> int:
        return len(self.labels) or 1

    @property
    def splits(self) -> tuple[Split, ...]:
        return ((self.train,) if self.train else ()) + self.dev + self.test

    @property
    def num_texts(self) -> int:
        return len(self.own.text) if self.own else len(self.splits[0].text_columns)

    @property
    def directory(self) -> str:
        """Of its files, below the root that holds them: of one's own the root itself."""
        return "" if self.own else self.folder or self.name

    @property
    def submission_files(self) -> tuple[str, ...]:
        return self.submission or (f"{self.name}.tsv",)

    @property
    def selection_metric(self) -> str:
        """Logged name of the metric that selects the best checkpoint, for example ``dev_matched/accuracy``."""
        return f"{self.dev[0].name}/{self.metrics[0]}"

    @property
    def constant_answer(self) -> str:
        """What a model is compared with, in words: one answer for every example."""
        return "one score for all" if self.is_regression else "the majority class"

    def place(self, source: str) -> str:
        """Name of the task's experiment and registered model in MLflow, for data of ``data.source``."""
        if self.own:
            return self.name
        return f"glue-{self.name.lower()}" + ("-sample" if source == "sample" else "")

    def split(self, name: str) -> Split:
        for split in self.splits:
            if split.name == name:
                return split
        names = [split.name for split in self.splits]
        raise ConfigError(f"task {self.name} has no split {name!r}{suggest(name, names)}")


def _is_training(name: str) -> bool:
    return name == "train"


def _is_dev(name: str) -> bool:
    return name.startswith("dev")


def described_task(description: Mapping[str, Any]) -> Task:
    """The task that a resolved description says.

    Raises:
        ConfigError: something is missing in it, or not what it must be.
    """
    return _described(json.dumps(description, sort_keys=True))


@cache
def _described(text: str) -> Task:
    said = json.loads(text)
    try:
        return _make_task(said, "" if any("columns" in file for file in said["files"].values()) else text)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        found = f"{type(error).__name__} {error}"
        raise ConfigError(f"the description of task {str(said.get('name'))[:80]!r} is damaged: {found}") from None


def _make_task(said: dict[str, Any], recorded: str) -> Task:
    name, own = plain_name(said["name"], "the task's name"), _own_files(said) if recorded else None
    splits = {name: _make_split(name, file, said) for name, file in said["files"].items()}
    low, high = said.get("range") or (0.0, 1.0)
    test = tuple(split for split in splits.values() if not split.labelled)
    return Task(
        name,
        tuple(said.get("labels") or ()),
        tuple(said["metrics"]),
        splits.get("train"),
        tuple(split for split in splits.values() if _is_dev(split.name)),
        test,
        folder=said.get("folder", ""),
        submission=_prediction_files(name, test) if own else tuple(said.get("submission") or ()),
        label_scale=float(high - low) or 1.0,
        label_offset=float(low),
        bounded=said.get("bounded", True),
        multilabel=said.get("kind") == "multi-label",
        meanings=tuple(said.get("meanings") or ()),
        class_weights=tuple(said.get("class_weights") or ()),
        own=own,
        description=recorded,
    )


def without_folders(task: Task) -> Task:
    """The task as it travels with a model: of files of one's own the names alone."""
    if not task.own:
        return task
    said = json.loads(task.description)
    for file in said["files"].values():
        file["path"] = PurePath(file["path"]).name
    return described_task(said)


def _prediction_files(name: str, test: tuple[Split, ...]) -> tuple[str, ...]:
    """One for each test file: ``<task>.tsv``, of several ``<task>-<split>.tsv``."""
    return tuple(f"{name}-{split.name}.tsv" if len(test) > 1 else f"{name}.tsv" for split in test)


def _own_files(said: dict[str, Any]) -> OwnFiles:
    return OwnFiles(
        tuple(said["text"]),
        said["label"],
        said["index"],
        said["header"],
        said["separator"],
        said["quoting"] == "csv",
        said["label_separator"],
        said["dev_share"],
        said["dev_seed"],
    )


def _make_split(name: str, file: dict[str, Any], said: dict[str, Any]) -> Split:
    labelled = _is_training(name) or _is_dev(plain_name(name, "the split"))
    if "columns" not in file:
        part = name if said["dev_share"] and labelled else ""
        return Split(name, path=file["path"], format=file["format"], part=part, labelled=labelled)
    columns = tuple(file["columns"])
    label = said["label"] if labelled else None
    return Split(
        name,
        tuple(columns.index(text) for text in said["text"]),
        label if label in (None, _LAST_COLUMN) else columns.index(label),
        columns,
        file.get("header", True),
        labelled and said.get("drop_malformed", False),
        labelled=labelled,
    )


class _BuiltIn(Mapping[str, Task]):
    """The tasks of ``conf/task/``, by name; their files are read once one is asked for.

    A file whose name begins with ``_`` is of a task that is only predicted.
    """

    def __getitem__(self, name: str) -> Task:
        return _built_in()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(_built_in())

    def __len__(self) -> int:
        return len(_built_in())


@cache
def _built_in() -> dict[str, Task]:
    import yaml

    found: dict[str, Task] = {}
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    for stem in (*_trainable(), "_AX"):
        said = yaml.load((project.CONF / "task" / f"{stem}.yaml").read_text(encoding="utf-8"), loader)
        found[said["name"]] = described_task({"name": said["name"], **said["description"]})
    return found


def _trainable() -> tuple[str, ...]:
    """GLUE's in its order, then the others."""
    names = {path.stem for path in (project.CONF / "task").glob("[!_]*.yaml")}
    return (*(name for name in _FIRST if name in names), *sorted(names.difference(_FIRST)))


TASKS: Mapping[str, Task] = _BuiltIn()
TRAINABLE: tuple[str, ...] = _trainable()


def get_task(name: str) -> Task:
    """Look a built-in task up by its exact GLUE name; a near miss (``sst2``) is named in the error."""
    if name not in TASKS:
        raise ConfigError(f"unknown task {name!r}{suggest(name, TASKS)}")
    return TASKS[name]


def name_fault(label: str) -> str:
    """Why a text cannot be the name of a class, whatever the others are; empty if it can."""
    if not label:
        return "an empty label"
    if len(label) > _LONGEST_LABEL:
        return f"a label of {len(label)} characters"
    if fault := line_fault(label):
        return f"label {label!r} {fault}"
    return f"label {label!r} is a symbol of fairseq's dictionaries" if label in _FAIRSEQ else ""


def line_fault(text: str) -> str:
    """Why a text cannot be a field of a line; empty if it can."""
    if _CONTROL.search(text):
        return "has a line break, a tab or another control character"
    return "holds half a character" if half_a_character(text) else ""


def half_a_character(text: str) -> bool:
    """Whether a text has a surrogate, which JSON can write and UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def input_columns(task: Task) -> tuple[str, ...]:
    """The columns of a table of texts for the task, such as MLflow's pyfunc takes."""
    return ("text", "text_pair")[: task.num_texts]
