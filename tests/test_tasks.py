"""The registry against fairseq's own script, the reference for columns."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

from lightning_glue.errors import UserError
from lightning_glue.tasks import TASKS, TRAINABLE, get_task


def script_columns() -> dict[str, dict[str, tuple[int, ...]]]:
    """Columns (1-based, as ``cut`` counts) in preprocess_GLUE_tasks.sh, by task."""
    script = Path(find_spec("fairseq").submodule_search_locations[0]) / "examples/roberta/preprocess_GLUE_tasks.sh"
    found: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, block in re.findall(r'"\$TASK" = "([\w-]+)" \]\n  then\n((?:    .*\n)+)', script.read_text()):
        values = re.findall(r"(\w+)=\(?([\d ]+)\)?", block)
        found.setdefault(name, {}).update({key: tuple(map(int, value.split())) for key, value in values})
    return found


@pytest.mark.parametrize("name", ["QQP", "MNLI", "QNLI", "MRPC", "RTE", "STS-B", "SST-2", "CoLA"])
def test_columns_are_those_of_the_fairseq_script(name: str) -> None:
    task, script = TASKS[name], script_columns()[name]
    assert tuple(column + 1 for column in task.train.text_columns) == script["INPUT_COLUMNS"]
    assert tuple(column + 1 for column in task.test[0].text_columns) == script["TEST_INPUT_COLUMNS"]
    if name == "MNLI":  # the script counts 12 columns in train and 16 in dev; the label is the last one of both
        assert (script["LABEL_COLUMN"], script["DEV_LABEL_COLUMN"]) == ((12,), (16,))
        assert {split.label_column for split in (task.train, *task.dev)} == {-1}
    else:
        assert (task.train.label_column + 1,) == script["LABEL_COLUMN"]


def test_nine_tasks_train_and_ax_is_only_predicted() -> None:
    assert set(TRAINABLE) == {"CoLA", "SST-2", "MRPC", "STS-B", "QQP", "MNLI", "QNLI", "RTE", "WNLI"}
    assert TASKS["AX"].labels == TASKS["MNLI"].labels
    assert [split.labelled for split in TASKS["AX"].splits] == [False]


def test_a_leaderboard_submission_has_eleven_files() -> None:
    names = [name for task in TASKS.values() for name in task.submission_files]
    assert sorted(names) == sorted(
        [
            "CoLA.tsv",
            "SST-2.tsv",
            "MRPC.tsv",
            "STS-B.tsv",
            "MNLI-m.tsv",
            "MNLI-mm.tsv",
            "QNLI.tsv",
            "QQP.tsv",
            "RTE.tsv",
            "WNLI.tsv",
            "AX.tsv",
        ]
    )


def test_selection_is_the_first_metric_on_the_first_dev_split() -> None:
    assert TASKS["MNLI"].selection_metric == "dev_matched/accuracy"
    assert TASKS["CoLA"].selection_metric == "dev/matthews"
    assert TASKS["STS-B"].selection_metric == "dev/pearson"


@pytest.mark.parametrize(("given", "nearest"), [("sst2", "SST-2"), ("rte", "RTE"), ("STSB", "STS-B")])
def test_an_unknown_task_names_the_nearest(given: str, nearest: str) -> None:
    with pytest.raises(UserError, match=f"did you mean '{nearest}'"):
        get_task(given)
