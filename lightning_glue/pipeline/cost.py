"""What a training costs and what it weighs, estimated before there is one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning_glue.tasks import get_task

_SAMPLE = 1 << 18  # bytes of a file that are looked at
_LETTERS = 4.5  # of English text to a token, blank included
_PARAMETERS = {  # of the encoders that conf/model/ names
    "minilm": 22_700_000, "roberta.base": 125_000_000, "roberta.large": 355_000_000, "roberta.large.mnli": 355_000_000,
}  # fmt: skip
_UNKNOWN = 125_000_000


def training_cost(config: dict[str, Any], root: Path) -> float:
    """Floating-point operations of a training in units of 1e15: 6 x parameters x tokens (Kaplan et al. 2020).

    Tokens are rows x mean length x epochs: rows and length follow from the size of ``train.tsv`` and its first lines.

    Args:
        config: the training's, by dotted keys.
        root: folder that has the task's folder, as :func:`lightning_glue.data.sources.glue_directory` finds it.
    """
    rows, length = rows_and_length(config["task.name"], root)
    seen = rows * config["trainer.max_epochs"]
    if config["trainer.max_steps"] > 0:
        seen = min(seen, config["trainer.max_steps"] * config["data.batch_size"])
    return 6 * parameters(config) * seen * min(length, config["data.max_tokens"]) / 1e15


def rows_and_length(task_name: str, root: Path) -> tuple[float, float]:
    """Rows of a task's training file, and their mean length in tokens, both estimated."""
    task = get_task(task_name)
    assert task.train
    path = root / task.directory / task.train.file_name
    with open(path, "rb") as file:
        lines = file.read(_SAMPLE).split(b"\n")[int(task.train.header) : -1] or [b""]
    fields = [line.split(b"\t") for line in lines]
    texts = [sum(len(row[i]) for i in task.train.text_columns if i < len(row)) for row in fields]
    rows = path.stat().st_size / max(1.0, sum(len(line) + 1 for line in lines) / len(lines))
    return rows, 2 + sum(texts) / len(texts) / _LETTERS


def parameters(config: dict[str, Any]) -> int:
    """Of the model: known by its name, from its architecture, or from the size of its file."""
    source, shape = config["model.source"], config["model.architecture"]
    if source in _PARAMETERS:
        return _PARAMETERS[source]
    if source == "random" and shape:
        layers, width = shape.get("encoder_layers", 12), shape.get("encoder_embed_dim", 768)
        inner = shape.get("encoder_ffn_embed_dim", 3072)
        return layers * (4 * width * width + 2 * width * inner) + 51_000 * width
    path = Path(str(source)).expanduser()
    files = [path] if path.is_file() else [*path.glob("*.pt")] if path.is_dir() else []
    return max((one.stat().st_size // 4 for one in files), default=_UNKNOWN)
