"""The error analysis of a run as one HTML page that needs nothing else."""

from __future__ import annotations

import html
import json
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_glue.errors import TrackingError
from lightning_glue.tracking.report_text import PAGE_STYLE
from lightning_glue.utils.paths import local_folder
from lightning_glue.utils.redact import first_line

if TYPE_CHECKING:
    from mlflow import MlflowClient

_FILE = "errors/analysis.json"  # of a run's artifacts, see lightning_glue.training.errors
_SIZE = 260  # of a diagram
_STYLE = """
td.text{white-space:normal;min-width:16em;max-width:40em;overflow-wrap:anywhere}td.number,th.number{text-align:right}
svg text{font:11px system-ui,sans-serif;fill:var(--dim)}.diagrams{display:flex;gap:3em;flex-wrap:wrap}
.bar{fill:var(--seed);opacity:.75}.axis{stroke:var(--line);fill:none}.even{stroke:var(--dim);stroke-dasharray:4 3}
"""


def fetch_analysis(client: MlflowClient, run_id: str) -> dict[str, Any]:
    """What a run's ``errors/analysis.json`` holds.

    Raises:
        TrackingError: there is no such run, or it has none.
    """
    from mlflow.exceptions import MlflowException

    try:
        store = local_folder(client.get_run(run_id).info.artifact_uri)
        if store and (store / _FILE).is_file():
            return json.loads((store / _FILE).read_text(encoding="utf-8"))
        with tempfile.TemporaryDirectory(prefix="lightning-glue-") as folder:
            return json.loads(Path(client.download_artifacts(run_id, _FILE, folder)).read_text(encoding="utf-8"))
    except (MlflowException, OSError, ValueError) as error:
        raise TrackingError(
            f"run {run_id}: no {_FILE} to be had ({first_line(error)}); finished trainings have it, unless they were "
            "made with tracking.errors=false or tracking.checkpoints=false"
        ) from None


def error_page(analysis: dict[str, Any], run_id: str) -> str:
    """The page. Whatever comes from data or the run is escaped."""
    title = html.escape(f"Errors of {analysis['task']}, run {run_id}")
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{title}</title><style>{PAGE_STYLE}{_STYLE}</style></head><body><h1>{title}</h1>"
    ]
    for name, split in analysis["splits"].items():
        parts += _split(name, split, str(analysis["metric"]), analysis["temperature"], analysis.get("at_bound"))
    if found := analysis.get("phenomena"):
        rows = [[one["phenomenon"], one["rows"], _number(one["matthews"])] for one in found]
        parts += ["<h2>AX by phenomenon</h2>", _table(["phenomenon", "rows", "matthews"], rows)]
    return "\n".join([*parts, "</body></html>"]) + "\n"


def _split(name: str, split: dict[str, Any], metric: str, temperature: float | None, at_bound: object) -> Iterable[str]:
    yield f"<h2>{html.escape(name)}</h2><h3>Slices</h3>"
    right = "mean absolute error" if temperature is None else "right"
    yield _table(
        ["slice", "rows", right, metric, "loss"],
        [[one["slice"], one["rows"], *(_number(one[key]) for key in ("right", "metric", "loss"))]
         for one in split["slices"]],
    )  # fmt: skip
    if temperature is not None:
        bound = ", the bound of what is looked for: the model knows nothing, or all" if at_bound else ""
        yield "<h3>Calibration</h3>"
        yield (
            f'<p class="note">The temperature fitted on the dev set is {temperature:.3f}{bound}; predictions use it '
            "where they are asked to (<code>--calibrated</code>). A bar is the share of right predictions among those "
            "with such a probability.</p>"
        )
        plain, fitted = split["calibration"], split["calibrated"]
        yield '<div class="diagrams">'
        yield _diagram(f"as it is: ECE {plain['ece']:.4f}", plain["bins"])
        yield _diagram(f"with the temperature: ECE {fitted['ece']:.4f}", fitted["bins"]) + "</div>"
    columns = split["columns"]
    if split["confident"]:
        yield f"<h3>Confident and wrong: {len(split['confident'])}</h3>"
        yield _table(columns, split["confident"])
    yield f"<h3>The worst {len(split['worst'])} by loss</h3>"
    yield _table(columns, split["worst"])


def _number(value: float) -> str:
    return f"{value:.4f}"


def _table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    kinds = ["text" if name.startswith("text") else "" for name in columns]
    head = "".join(f"<th>{html.escape(name)}</th>" for name in columns)
    body = "\n".join(
        "<tr>" + "".join(f'<td class="{kind}">{_shown(value)}</td>' for kind, value in zip(kinds, row)) + "</tr>"
        for row in rows
    )
    return f'<div class="wide"><table><tr>{head}</tr>\n{body}</table></div>'


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return _number(value)
    return html.escape(", ".join(map(str, value)) if isinstance(value, list) else str(value))


def _diagram(title: str, bins: Sequence[dict[str, Any]]) -> str:
    """Reliability: a bar for each bin of confidence, as high as the share of right ones in it."""
    width, margin = _SIZE / len(bins), 34
    bars = [
        f'<rect class="bar" x="{margin + i * width + 1:.1f}" y="{_SIZE * (1 - one["right"]) + 20:.1f}" '
        f'width="{width - 2:.1f}" height="{_SIZE * one["right"]:.1f}"><title>{one["rows"]} rows, confidence '
        f"{one['confidence']:.3f}, right {one['right']:.3f}</title></rect>"
        for i, one in enumerate(bins)
        if one["rows"]
    ]
    marks = [
        f'<text x="{margin + _SIZE * share:.0f}" y="{_SIZE + 34}" text-anchor="middle">{share:g}</text>'
        f'<text x="{margin - 6}" y="{_SIZE * (1 - share) + 24:.0f}" text-anchor="end">{share:g}</text>'
        for share in (0, 0.5, 1)
    ]
    frame = f'<rect class="axis" x="{margin}" y="20" width="{_SIZE}" height="{_SIZE}"/>'
    even = f'<line class="even" x1="{margin}" y1="{_SIZE + 20}" x2="{margin + _SIZE}" y2="20"/>'
    names = (
        f'<text x="{margin + _SIZE / 2}" y="{_SIZE + 50}" text-anchor="middle">probability of what is predicted</text>'
        f'<text x="{margin}" y="12">{html.escape(title)}</text>'
    )
    return f'<svg width="{_SIZE + 60}" height="{_SIZE + 60}">{frame}{"".join([*bars, even, *marks, names])}</svg>'
