"""A report as Markdown, as one HTML page that needs nothing else, and on a terminal."""

from __future__ import annotations

import html
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lightning_glue.tracking import seed_noise
from lightning_glue.tracking.comparison import Group, Section, Table
from lightning_glue.tracking.seed_plot import STYLE, key, seed_plot
from lightning_glue.utils.files import new_file

_INTRODUCTION = "Median over seeds of the metric that selects the checkpoint; spread is minimum to maximum."
PAGE_STYLE = """
:root{color-scheme:light dark;--text:#1c2530;--dim:#5b6774;--back:#fff;--band:#f2f5f8;--line:#c3ccd6;--link:#0b5cad;
--seed:#2f7fd1;--published:#c2410c;--ensemble:#7c3aed;--soup:#15803d}
@media (prefers-color-scheme:dark){:root{--text:#e4e9ef;--dim:#9aa7b4;--back:#14191f;--band:#1d242c;--line:#44505c;
--link:#7cb8f5;--seed:#5aa9f7;--published:#fb923c;--ensemble:#c4a1ff;--soup:#5fd38a}}
body{font:15px/1.5 system-ui,sans-serif;color:var(--text);background:var(--back);margin:2em auto;max-width:1500px;
padding:0 1.5em}a{color:var(--link)}h1{font-size:1.6em}h2{font-size:1.2em;margin-top:2em}
.wide{overflow-x:auto}table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:.93em}
td,th{padding:.3em .6em;text-align:left;white-space:nowrap}td.long{white-space:normal;min-width:9em}
tr:nth-child(even){background:var(--band)}th{border-bottom:2px solid var(--line)}
p.note{margin:.3em 0;color:var(--dim)}
"""
_RUN = re.compile("[0-9a-f]{32}")
_LONG = 25  # characters of a cell that may be broken


@dataclass(frozen=True)
class Report:
    """Attributes: notes: of the report as a whole."""

    title: str
    sections: list[Section]
    notes: list[str] = field(default_factory=list)


def _number(value: float | None, digits: int = 4) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _spread(group: Group) -> str:
    scores = group.scores
    return f"{min(scores):.4f} to {max(scores):.4f}" if len(scores) > 1 else "-"


_COLUMNS: dict[str, Callable[[Group], str]] = {
    "task": lambda group: group.task,
    "model": lambda group: group.best.params.get("model.name", ""),
    "recipe": lambda group: group.recipe,
    "metric": lambda group: group.best.metric,
    "median": lambda group: _number(group.median),
    "spread": _spread,
    "best": lambda group: _number(group.best.score),
    "seeds": lambda group: str(len(group.seeds)),
    "published": lambda group: f"{group.published.score:.3f}" if group.published else "",
    "seed noise": lambda group: group.verdict,
    "ensemble": lambda group: _number(group.together.get("ensemble")),
    "soup": lambda group: _number(group.together.get("soup")),
    "majority": lambda group: _number(group.majority),
    "device min": lambda group: f"{group.minutes:.1f}",
    "energy Wh": lambda group: _number(group.energy, 1),
    "best run": lambda group: group.best.link or group.best.run_id,
}
_OPTIONAL = ("published", "seed noise", "ensemble", "soup", "majority", "energy Wh")  # shown where a group has them


def table(groups: Sequence[Group]) -> Table:
    """A row for each group; columns that would be empty are left out.

    So is the task where all groups are of one; where they are of several, the model if there is only one.
    """
    shown = {name: [cell(group) for group in groups] for name, cell in _COLUMNS.items()}
    columns = [name for name, cells in shown.items() if name not in _OPTIONAL or any(cells)]
    several = len(set(shown["task"])) > 1
    if not several or len(set(shown["model"])) == 1:
        columns.remove("model" if several else "task")
    return Table(columns, [[shown[name][i] or "-" for name in columns] for i in range(len(groups))])


