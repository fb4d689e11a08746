"""What the tracked runs came to, over their seeds: tables of those that can be compared."""

from __future__ import annotations

import html
import json
import statistics
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lightning_glue.errors import TrackingError, suggest
from lightning_glue.tasks import TRAINABLE, get_task
from lightning_glue.tracking import registry
from lightning_glue.tracking.pages import run_page
from lightning_glue.tracking.registry import difference
from lightning_glue.utils.redact import first_line

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

# Parameters that do not tell two recipes apart: the seed, and where and how fast a run was made.
_NOT_RECIPE = (
    "seed", "tracking.", "task.", "data.glue_dir", "data.bpe_dir", "data.eval_tokens", "trainer.gpus", "trainer.procs",
    "trainer.accumulate", "trainer.log_every", "trainer.predict", "trainer.checkpoint",
)  # fmt: skip
_USUAL = {"optimizer.lr": "lr", "data.batch_size": "batch"}
_PAGE = 1000  # runs a request asks for
_COLUMNS = ("model", "recipe", "metric", "median", "spread", "best", "runs", "device min", "best run")
_STYLE = "body{font:15px sans-serif;margin:2em}table{border-collapse:collapse}td,th{padding:.3em .8em;text-align:left}"
_STYLE += "tr:nth-child(even){background:#f2f4f7}th{border-bottom:2px solid #444}"


@dataclass(frozen=True)
class Scored:
    """A finished run. ``data`` maps a split to its digest; ``minutes`` is wall time times devices."""

    run_id: str
    link: str
    task: str
    params: dict[str, str]
    data: dict[str, str]
    score: float
    minutes: float


@dataclass(frozen=True)
class Section:
    """The comparable runs of one task, as a table; ``notes`` say what is not in it."""

    title: str
    rows: list[tuple[str, ...]]
    notes: list[str]


def fetch(client: MlflowClient, uri: str, experiment: str | None) -> list[Run]:
    """Every run of an experiment, or of all; a store that cannot be read raises :class:`UserError`."""
    from mlflow.exceptions import MlflowException

    try:
        found = {entry.name: entry.experiment_id for entry in client.search_experiments()}
        if experiment is not None and experiment not in found:
            raise TrackingError(f"no experiment {experiment!r} at {uri}{suggest(experiment, found)}")
        ids = [found[experiment]] if experiment is not None else list(found.values())
        runs: list[Run] = []
        token: str | None = ""
        while token is not None:
            page = client.search_runs(ids, max_results=_PAGE, page_token=token or None)
            runs, token = runs + list(page), page.token or None
        return runs
    except (MlflowException, OSError) as error:
        raise TrackingError(f"MLflow at {uri} cannot be read: {first_line(error)}") from None


def scored_run(run: Run, uri: str) -> Scored | None:
    """The run's selection metric and cost; None for a run without one, or of another program."""
    params, info = run.data.params, run.info
    if params.get("task.name") not in TRAINABLE or "model.name" not in params:
        return None
    value = run.data.metrics.get(f"best/{get_task(params['task.name']).selection_metric}")
    if value is None or info.end_time is None:
        return None
    numbers = [params.get(name, "1") for name in ("trainer.gpus", "trainer.procs")]
    devices = max([1, *(int(number) for number in numbers if number.isdecimal())])
    link = run_page(uri, info.experiment_id, info.run_id) if uri.startswith("http") else ""
    minutes = (info.end_time - info.start_time) / 60000 * devices
    return Scored(info.run_id, link, params["task.name"], dict(params), registry.dataset_digests(run), value, minutes)


def recipe_key(run: Scored) -> tuple[tuple[str, str], ...]:
    return tuple(sorted((key, value) for key, value in run.params.items() if not key.startswith(_NOT_RECIPE)))


def recipe_names(keys: list[tuple[tuple[str, str], ...]]) -> list[str]:
    """Each recipe in words: learning rate, batch, length, and whatever else differs between recipes."""
    values = defaultdict(set)
    for key in keys:
        for name, value in key:
            values[name].add(value)
    told = {"optimizer.lr", "data.batch_size", "trainer.max_epochs", "trainer.max_steps"}
    other = [name for name in sorted(values.keys() - told) if len(values[name]) > 1 and not name.startswith("model.")]
    return [_in_words(dict(key), other) for key in keys]


def _in_words(params: dict[str, str], other: list[str]) -> str:
    """A recipe; the steps that end it stand in place of the epochs that they cut short."""
    words = [f"{short} {params[name]}" for name, short in _USUAL.items() if name in params]
    steps, epochs = params.get("trainer.max_steps", "-1"), params.get("trainer.max_epochs")
    if steps != "-1":
        words.append(f"{steps} steps")
    elif epochs is not None:
        words.append(f"{epochs} epochs" if epochs != "1" else "1 epoch")
    return ", ".join([*words, *(f"{name} {params[name]}" for name in other if name in params)])


