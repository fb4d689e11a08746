from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from helpers.project import torture

from lightning_glue.tasks import TASKS
from lightning_glue.training import figures
from lightning_glue.training.module import Evaluation


def evaluation(name: str, rows: int = 40) -> Evaluation:
    task, generator = TASKS[name], torch.Generator().manual_seed(0)
    outputs = torch.randn(rows, task.num_outputs, generator=generator)
    if task.is_regression:
        return Evaluation(outputs, torch.rand(rows, generator=generator))
    return Evaluation(outputs, torch.randint(0, task.num_outputs, (rows,), generator=generator))


_DIFFERENT = ("MNLI", "RTE", "STS-B")  # in what is drawn; the others are of two classes, as RTE is


@pytest.mark.parametrize("name", [name if name in _DIFFERENT else torture(name) for name in sorted({*TASKS} - {"AX"})])
def test_every_task_is_drawn(name: str, tmp_path: Path) -> None:
    task = TASKS[name]
    for split in task.dev:
        drawn = figures.evaluation_figures(task, split.name, evaluation(name))
        expected = {"scatter"} if task.is_regression else {"confusion_matrix", "precision_recall"}
        assert set(drawn) == {f"{split.name}_{kind}.png" for kind in expected}
        for file, figure in drawn.items():
            figure.savefig(tmp_path / file)
            assert (tmp_path / file).stat().st_size > 5000


def test_the_confusion_matrix_counts_true_rows_and_predicted_columns() -> None:
    outputs = torch.tensor([[2.0, 0, 0], [0, 2.0, 0], [0, 2.0, 0], [0, 0, 2.0]])
    figure = figures.confusion_matrix(TASKS["MNLI"], "dev_matched", Evaluation(outputs, torch.tensor([0, 0, 1, 2])))
    axes = figure.axes[0]
    numbers = {text.get_position(): text.get_text() for text in axes.texts}
    assert numbers[(1, 0)] == "1"  # predicted neutral, truly contradiction
    assert sum(int(text) for text in numbers.values()) == 4
    assert [label.get_text() for label in axes.get_xticklabels()] == list(TASKS["MNLI"].labels)


def test_precision_recall_is_of_class_one_in_binary_tasks() -> None:
    figure = figures.precision_recall(TASKS["MRPC"], "dev", evaluation("MRPC"))
    labels = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert [label.split()[0] for label in labels] == ["1"]


def test_average_precision_equals_scikit_learn() -> None:
    from sklearn.metrics import average_precision_score

    given = evaluation("MRPC")
    figure = figures.precision_recall(TASKS["MRPC"], "dev", given)
    label = figure.axes[0].get_legend().get_texts()[0].get_text()
    expected = average_precision_score(given.targets, given.outputs.softmax(-1)[:, 1])
    assert f"(AP {expected:.3f})" in label


def test_learning_curves_draw_what_was_logged() -> None:
    history = {"train/loss": [(10, 0.7), (20, 0.5)], "dev/loss": [(20, 0.6)], "dev/accuracy": [(20, 0.8)]}
    figure = figures.learning_curves(TASKS["RTE"], history)
    drawn = {line.get_label(): list(line.get_ydata()) for axes in figure.axes for line in axes.lines}
    assert drawn == {"train/loss": [0.7, 0.5], "dev/loss": [0.6], "dev/accuracy": [0.8]}


def draw(figures_by_name: dict, folder: Path) -> set[str]:
    for file, figure in figures_by_name.items():
        figure.savefig(folder / file)
    return {file.removeprefix("dev_").removesuffix(".png") for file in figures_by_name}


@pytest.mark.parametrize("name", ["CoLA", "RTE", "STS-B", "MNLI"])
@pytest.mark.parametrize("rows", [0, 1, 3])
@pytest.mark.filterwarnings("error")
def test_small_and_constant_splits_are_drawn(name: str, rows: int, tmp_path: Path) -> None:
    task = TASKS[name]
    plain, constant = evaluation(name, rows), torch.zeros(rows, task.num_outputs)
    for given in (plain, Evaluation(constant, plain.targets), Evaluation(plain.outputs, plain.targets * 0)):
        assert draw(figures.evaluation_figures(task, "dev", given), tmp_path) >= (
            {"scatter"} if task.is_regression else {"confusion_matrix"}
        )


def test_a_curve_without_true_examples_is_left_out() -> None:
    outputs, targets = torch.randn(5, 2), torch.zeros(5, dtype=torch.int64)
    assert figures.precision_recall(TASKS["CoLA"], "dev", Evaluation(outputs, targets)) is None
    figure = figures.precision_recall(TASKS["RTE"], "dev", Evaluation(outputs, targets))
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == ["entailment (AP 1.000)"]


@pytest.mark.parametrize("name", ["CoLA", "STS-B", "MNLI"])
@pytest.mark.filterwarnings("error")
def test_rows_without_a_prediction_are_said_and_not_drawn(name: str, tmp_path: Path) -> None:
    task, given = TASKS[name], evaluation(name, 6)
    given.outputs[2] = math.nan
    drawn = figures.evaluation_figures(task, "dev", given)
    assert draw(drawn, tmp_path) == ({"scatter"} if task.is_regression else {"confusion_matrix"})
    if not task.is_regression:
        figure = drawn["dev_confusion_matrix.png"]
        assert figure.get_suptitle() == f"{name} dev: confusion matrix without 1 rows of NaN"
        assert sum(int(text.get_text()) for text in figure.axes[0].texts) == 5


@pytest.mark.parametrize("rows", [1, 2, 7, 50])
def test_average_precision_of_ties_equals_scikit_learn(rows: int) -> None:
    from sklearn.metrics import average_precision_score

    generator = torch.Generator().manual_seed(rows)
    scores = torch.randint(0, 4, (rows,), generator=generator).double() / 4
    targets = torch.randint(0, 2, (rows,), generator=generator)
    targets[0] = 1
    given = Evaluation(torch.stack([-scores, scores], 1), targets)
    figure = figures.precision_recall(TASKS["CoLA"], "dev", given)
    expected = average_precision_score(targets, given.outputs.softmax(-1)[:, 1])
    assert f"(AP {expected:.3f})" in figure.axes[0].get_legend().get_texts()[0].get_text()
