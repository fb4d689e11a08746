from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lightning_glue import figures
from lightning_glue.module import Evaluation
from lightning_glue.tasks import TASKS


def evaluation(name: str, rows: int = 40) -> Evaluation:
    task, generator = TASKS[name], torch.Generator().manual_seed(0)
    outputs = torch.randn(rows, task.num_outputs, generator=generator)
    if task.is_regression:
        return Evaluation(outputs, torch.rand(rows, generator=generator))
    return Evaluation(outputs, torch.randint(0, task.num_outputs, (rows,), generator=generator))


@pytest.mark.parametrize("name", sorted(set(TASKS) - {"AX"}))
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
