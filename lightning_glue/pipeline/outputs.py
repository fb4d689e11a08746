"""What a fine-tuned model says of every row of a split, on the disk: ``outputs/<TASK>/seed-<k>/<split>.npz``."""

from __future__ import annotations

import zipfile
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_glue.errors import DataError
from lightning_glue.tasks import Task, get_task
from lightning_glue.utils.files import make_folder, new_file
from lightning_glue.utils.logs import log
from lightning_glue.utils.redact import first_line

if TYPE_CHECKING:
    from lightning_glue.config import Config
    from lightning_glue.data.datamodule import GlueDataModule
    from lightning_glue.inference.finetuned import FineTuned
    from lightning_glue.model.roberta import RobertaModel


@dataclass(frozen=True)
class Outputs:
    """A model's outputs for a split, in the order of its rows.

    Attributes:
        outputs: float32 (rows, classes) logits, classes as in ``Task.labels``; regression: (rows, 1), of the scaled
            target.
        targets: (rows,) int64 label ids, or float32 label / scale; None where the split is unlabelled.
        index: the file's index column, row by row, where the split is unlabelled.
    """

    task: str
    split: str
    outputs: np.ndarray
    targets: np.ndarray | None
    index: list[str] | None

    def __len__(self) -> int:
        return len(self.outputs)


def predict_run(run: str, uri: str | None, out: Path) -> dict[str, float]:
    """Write what a run's exported model says of every dev and test split that is there, one npz each.

    It computes with the settings of the run, as ``python -m lightning_glue.evaluate`` does, on one device of this
    process. A model of MNLI also predicts AX, where its file is to be had, into AX's folder beside that of MNLI.

    Args:
        run: MLflow run id, or an exported directory.
        uri: of the tracking store; None: MLFLOW_TRACKING_URI, else MLflow's default.
        out: ``<benchmark>/outputs/<TASK>/<seed-k>``; made if need be.

    Returns:
        The dev scores by name, for example ``dev/accuracy`` and ``dev/loss``.

    Raises:
        UserError: there is no such model, or it cannot be evaluated.
    """
    from lightning_glue.training import evaluation

    config = store_config(uri)
    loaded = evaluation.load(run, config, set(), None)
    if loaded.note:
        log.warning("run %s: %s", run, loaded.note)
    scores: dict[str, float] = {}
    for setting, data in data_of(loaded.fine_tuned, config):
        scores |= write_predicted(loaded.fine_tuned, setting, data, out)
        for file in evaluation.other_files(data, loaded.fine_tuned.settings):
            log.warning("run %s: %s is not the file that the run was scored on", run, file)
    return scores


def store_config(uri: str | None) -> Config:
    """The configuration that a model's own settings are put into: this process' devices, and a tracking store."""
    from lightning_glue.config import compose, quote

    return compose([f"tracking.uri={quote(uri)}"] if uri else [])


def data_of(fine_tuned: FineTuned, config: Config) -> Iterator[tuple[Config, GlueDataModule]]:
    """The data that a model scores and predicts: of its own task and, a model of MNLI, of AX; with its settings.

    Raises:
        UserError: there are no files of its own task.
    """
    from lightning_glue.data import reader, sources
    from lightning_glue.training import evaluation

    own = fine_tuned.task
    for task in (own, get_task("AX")) if own.name == "MNLI" else (own,):
        setting, _ = evaluation.with_own_settings(config, task, fine_tuned.settings, set())
        try:
            root = sources.glue_directory(task, setting.data.source, setting.data.glue_dir)
        except DataError as error:
            if task is own:
                raise
            log.warning("%s is not predicted: %s", task.name, error)
            continue
        there = [any(reader.has_split(task, split, root) for split in splits) for splits in (task.dev, task.test)]
        if task is not own and not there[1]:
            log.warning("%s is not predicted: no %s in %s", task.name, task.test[0].file_name, root / task.directory)
            continue
        data = evaluation.make_data(setting, task, fine_tuned, scores=there[0] or not there[1], predicts=there[1])
        data.setup("predict")
        yield setting, data


