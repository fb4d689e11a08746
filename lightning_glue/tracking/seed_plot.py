"""Each seed's score as a dot on a line, the median, and the published score: SVG that takes the page's colours."""

from __future__ import annotations

import html
from collections.abc import Sequence

from lightning_glue.tracking.comparison import Group

_WIDTH, _RIGHT, _ROW, _LETTER, _NAME = 860, 40, 46, 7, 36  # pixels; characters of a row's name
_DOT, _MARK = 5, 7
MOST = 30  # rows of a plot

STYLE = """
svg.seeds{display:block;width:100%;max-width:860px;height:auto;font:12px system-ui,sans-serif;margin:.5em 0}
svg.seeds text{fill:var(--text)} svg.seeds text.end{fill:var(--dim);font-size:10px}
svg.seeds line.axis{stroke:var(--line)}
svg.seeds circle{fill:var(--seed);fill-opacity:.65} svg.seeds line.median{stroke:var(--text);stroke-width:2.5}
svg.seeds line.published{stroke:var(--published);stroke-width:2;stroke-dasharray:4 3}
svg.seeds path.ensemble{fill:var(--ensemble)} svg.seeds path.soup{fill:var(--soup)}
.key span{white-space:nowrap;margin-right:1.2em}.key{color:var(--dim);font-size:.85em}
"""


def seed_plot(groups: Sequence[Group], names: Sequence[str], *, one_axis: bool) -> str:
    """A row for each group, for the first :data:`MOST`.

    Args:
        one_axis: the rows' scores can be compared with each other; else each row has an axis of its own.
    """
    groups = groups[:MOST]
    axes = [_reach(groups)] * len(groups) if one_axis else [_reach([group]) for group in groups]
    height = _ROW * len(groups) + 6
    left = _LETTER * min(_NAME, max(map(len, names), default=0)) + 16
    rows = [
        _row(group, name, axis, left, _ROW * i + 20) for i, (group, name, axis) in enumerate(zip(groups, names, axes))
    ]
    box = f'viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="scores of each seed"'
    return f'<svg class="seeds" {box}>{"".join(rows)}</svg>'


def key(groups: Sequence[Group]) -> str:
    """What the marks mean, those that occur."""
    shown = [f"the best {MOST} of {len(groups)}"] if len(groups) > MOST else []
    shown += [_sign("seed", "●", "a seed"), _sign("text", "┃", "median")]
    shown += [_sign("published", "┇", "published")] if any(group.published for group in groups) else []
    shown += [_sign(name, shape, name) for name, shape in (("ensemble", "◆"), ("soup", "▲"))
              if any(name in group.together for group in groups)]  # fmt: skip
    return '<p class="key">' + "".join(f"<span>{one}</span>" for one in shown) + "</p>"


def _sign(colour: str, shape: str, meaning: str) -> str:
    return f'<b style="color:var(--{colour})">{shape}</b> {meaning}'


def _values(group: Group) -> list[float]:
    return [*group.scores, *group.together.values(), *([group.published.score] if group.published else [])]


def _reach(groups: Sequence[Group]) -> tuple[float, float]:
    """Lowest and highest value with some room; never of no width."""
    values = [value for group in groups for value in _values(group)]
    low, high = min(values), max(values)
    room = max((high - low) * 0.06, 0.002)
    return low - room, high + room


def _row(group: Group, name: str, axis: tuple[float, float], left: int, y: float) -> str:
    low, high = axis
    place = lambda value: left + (value - low) / (high - low) * (_WIDTH - left - _RIGHT)
    short = name if len(name) <= _NAME else name[: _NAME - 1] + "…"
    parts = [
        f'<text x="0" y="{y + 4}"><title>{html.escape(name)}</title>{html.escape(short)}</text>',
        f'<line class="axis" x1="{left}" x2="{_WIDTH - _RIGHT}" y1="{y}" y2="{y}"/>',
        f'<text class="end" x="{left}" y="{y + 20}" text-anchor="start">{low:.3f}</text>',
        f'<text class="end" x="{_WIDTH - _RIGHT}" y="{y + 20}" text-anchor="end">{high:.3f}</text>',
    ]
    if group.published:
        parts.append(_upright("published", place(group.published.score), y, 14, f"{group.published.row} "
                              f"{group.published.score:.3f}"))  # fmt: skip
    for run in group.seeds:
        label = f"<title>seed {html.escape(run.seed[:40])}: {run.score:.4f}</title>"
        parts.append(f'<circle cx="{place(run.score):.1f}" cy="{y}" r="{_DOT}">{label}</circle>')
    parts.append(_upright("median", place(group.median), y, 11, f"median {group.median:.4f}"))
    for kind, value in group.together.items():
        parts.append(_mark(kind, place(value), y, f"{kind} {value:.4f}"))
    return "".join(parts)


def _upright(kind: str, x: float, y: float, half: int, title: str) -> str:
    ends = f'x1="{x:.1f}" x2="{x:.1f}" y1="{y - half}" y2="{y + half}"'
    return f'<line class="{kind}" {ends}><title>{html.escape(title)}</title></line>'


def _mark(kind: str, x: float, y: float, title: str) -> str:
    size = _MARK
    outline = f"M{x:.1f} {y - size}l{size} {size}l-{size} {size}l-{size} -{size}z"  # a diamond
    if kind == "soup":
        outline = f"M{x:.1f} {y - size}l{size} {2 * size - 2}h-{2 * size}z"
    return f'<path class="{html.escape(kind)}" d="{outline}"><title>{html.escape(title)}</title></path>'
