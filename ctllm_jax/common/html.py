"""The frame of every HTML report: one self-contained page, no scripts, charts as inline SVG.

Functions return HTML text. Whatever comes from outside (texts, labels, numbers) is escaped here and nowhere else;
`raw` marks what is HTML already.
"""

import dataclasses
import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

_STYLE = """
:root { --ink: #1c2330; --soft: #667085; --line: #e3e6ec; --paper: #fff; --tint: #f5f7fa;
  --good: #1a7f4b; --bad: #b42318; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ef; --soft: #9aa4b2; --line: #2c3340; --paper: #14181f; --tint: #1b212b; --good: #5fcf95;
    --bad: #ff8a7a; }
}
body { font: 15px/1.55 system-ui, "Noto Sans", "Noto Sans CJK SC", "PingFang SC", "Microsoft YaHei", sans-serif;
  color: var(--ink); background: var(--paper); max-width: 1060px; margin: 2.2rem auto 5rem; padding: 0 1.2rem; }
h1 { font-size: 1.7rem; margin: 0 0 .3rem; }
h2 { font-size: 1.2rem; margin: 2.4rem 0 .6rem; border-bottom: 1px solid var(--line); padding-bottom: .3rem; }
h3 { font-size: 1rem; margin: 1.4rem 0 .4rem; }
p, details, pre { margin: .4rem 0; }
.soft { color: var(--soft); }
.good { color: var(--good); font-weight: 600; }
.bad { color: var(--bad); font-weight: 600; }
table { border-collapse: collapse; margin: .6rem 0; font-size: .92rem; }
th, td { padding: .28rem .7rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
th { color: var(--soft); font-weight: 600; }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td details { margin: 0; }
.scroll { overflow-x: auto; }
pre { background: var(--tint); padding: .6rem .8rem; border-radius: 6px; white-space: pre-wrap; overflow-wrap: anywhere;
  font-size: .88rem; }
.cards, .charts { display: flex; flex-wrap: wrap; gap: .8rem; margin: 1rem 0; }
.card { background: var(--tint); border-radius: 8px; padding: .6rem .9rem; min-width: 9rem; }
.card b { display: block; font-size: 1.3rem; }
.card span { color: var(--soft); font-size: .84rem; }
figure { margin: 0; }
svg { max-width: 100%; height: auto; }
svg text { font-size: 11px; fill: var(--soft); }
summary { cursor: pointer; }
"""
_COLOURS = ("#2f6fde", "#d9730d", "#1a9e6c", "#a03fc4", "#c4314b", "#6b7a90")
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 500, 250, 52, 12, 26, 34


@dataclasses.dataclass(frozen=True)
class Raw:
    """Text that is HTML already."""

    html: str


def raw(text: str) -> Raw:
    """Marks `text` as HTML already."""
    return Raw(text)