def scored_splits(run: Scored) -> dict[str, str]:
    """Digests of what a score depends on: training and dev data."""
    return {name: digest for name, digest in run.data.items() if name == "train" or name.startswith("dev")}


def tabulate(runs: list[Scored]) -> list[tuple[str, ...]]:
    """A row per recipe of comparable runs, the best median first."""
    groups: dict[tuple[tuple[str, str], ...], list[Scored]] = defaultdict(list)
    for run in runs:
        groups[recipe_key(run)].append(run)
    ordered = sorted(groups, key=lambda key: -statistics.median(run.score for run in groups[key]))
    rows: list[tuple[str, ...]] = []
    for key, recipe in zip(ordered, recipe_names(ordered)):
        members = groups[key]
        scores, best = [run.score for run in members], max(members, key=lambda run: run.score)
        spread = f"{min(scores):.4f} to {max(scores):.4f}" if len(scores) > 1 else "-"
        numbers = (f"{statistics.median(scores):.4f}", spread, f"{best.score:.4f}")
        cost = f"{sum(run.minutes for run in members):.1f}"
        metric = get_task(best.task).selection_metric
        reference = best.link or best.run_id
        rows.append((best.params["model.name"], recipe, metric, *numbers, str(len(members)), cost, reference))
    return rows


def compare(runs: list[Run], uri: str, *, task: str | None, trials: bool) -> list[Section]:
    """A section per task and data: scores on different data are never in one table."""
    chosen = [run for run in runs if trials or "mlflow.parentRunId" not in run.data.tags]
    chosen = [run for run in chosen if "tune.trials" not in run.data.params]  # a study; its trials are trainings
    by_task: dict[str, list[Run]] = defaultdict(list)
    for run in chosen:
        name = run.data.params.get("task.name")
        if name in TRAINABLE and name == (task or name):  # others are of another program
            by_task[name].append(run)
    sections = []
    for name, members in sorted(by_task.items()):
        finished = [run for run in members if run.info.status == "FINISHED"]
        left_out = Counter(run.info.status for run in members if run.info.status != "FINISHED")
        notes = [f"{count} {status} not scored" for status, count in sorted(left_out.items())]
        datasets: dict[str, list[Scored]] = defaultdict(list)
        for found in filter(None, (scored_run(run, uri) for run in finished)):
            datasets[json.dumps(scored_splits(found), sort_keys=True)].append(found)
        if not datasets:
            sections.append(Section(name, [], notes or ["no finished run"]))
        first = next(iter(datasets), "")
        for number, (digests, scored) in enumerate(datasets.items(), 1):
            apart = "" if digests == first else difference(json.loads(first), json.loads(digests))
            more = [f"not comparable with {name}, data 1: {apart}"] if apart else notes
            title = name if len(datasets) == 1 else f"{name}, data {number}"
            title += " (generated sample)" if scored[0].params.get("data.source") == "sample" else ""
            sections.append(Section(title, tabulate(scored), more))
    return sections


def markdown(sections: list[Section]) -> str:
    lines = ["# Runs", "", "Median over seeds of the metric that selects the checkpoint; spread is minimum to maximum."]
    for section in sections:
        lines += ["", f"## {section.title}", ""]
        if section.rows:
            lines += [f"| {' | '.join(_COLUMNS)} |", "|" + "---|" * len(_COLUMNS)]
            lines += [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in section.rows]
        lines += ["", *(f"- {note}" for note in section.notes)] if section.notes else []
    return "\n".join(lines) + "\n"


def page(sections: list[Section]) -> str:
    """One HTML page that needs nothing else."""
    parts = [f"<!doctype html><meta charset=utf-8><title>Runs</title><style>{_STYLE}</style><h1>Runs</h1>"]
    for section in sections:
        parts.append(f"<h2>{html.escape(section.title)}</h2>")
        if section.rows:
            parts.append("<table><tr>" + "".join(f"<th>{column}</th>" for column in _COLUMNS) + "</tr>")
            parts += ["<tr>" + "".join(f"<td>{_cell(cell)}</td>" for cell in row) + "</tr>" for row in section.rows]
            parts.append("</table>")
        parts += [f"<p>{html.escape(note)}</p>" for note in section.notes]
    return "\n".join(parts) + "\n"


def _cell(text: str) -> str:
    safe = html.escape(text)
    return f'<a href="{safe}">{html.escape(text.rpartition("/")[2])}</a>' if text.startswith("http") else safe


def show(sections: list[Section]) -> None:
    """Tables on a terminal, Markdown where the output goes elsewhere."""
    if not sys.stdout.isatty():
        print(markdown(sections), end="")
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    for section in sections:
        table = Table(*_COLUMNS, title=escape(section.title), title_justify="left")
        for row in section.rows:
            table.add_row(*map(escape, row))
        if section.rows:
            console.print(table)
        for note in section.notes:
            console.print(escape(f"{section.title}: {note}"))
