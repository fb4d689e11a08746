"""RoBERTa's published scores on the dev sets, single models of a single task.

From fairseq's examples/roberta/README.md and Liu et al. 2019 (arXiv 1907.11692, table 8): accuracy in per cent; CoLA:
Matthews correlation; STS-B: Pearson correlation. WNLI has none.
"""

from __future__ import annotations

from dataclasses import dataclass

_ORDER = ("MNLI", "QNLI", "QQP", "RTE", "SST-2", "MRPC", "CoLA", "STS-B")
_BASE = dict(zip(_ORDER, (87.6, 92.8, 91.9, 78.7, 94.8, 90.2, 63.6, 91.2), strict=True))
_LARGE = dict(zip(_ORDER, (90.2, 94.7, 92.2, 86.6, 96.4, 90.9, 68.0, 92.4), strict=True))
DEV_ROWS = dict(zip(_ORDER, (9815, 5463, 40430, 277, 872, 408, 1043, 1500), strict=True))  # of the official files
_LARGE_FROM_MNLI = {"RTE": 91.0, "MRPC": 91.4, "STS-B": 92.6}


@dataclass(frozen=True)
class Published:
    """Attributes: row: whose score it is. score: as a fraction of 1."""

    row: str
    score: float


def published(task: str, source: str, start: str | None, data: str) -> Published | None:
    """The published score of the same task and model; None where there is none, as for any other model.

    Args:
        source: ``model.source`` of the run.
        start: the task whose model the run started from; None: the pretrained model; empty: an unknown one.
        data: ``data.source`` of the run; generated data has no published score.
    """
    if data != "glue":
        return None
    name, rows = "", dict[str, float]()
    if source == "roberta.base" and start is None:
        name, rows = "RoBERTa base", _BASE
    elif source == "roberta.large" and start is None:
        name, rows = "RoBERTa large", _LARGE
    elif (source, start) in (("roberta.large", "MNLI"), ("roberta.large.mnli", None)):
        name, rows = "RoBERTa large from MNLI", _LARGE_FROM_MNLI
    return Published(name, round(rows[task] / 100, 6)) if task in rows else None