def page(title: str, lead: str, sections: Sequence[tuple[str, str]]) -> str:
    """A whole document: title, a line below it, sections as (heading, HTML)."""
    body = "".join(f"<section><h2>{_text(heading)}</h2>{content}</section>" for heading, content in sections)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{_text(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{_STYLE}</style></head><body>"
        f"<h1>{_text(title)}</h1><p class=soft>{_text(lead)}</p>{body}</body></html>\n"
    )


def paragraph(text: Any, kind: str = "") -> str:
    """A paragraph; `kind` is '', 'soft', 'good' or 'bad'."""
    return f'<p class="{kind}">{_text(text)}</p>'


def heading(text: str) -> str:
    """A heading inside a section."""
    return f"<h3>{_text(text)}</h3>"


def quote(text: str) -> str:
    """A text sample as it is, line breaks kept."""
    return f"<pre>{_text(text)}</pre>"


def details(summary: str, content: str) -> str:
    """HTML that opens on a click."""
    return f"<details><summary>{_text(summary)}</summary>{content}</details>"


def cards(values: Mapping[str, Any]) -> str:
    """A row of headline figures: {label: value}."""
    items = "".join(
        f"<div class=card><b>{_text(value)}</b><span>{_text(label)}</span></div>" for label, value in values.items()
    )
    return f"<div class=cards>{items}</div>"


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table; a column whose cells are all numbers (or empty) is set flush right."""
    numeric = [
        any(isinstance(row[i], (int, float)) for row in rows)
        and all(row[i] is None or isinstance(row[i], (int, float)) for row in rows)
        for i in range(len(header))
    ]
    cls = [' class="number"' if flag else "" for flag in numeric]
    head = "".join(f"<th{c}>{_text(name)}</th>" for c, name in zip(cls, header, strict=True))
    lines = "".join(
        "<tr>" + "".join(f"<td{c}>{_text(cell)}</td>" for c, cell in zip(cls, row, strict=True)) + "</tr>"
        for row in rows
    )
    return f"<div class=scroll><table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></div>"


def charts(*items: str) -> str:
    """Charts side by side."""
    return f"<div class=charts>{''.join(items)}</div>"


def line_chart(
    title: str,
    series: Mapping[str, Sequence[tuple[float, float]]],
    x_label: str,
    marks: Mapping[str, float] | None = None,
) -> str:
    """A line chart of {name: [(x, y), ...]}; `marks` are horizontal reference lines {name: y}."""
    marks = marks or {}
    points = [p for line in series.values() for p in line if math.isfinite(p[0]) and math.isfinite(p[1])]
    if not points:
        return paragraph(f"{title}: no data", "soft")
    xs, ys = [p[0] for p in points], [p[1] for p in points] + list(marks.values())
    x0, x1, y0, y1 = min(xs), max(xs), min(ys), max(ys)
    pad = 0.06 * (y1 - y0) or max(0.5, 0.1 * abs(y0))
    x1 = x1 if x1 > x0 else x0 + max(1.0, abs(x0))
    y0, y1 = y0 - pad, y1 + pad

    def at(x: float, y: float) -> str:
        return (
            f"{_LEFT + (x - x0) / (x1 - x0) * (_WIDTH - _LEFT - _RIGHT):.1f},"
            f"{_TOP + (y1 - y) / (y1 - y0) * (_HEIGHT - _TOP - _BOTTOM):.1f}"
        )

    parts = []
    for tick in _ticks(y0, y1):
        left, y = at(x0, tick).split(",")
        parts.append(f'<line x1="{left}" x2="{_WIDTH - _RIGHT}" y1="{y}" y2="{y}" stroke="var(--line)"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{float(y) + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for tick in _ticks(x0, x1):
        x, _ = at(tick, y0).split(",")
        parts.append(f'<text x="{x}" y="{_HEIGHT - _BOTTOM + 15}" text-anchor="middle">{tick:g}</text>')
    for name, y in marks.items():
        (left, where), (right, _) = at(x0, y).split(","), at(x1, y).split(",")
        parts.append(
            f'<line x1="{left}" x2="{right}" y1="{where}" y2="{where}" stroke="var(--soft)" stroke-dasharray="5 4"/>'
        )
        parts.append(f'<text x="{right}" y="{float(where) - 4:.1f}" text-anchor="end">{_text(name)}</text>')
    for index, (name, line) in enumerate(series.items()):
        colour = _COLOURS[index % len(_COLOURS)]
        path = [at(x, y) for x, y in line if math.isfinite(x) and math.isfinite(y)]
        if len(path) == 1:  # a line of one point would not show
            x, y = path[0].split(",")
            parts.append(f'<circle cx="{x}" cy="{y}" r="3" fill="{colour}"/>')
        parts.append(f'<polyline points="{" ".join(path)}" fill="none" stroke="{colour}" stroke-width="1.8"/>')
        parts.append(
            f'<rect x="{_LEFT + 4 + 118 * index}" y="{_TOP - 12}" width="10" height="3" fill="{colour}"/>'
            f'<text x="{_LEFT + 18 + 118 * index}" y="{_TOP - 7}">{_text(name)}</text>'
        )
    parts.append(f'<text x="{_WIDTH - _RIGHT}" y="{_HEIGHT - 4}" text-anchor="end">{_text(x_label)}</text>')
    return _figure(title, _HEIGHT, parts)


def bar_chart(title: str, bars: Mapping[str, float], unit: str = "") -> str:
    """Horizontal bars {label: value}, value written at the end of each."""
    top = max(bars.values(), default=0) or 1
    row, left, room = 22, 170, 250
    parts = []
    for index, (label, value) in enumerate(bars.items()):
        y = index * row
        parts.append(
            f'<text x="{left - 6}" y="{y + 15}" text-anchor="end">{_text(label)}</text>'
            f'<rect x="{left}" y="{y + 4}" width="{value / top * room:.1f}" height="{row - 8}" fill="{_COLOURS[0]}"/>'
            f'<text x="{left + value / top * room + 5:.1f}" y="{y + 15}">{_text(value)}{_text(unit)}</text>'
        )
    return _figure(title, row * len(bars) + 4, parts)


def _figure(title: str, height: int, parts: Sequence[str]) -> str:
    return (
        f"<figure><figcaption><b>{_text(title)}</b></figcaption>"
        f'<svg width="{_WIDTH}" height="{height}" viewBox="0 0 {_WIDTH} {height}" role="img">'
        f"{''.join(parts)}</svg></figure>"
    )


def _text(value: Any) -> str:
    if isinstance(value, Raw):
        return value.html
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return html.escape(str(value), quote=True)


def _ticks(low: float, high: float) -> list[float]:
    """About five round numbers between two values."""
    step = 10.0 ** math.floor(math.log10(max(high - low, 1e-12)))
    for factor in (0.2, 0.5, 1.0, 2.0):
        if (high - low) / (step * factor) <= 6:
            step *= factor
            break
    first = math.ceil(low / step) * step
    return [round(first + i * step, 12) for i in range(int((high - first) / step + 1e-9) + 1)]
