"""Error analysis at the end of a training, from the dev outputs of its best weights, into the run's ``errors/``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_glue.errors import DataError
from lightning_glue.utils.files import new_file
from lightning_glue.utils.logs import log
from lightning_glue.utils.redact import first_line

if TYPE_CHECKING:
    from lightning_glue.config import Config
    from lightning_glue.data.datamodule import GlueDataModule
    from lightning_glue.data.tokenizer import Tokenizer
    from lightning_glue.inference.error_analysis import Rows
    from lightning_glue.model.roberta import RobertaModel
    from lightning_glue.tasks import Task
    from lightning_glue.training.callbacks import BestEvaluation
    from lightning_glue.training.module import Evaluation

ANALYSIS = "analysis.json"
_TABLE_ROWS = 200  # of the table that MLflow shows


def fitted_temperature(task: Task, best: BestEvaluation) -> float | None:
    """Of the dev split that selects; None for a regression, or where an output is no number."""
    from lightning_glue.inference.calibration import fit_temperature

    found = best.evaluations[task.dev[0].name]
    outputs, targets = found.outputs.double().numpy(), found.targets.numpy()
    if task.is_regression or not len(outputs) or not np.isfinite(outputs).all():
        return None
    return fit_temperature(outputs, targets, several=task.multilabel)


def _rows(config: Config, data: GlueDataModule, name: str, found: Evaluation) -> Rows:
    """A dev split's rows with their texts, which are read again.

    Raises:
        DataError: the file is not what was trained with.
    """
    from lightning_glue.data import sources
    from lightning_glue.data.own_rows import split_digest
    from lightning_glue.data.rows import read
    from lightning_glue.inference.error_analysis import Rows
    from lightning_glue.training.loss import example_losses

    task, split, info = data.task, data.task.split(name), data.prepared.splits[name]
    root = sources.glue_directory(task, config.data.source, config.data.glue_dir)
    rows = read(task, split, root, config.data.on_bad_row)
    if split_digest(task, split, rows.sha256) != info.sha256 or len(rows) != len(found.outputs):
        raise DataError(f"{rows.path} is no longer the file that was trained with")
    if not found.outputs.isfinite().all():
        raise DataError(f"{name}: an output is no number")
    loss = example_losses(task, found.outputs, found.targets, weighted=False).double().numpy()
    lengths, outputs, targets = data.splits[name].lengths, found.outputs.numpy(), found.targets.numpy()
    return Rows(task, rows.lines, rows.texts, lengths, outputs, targets, loss)


def write_errors(
    config: Config,
    model: RobertaModel,
    tokenizer: Tokenizer,
    data: GlueDataModule,
    best: BestEvaluation,
    folder: Path,
) -> dict[str, str]:
    """Write ``<split>.parquet``, the worst rows of each as ``<split>_worst.json`` and ``analysis.json``.

    Of a model of MNLI also Matthews' correlation for each phenomenon of ``diagnostic-full.tsv``, where that file is.

    Returns:
        Tags of the run, by which MLflow knows its tables.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq
    import torch

    from lightning_glue.inference.calibration import at_bound
    from lightning_glue.inference.error_analysis import analyse, table, worst
    from lightning_glue.training import metrics

    task, temperature = data.task, fitted_temperature(data.task, best)

    def metric(outputs: np.ndarray, targets: np.ndarray) -> float:
        return metrics.compute(task, torch.from_numpy(outputs), torch.from_numpy(targets))[task.metrics[0]]

    analysis: dict[str, Any] = {"task": task.name, "metric": task.metrics[0], "temperature": temperature}
    analysis |= {"at_bound": temperature is not None and at_bound(temperature), "splits": {}}
    tables: list[str] = []
    for name, found in best.evaluations.items():
        try:
            rows = _rows(config, data, name, found)
        except DataError as error:
            log.warning("no error analysis of %s: %s", name, first_line(error))
            continue
        columns = table(rows)
        with new_file(folder / f"{name}.parquet", "wb") as file:
            pq.write_table(pa.table(columns), file)
        with new_file(folder / f"{name}_worst.json") as file:
            json.dump({"columns": [*columns], "data": worst(rows, columns, _TABLE_ROWS)}, file)
        tables.append(f"{folder.name}/{name}_worst.json")
        analysis["splits"][name] = analyse(rows, metric, temperature)
    if task.name == "MNLI":
        analysis["phenomena"] = _phenomena(config, model, tokenizer, data)
    with new_file(folder / ANALYSIS) as file:
        json.dump(analysis, file, allow_nan=False)
    return {"mlflow.loggedArtifacts": json.dumps([{"path": path, "type": "table"} for path in tables])}


def _phenomena(config: Config, model: RobertaModel, tokenizer: Tokenizer, data: GlueDataModule) -> list[dict[str, Any]]:
    """Matthews' correlation of each phenomenon of AX, with its rows; none where the file with labels is not there."""
    import torch

    from lightning_glue.data import sources
    from lightning_glue.data.datamodule import TokenizedSplit, join_parts
    from lightning_glue.inference.diagnostic import read_diagnostic
    from lightning_glue.inference.predict import predict
    from lightning_glue.tasks import get_task
    from lightning_glue.training import metrics
    from lightning_glue.training.devices import resolve_devices

    accelerator = resolve_devices(config.trainer).accelerator
    try:
        root = sources.glue_directory(data.task, config.data.source, config.data.glue_dir)
        found = read_diagnostic(root)
    except DataError as error:
        log.warning("no phenomena of AX: %s", first_line(error))
        return []
    if found is None:
        return []
    tokens, lengths, _ = join_parts([tokenizer.encode(column) for column in found.texts], data.max_tokens)
    outputs = predict(model.to(accelerator), TokenizedSplit("phenomena", tokens, lengths, None), data.eval_tokens)
    labels, ax = torch.tensor(found.labels), get_task("AX")
    parts = {"all": list(range(len(labels)))} | found.phenomena
    return [
        {
            "phenomenon": name,
            "rows": len(rows),
            "matthews": metrics.compute(ax, outputs[rows], labels[rows])["matthews"],
        }
        for name, rows in parts.items()
    ]
