"""The GLUE tasks: files, columns, labels and metrics (Wang et al. 2019, https://gluebenchmark.com/tasks).

Everything the project knows about a task stands here once. Label ids are positions in ``Task.labels``: fixed, never
derived from label frequency as ``fairseq-preprocess`` does.
"""

from __future__ import annotations

from dataclasses import dataclass

from lightning_glue.errors import ConfigError, suggest


@dataclass(frozen=True)
class Split:
    """One file of a task, ``<GLUE_DIR>/<task folder>/<name>.tsv``, and where its fields are (0-based columns)."""

    name: str
    text_columns: tuple[int, ...]
    label_column: int | None = None  # None: unlabelled; -1: the last column
    columns: tuple[str, ...] = ()  # their names in the official file
    header: bool = True  # line 1 holds these names; a file without a header has just these columns
    drop_malformed: bool = False  # drop rows with a wrong number of fields, as fairseq's awk does for QQP

    @property
    def file_name(self) -> str:
        return f"{self.name}.tsv"

    @property
    def labelled(self) -> bool:
        return self.label_column is not None

    @property
    def index_column(self) -> int | None:
        """Where an unlabelled file has the index that the leaderboard wants back with each prediction."""
        return None if self.labelled else 0


@dataclass(frozen=True)
class Task:
    """A GLUE task. ``metrics[0]`` on ``dev[0]`` selects the best checkpoint."""

    name: str
    labels: tuple[str, ...]  # empty: regression
    metrics: tuple[str, ...]
    train: Split | None
    dev: tuple[Split, ...]
    test: tuple[Split, ...]
    folder: str = ""  # folder below GLUE_DIR; empty: the task's name
    submission: tuple[str, ...] = ()  # leaderboard file per test split; empty: <name>.tsv
    label_scale: float = 1.0  # regression targets are label / label_scale
    multilabel: bool = False  # each example has any number of labels, also none

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
    def meanings(self) -> tuple[str, ...]:
        """What each of ``labels`` says, where it is a number; empty where labels speak for themselves."""
        return _MEANINGS.get(self.name, ())

    @property
    def num_outputs(self) -> int:
        return len(self.labels) or 1

    @property
    def splits(self) -> tuple[Split, ...]:
        return ((self.train,) if self.train else ()) + self.dev + self.test

    @property
    def num_texts(self) -> int:
        return len(self.splits[0].text_columns)

    @property
    def directory(self) -> str:
        return self.folder or self.name

    @property
    def submission_files(self) -> tuple[str, ...]:
        return self.submission or (f"{self.name}.tsv",)

    @property
    def selection_metric(self) -> str:
        """Logged name of the metric that selects the best checkpoint, for example ``dev_matched/accuracy``."""
        return f"{self.dev[0].name}/{self.metrics[0]}"

    def place(self, source: str) -> str:
        """Name of the task's experiment and registered model in MLflow, for data of ``data.source``."""
        return f"glue-{self.name.lower()}" + ("-sample" if source == "sample" else "")

    def split(self, name: str) -> Split:
        for split in self.splits:
            if split.name == name:
                return split
        names = [split.name for split in self.splits]
        raise ConfigError(f"task {self.name} has no split {name!r}{suggest(name, names)}")


def _plain(
    name: str,
    text: tuple[int, ...],
    label: int,
    labels: tuple[str, ...],
    metrics: tuple[str, ...],
    columns: str,
    test_columns: str,
    test_text: tuple[int, ...] | None = None,
    *,
    header: bool = True,
    drop_malformed: bool = False,
    label_scale: float = 1.0,
) -> Task:
    """A task with the usual three files train.tsv, dev.tsv and test.tsv; names of columns are divided by commas."""
    names = tuple(columns.split(","))
    train, dev = (Split(split, text, label, names, header, drop_malformed) for split in ("train", "dev"))
    test = Split("test", test_text or text, columns=tuple(test_columns.split(",")))
    return Task(name, labels, metrics, train, (dev,), (test,), label_scale=label_scale)


_BINARY = ("0", "1")
_MEANINGS = {
    "CoLA": ("unacceptable", "acceptable"),
    "SST-2": ("negative", "positive"),
    "MRPC": ("no paraphrase", "paraphrase"),
    "QQP": ("other question", "same question"),
    "WNLI": ("not entailed", "entailed"),
}
_ENTAILMENT = ("entailment", "not_entailment")
_NLI = ("contradiction", "neutral", "entailment")  # the order of fairseq's roberta.large.mnli head
_PAIR = "index,sentence1,sentence2"
_STSB = "index,genre,filename,year,old_index,source1,source2,sentence1,sentence2"
_MNLI = ("index", "promptID", "pairID", "genre", "sentence1_binary_parse", "sentence2_binary_parse",
         "sentence1_parse", "sentence2_parse", "sentence1", "sentence2")  # fmt: skip
_MNLI_DEV = (*_MNLI, "label1", "label2", "label3", "label4", "label5", "gold_label")
_MRPC = "#1 ID,#2 ID,#1 String,#2 String"
_QQP = "id,qid1,qid2,question1,question2,is_duplicate"

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        _plain("CoLA", (3,), 1, _BINARY, ("matthews",), "source,label,mark,sentence", "index,sentence", (1,),
               header=False),
        _plain("SST-2", (0,), 1, _BINARY, ("accuracy",), "sentence,label", "index,sentence", (1,)),
        _plain("MRPC", (3, 4), 0, _BINARY, ("accuracy", "f1"), f"Quality,{_MRPC}", f"index,{_MRPC}"),
        _plain("STS-B", (7, 8), 9, (), ("pearson", "spearman"), f"{_STSB},score", _STSB, label_scale=5.0),
        _plain("QQP", (3, 4), 5, _BINARY, ("accuracy", "f1"), _QQP, "id,question1,question2", (1, 2),
               drop_malformed=True),
        Task(
            "MNLI",
            _NLI,
            ("accuracy",),
            Split("train", (8, 9), -1, (*_MNLI, "label1", "gold_label")),
            (Split("dev_matched", (8, 9), -1, _MNLI_DEV), Split("dev_mismatched", (8, 9), -1, _MNLI_DEV)),
            (Split("test_matched", (8, 9), columns=_MNLI), Split("test_mismatched", (8, 9), columns=_MNLI)),
            submission=("MNLI-m.tsv", "MNLI-mm.tsv"),
        ),
        _plain("QNLI", (1, 2), 3, _ENTAILMENT, ("accuracy",), "index,question,sentence,label",
               "index,question,sentence"),
        _plain("RTE", (1, 2), 3, _ENTAILMENT, ("accuracy",), f"{_PAIR},label", _PAIR),
        _plain("WNLI", (1, 2), 3, _BINARY, ("accuracy",), f"{_PAIR},label", _PAIR),
        # Inputs only: predicted by a model trained on MNLI, scored on the leaderboard.
        Task("AX", _NLI, ("matthews",), None, (), (Split("diagnostic", (1, 2), columns=tuple(_PAIR.split(","))),),
             folder="diagnostic"),
    )
}  # fmt: skip

TRAINABLE: tuple[str, ...] = tuple(name for name, task in TASKS.items() if task.train)


def get_task(name: str) -> Task:
    """Look a task up by its exact GLUE name; a near miss (``sst2``) is named in the error."""
    if name not in TASKS:
        raise ConfigError(f"unknown task {name!r}{suggest(name, TASKS)}")
    return TASKS[name]


def input_columns(task: Task) -> tuple[str, ...]:
    """The columns of a table of texts for the task, such as MLflow's pyfunc takes."""
    return ("text", "text_pair")[: task.num_texts]