def markdown(report: Report) -> str:
    lines = [f"# {_plain(report.title)}", "", _INTRODUCTION]
    lines += ["", *(f"- {_plain(note)}" for note in report.notes)] if report.notes else []
    for section in report.sections:
        lines += ["", f"## {_plain(section.title)}", ""]
        for found in _tables(section):
            lines += [f"| {' | '.join(found.columns)} |", "|" + "---|" * len(found.columns)]
            lines += [f"| {' | '.join(_plain(cell) for cell in row)} |" for row in found.rows]
        lines += ["", *(f"- {_plain(note)}" for note in section.notes)] if section.notes else []
    lines += ["", seed_noise.METHOD] if _has_published(report) else []
    return "\n".join(lines) + "\n"


def _tables(section: Section) -> list[Table]:
    return ([table(section.groups)] if section.groups else []) + ([section.details] if section.details else [])


def _plain(text: str) -> str:
    """On one line, and no table's end."""
    return " ".join(text.split()).replace("|", "\\|")


def _has_published(report: Report) -> bool:
    return any(group.published for section in report.sections for group in section.groups)


def page(report: Report) -> str:
    """One HTML page, with plots, that asks nobody for anything; light or dark as the reader's browser is."""
    title = html.escape(report.title)
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    parts = [
        f'<!doctype html><html lang="en"><head>{head}<title>{title}</title><style>{PAGE_STYLE}{STYLE}</style></head>'
    ]
    parts.append(f"<body><h1>{title}</h1><p>{_INTRODUCTION}</p>")
    parts += [_note(note) for note in report.notes]
    for section in report.sections:
        parts.append(f"<h2>{html.escape(section.title)}</h2>")
        parts += [_html_table(found) for found in _tables(section)]
        if section.groups:
            tasks = {group.task for group in section.groups}
            names = [group.task if len(tasks) > 1 else group.recipe for group in section.groups]
            parts += [seed_plot(section.groups, names, one_axis=len(tasks) == 1), key(section.groups)]
        parts += [_note(note) for note in section.notes]
    if _has_published(report):
        parts.append(_note(seed_noise.METHOD))
    return "\n".join([*parts, "</body></html>"]) + "\n"


def save(report: Report, folder: Path) -> list[Path]:
    """Write ``report.md`` and ``report.html`` into a folder, each whole."""
    written = []
    for name, text in {"report.md": markdown(report), "report.html": page(report)}.items():
        with new_file(folder / name) as file:
            file.write(text)
        written.append(folder / name)
    return written


def _note(text: str) -> str:
    return f'<p class="note">{html.escape(text)}</p>'


def _html_table(found: Table) -> str:
    head = "".join(f"<th>{column}</th>" for column in found.columns)
    body = "\n".join("<tr>" + "".join(map(_cell, row)) + "</tr>" for row in found.rows)
    return f'<div class="wide"><table><tr>{head}</tr>\n{body}</table></div>'


def _cell(text: str) -> str:
    safe, kind = html.escape(text), ' class="long"' if len(text) > _LONG else ""
    if text.startswith(("http://", "https://")):
        run = text.partition("/runs/")[2].partition("?")[0] or text
        return f'<td><a href="{safe}" title="{html.escape(run)}">{html.escape(run[:8])}…</a></td>'
    if _RUN.fullmatch(text):
        return f'<td title="{safe}">{safe[:8]}…</td>'
    return f"<td{kind}>{safe}</td>"


def show(report: Report) -> None:
    """Tables on a terminal, Markdown where the output goes elsewhere."""
    if not sys.stdout.isatty():
        print(markdown(report), end="")
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table as Grid

    console = Console()
    for note in report.notes:
        console.print(escape(note))
    for section in report.sections:
        for found in _tables(section):
            grid = Grid(*found.columns, title=escape(section.title), title_justify="left")
            for row in found.rows:
                grid.add_row(*map(escape, row))
            console.print(grid)
        for note in section.notes:
            console.print(escape(f"{section.title}: {note}"))
    if _has_published(report):
        console.print(escape(seed_noise.METHOD))