def predicted(model: RobertaModel, config: Config, data: GlueDataModule, *, dev: bool = False) -> Iterator[Outputs]:
    """What a model says of the splits in ``data``, on its device and with its precision.

    Args:
        dev: of the dev splits alone.
    """
    from lightning_glue.inference.predict import predict
    from lightning_glue.inference.submission import read_indices
    from lightning_glue.training.devices import resolve_devices, resolve_precision

    accelerator, task = resolve_devices(config.trainer).accelerator, data.task
    precision = resolve_precision(config.trainer, accelerator)
    indices = {} if dev else read_indices(task, data.prepared)
    model.to(accelerator)
    for split in task.dev if dev else task.dev + task.test:
        if split.name in data.splits:
            found = data.splits[split.name]
            outputs = predict(model, found, data.eval_tokens, precision).numpy()
            yield Outputs(task.name, split.name, outputs, found.targets, indices.get(split.name))


def write_predicted(fine_tuned: FineTuned, config: Config, data: GlueDataModule, out: Path) -> dict[str, float]:
    """Write what a model says of ``data``: of its own task into ``out``, of AX beside that; the dev scores by name."""
    folder = out if data.task is fine_tuned.task else out.parents[1] / data.task.name / out.name
    scores: dict[str, float] = {}
    for found in predicted(fine_tuned.model, config, data):
        write_outputs(found, folder)
        scores |= score(found)
    return scores


def score(outputs: Outputs) -> dict[str, float]:
    """The metrics and the mean loss of a labelled split, by name (``dev/accuracy``); nothing of an unlabelled one.

    They are rounded to float32, as Lightning rounds what a run logs, so that both are equal.
    """
    import torch

    from lightning_glue.model.roberta import task_loss
    from lightning_glue.training import metrics

    if outputs.targets is None:
        return {}
    values, targets = torch.from_numpy(outputs.outputs), torch.from_numpy(outputs.targets)
    found = metrics.compute(get_task(outputs.task), values, targets)
    found["loss"] = metrics.mean_loss(task_loss(values, targets))
    return {f"{outputs.split}/{name}": float(np.float32(value)) for name, value in found.items()}


def write_outputs(outputs: Outputs, folder: Path) -> Path:
    """Write ``<split>.npz`` into a folder, which is made if need be; an older one is replaced, whole."""
    make_folder(folder, "outputs")
    path = folder / f"{outputs.split}.npz"
    arrays: dict[str, Any] = {"outputs": outputs.outputs}
    if outputs.targets is not None:
        arrays["targets"] = outputs.targets
    if outputs.index is not None:
        arrays["index"] = np.array(outputs.index, dtype=np.str_)
    with new_file(path, "wb") as file:
        np.savez(file, **arrays)
    return path


def read_outputs(folder: Path, splits: Collection[str] | None = None) -> dict[str, Outputs]:
    """The outputs in ``outputs/<TASK>/<seed-k>``, by split; none where there is no such folder.

    Args:
        splits: names of those to read; None: all that are there.

    Raises:
        DataError: a file that is none of ours, or not whole; names it.
    """
    task = get_task(folder.parent.name)
    paths = [(split.name, folder / f"{split.name}.npz") for split in task.dev + task.test
             if splits is None or split.name in splits]  # fmt: skip
    return {name: _read(task, name, path) for name, path in paths if path.is_file()}


def _read(task: Task, split: str, path: Path) -> Outputs:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            outputs, targets, index = (arrays.get(name) for name in ("outputs", "targets", "index"))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} cannot be read ({first_line(error)}); delete it, it is predicted again") from None
    kind = np.float32 if task.is_regression else np.int64
    rows = -1 if outputs is None else len(outputs)
    labelled = task.split(split).labelled
    if (
        outputs is None
        or (outputs.dtype, outputs.shape) != (np.float32, (rows, task.num_outputs))
        or (labelled and (targets is None or (targets.dtype, targets.shape) != (kind, (rows,))))
        or (not labelled and (index is None or (index.dtype.kind, index.shape) != ("U", (rows,))))
    ):
        raise DataError(f"{path} holds no outputs of {task.name}'s {split}; delete it, it is predicted again")
    return Outputs(task.name, split, outputs, targets if labelled else None, None if labelled else index.tolist())
