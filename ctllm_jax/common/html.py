"""The frame of every HTML report: one self-contained page, no scripts, charts as inline SVG.

Functions return HTML text. Whatever comes from outside (texts, labels, numbers) is escaped here and nowhere else;
`raw` marks what is HTML already.
"""

import dataclasses
import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

from ctllm_jax.common import style

Points = Sequence[tuple[float, float]]

_COLOURS = ("#2f6fde", "#d9730d", "#1a9e6c", "#a03fc4", "#c4314b", "#6b7a90", "#b08900", "#0e8fa8")
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 500, 236, 52, 12, 12, 34
_TOOLTIPS = 60  # points of a line that tell their values


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
        f"<style>{style.PAGE}</style></head><body>"
        f"<h1>{_text(title)}</h1><p class=soft>{_text(lead)}</p>{body}</body></html>\n"
    )


def inside(content: str) -> str:
    """HTML of this module for somebody else's page (a notebook's), with the style that it needs."""
    return f'<div class="ctllm"><style>{style.INSIDE}</style>{content}</div>'


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
    series: Mapping[str, Points],
    x_label: str,
    marks: Mapping[str, float] | None = None,
    faint: Mapping[str, Points] | None = None,
    log: bool = False,
) -> str:
    """A line chart of {name: [(x, y), ...]}; resting the pointer on a line shows its values.

    Args:
      title: above the chart.
      series: lines; what is not finite is left out.
      x_label: below the axis.
      marks: horizontal reference lines {name: y}.
      faint: {name of a line: [(x, y), ...]} pale behind it, as single values are behind their mean; only the middle
        98 % of them are sure to lie inside.
      log: a logarithmic y axis, on which nothing below or at 0 is shown.
    """
    marks, faint = marks or {}, faint or {}
    series = {name: _finite(points, log) for name, points in series.items()}
    faint = {name: _finite(points, log) for name, points in faint.items()}
    frame = _Frame.around([*series.values(), *map(_middle, faint.values()), [(None, y) for y in marks.values()]], log)
    if frame is None:
        return paragraph(f"{title}: no data", "soft")
    parts = frame.axes(x_label)
    for name, y in marks.items():
        _, where = frame.place(frame.x0, y)
        parts.append(
            f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{where}" y2="{where}" stroke="var(--soft)" '
            f'stroke-dasharray="5 4"/>'
            f'<text x="{_WIDTH - _RIGHT}" y="{where - 4:.1f}" text-anchor="end">{_text(name)}</text>'
        )
    colours = {name: _COLOURS[index % len(_COLOURS)] for index, name in enumerate(series)}
    for name, points in faint.items():
        parts.append(_polyline(frame, points, colours.get(name, _COLOURS[0]), 'stroke-width="1" stroke-opacity="0.3"'))
    for name, points in series.items():
        parts.append(_polyline(frame, points, colours[name], 'stroke-width="1.8"'))
    for name, points in series.items():
        alone = len(points) == 1  # a line of one point would not show
        for x, y in points[:: max(len(points) // _TOOLTIPS, 1)]:
            left, top = frame.place(x, y)
            style = 'r="3"' if alone else 'r="4" class="told" fill-opacity="0"'
            parts.append(
                f'<circle cx="{left}" cy="{top}" fill="{colours[name]}" {style}>'
                f"<title>{_text(name)}, {_text(x_label)} {_text(x)}: {_text(y)}</title></circle>"
            )
    return _figure(title, _HEIGHT, parts, colours)


def stacked_bars(title: str, bars: Mapping[str, Mapping[str, float]], unit: str) -> str:
    """Horizontal bars {label: {part: value}} of one length, divided as their parts; the sum is at the end of each."""
    names = list(dict.fromkeys(name for parts in bars.values() for name in parts))
    colours = {name: _COLOURS[index % len(_COLOURS)] for index, name in enumerate(names)}
    row, left, room = 26, 110, 300
    parts = []
    for index, (label, values) in enumerate(bars.items()):
        y, x, total = index * row, float(left), sum(values.values())
        parts.append(f'<text x="{left - 6}" y="{y + 17}" text-anchor="end">{_text(label)}</text>')
        for name, value in values.items():
            width = value / total * room if total else 0.0
            parts.append(
                f'<rect x="{x:.1f}" y="{y + 4}" width="{width:.1f}" height="{row - 8}" fill="{colours[name]}">'
                f"<title>{_text(label)}, {_text(name)}: {_text(float(value))}{_text(unit)}</title></rect>"
            )
            x += width
        parts.append(f'<text x="{left + room + 6}" y="{y + 17}">{_text(float(total))}{_text(unit)}</text>')
    return _figure(title, row * len(bars) + 4, parts, colours)


def bar_chart(title: str, bars: Mapping[str, float]) -> str:
    """Horizontal bars {label: value}, value written at the end of each."""
    top = max(bars.values(), default=0) or 1
    row, left, room = 22, 170, 250
    parts = []
    for index, (label, value) in enumerate(bars.items()):
        y = index * row
        parts.append(
            f'<text x="{left - 6}" y="{y + 15}" text-anchor="end">{_text(label)}</text>'
            f'<rect x="{left}" y="{y + 4}" width="{value / top * room:.1f}" height="{row - 8}" fill="{_COLOURS[0]}"/>'
            f'<text x="{left + value / top * room + 5:.1f}" y="{y + 15}">{_text(value)}</text>'
        )
    return _figure(title, row * len(bars) + 4, parts)


def histogram(
    title: str, bars: Sequence[tuple[float, float, float, bool]], marks: Mapping[str, float], ticks: Mapping[str, float]
) -> str:
    """Columns of an area that grows with the square root of their height, so that few beside many are still seen.

    Args:
      title: above the chart.
      bars: (begin, end, height, struck) along one axis; those that are struck out are red.
      marks: vertical lines {name: where}.
      ticks: {label: where} below the axis.
    """
    if not bars:
        return paragraph(f"{title}: no data", "soft")
    places = [edge for begin, end, _, _ in bars for edge in (begin, end)] + list(marks.values())
    low, high = min(places), max(places)
    top, room, floor = max(height for _, _, height, _ in bars) or 1, 84, 100

    def x(place: float) -> float:
        return 10 + (place - low) / (high - low or 1) * (_WIDTH - 20)

    parts = []
    for struck, colour in ((False, _COLOURS[0]), (True, _COLOURS[4])):
        path = "".join(
            f"M{x(begin):.1f} {floor}V{floor - room * math.sqrt(height / top):.1f}H{x(end) - 0.8:.1f}V{floor}z"
            for begin, end, height, red in bars
            if height and red == struck
        )
        parts.append(f'<path d="{path}" fill="{colour}"/>' if path else "")
    for name, place in marks.items():
        side = "start" if x(place) < _WIDTH / 2 else "end"
        parts.append(
            f'<line x1="{x(place):.1f}" x2="{x(place):.1f}" y1="2" y2="{floor}" stroke="var(--ink)" '
            f'stroke-dasharray="4 3"/><text x="{x(place) + (4 if side == "start" else -4):.1f}" y="11" '
            f'text-anchor="{side}">{_text(name)}</text>'
        )
    parts += [
        f'<text x="{x(place):.1f}" y="{floor + 13}" text-anchor="middle">{_text(label)}</text>'
        for label, place in ticks.items()
        if low <= place <= high
    ]
    return _figure(title, floor + 18, parts)


def shaded(pieces: Sequence[tuple[str, float, str]]) -> str:
    """A text in pieces, line breaks kept: (piece, how dark from 0 to 1, what resting the pointer on it shows)."""
    marks = "".join(
        f'<span style="background: rgba(217, 115, 13, {min(max(shade, 0.0), 1.0):.2f}); border-right: 1px solid '
        f'var(--paper)" title="{_text(note)}">'
        f"{_text(piece)}</span>"
        for piece, shade, note in pieces
    )
    return f"<pre>{marks}</pre>"


def side_by_side(columns: Sequence[tuple[str, Sequence[tuple[str, bool]]]]) -> str:
    """Texts beside each other, line breaks kept: (heading, pieces) each, a piece with whether it is to stand out."""
    cells = "".join(
        f"<div><p class=soft>{_text(heading)}</p><pre>"
        + "".join(f"<mark>{_text(piece)}</mark>" if marked else _text(piece) for piece, marked in pieces)
        + "</pre></div>"
        for heading, pieces in columns
    )
    return f"<div class=beside>{cells}</div>"


@dataclasses.dataclass(frozen=True)
class _Frame:
    """The range of a line chart; y0 and y1 are logarithms where `log` is set."""

    x0: float
    x1: float
    y0: float
    y1: float
    log: bool

    @classmethod
    def around(cls, lines: Sequence[Sequence[tuple[float | None, float]]], log: bool) -> "_Frame | None":
        """The frame that all points lie in; None without a point that has an x."""
        xs = [x for line in lines for x, _ in line if x is not None]
        ys = [math.log10(y) if log else y for line in lines for _, y in line if y > 0 or not log]
        if not xs:
            return None
        x0, x1, y0, y1 = min(xs), max(xs), min(ys), max(ys)
        pad = 0.06 * (y1 - y0) or (0.1 if log else max(0.5, 0.1 * abs(y0)))
        return cls(x0, x1 if x1 > x0 else x0 + max(1.0, abs(x0)), y0 - pad, y1 + pad, log)

    def place(self, x: float, y: float) -> tuple[float, float]:
        """Where a point is drawn; one beyond the frame lies on its edge."""
        y = min(max(math.log10(y) if self.log else y, self.y0), self.y1)
        left = _LEFT + (x - self.x0) / (self.x1 - self.x0) * (_WIDTH - _LEFT - _RIGHT)
        return round(left, 1), round(_TOP + (self.y1 - y) / (self.y1 - self.y0) * (_HEIGHT - _TOP - _BOTTOM), 1)

    def axes(self, x_label: str) -> list[str]:
        """Grid, ticks and the label of the x axis."""
        parts = []
        for tick in _log_ticks(self.y0, self.y1) if self.log else _ticks(self.y0, self.y1):
            _, y = self.place(self.x0, tick)
            parts.append(f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y}" y2="{y}" stroke="var(--line)"/>')
            parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{_short(tick)}</text>')
        for tick in _ticks(self.x0, self.x1):
            x, _ = self.place(tick, 1.0)
            parts.append(f'<text x="{x}" y="{_HEIGHT - _BOTTOM + 15}" text-anchor="middle">{_short(tick)}</text>')
        parts.append(f'<text x="{_WIDTH - _RIGHT}" y="{_HEIGHT - 2}" text-anchor="end">{_text(x_label)}</text>')
        return parts


def _polyline(frame: _Frame, points: Points, colour: str, style: str) -> str:
    path = " ".join("{},{}".format(*frame.place(x, y)) for x, y in points)
    return f'<polyline points="{path}" fill="none" stroke="{colour}" {style}/>'


def _finite(points: Points, log: bool) -> list[tuple[float, float]]:
    return [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y) and (y > 0 or not log)]


def _middle(points: Points) -> list[tuple[float, float]]:
    """Points without the lowest and the highest hundredth."""
    cut = len(points) // 100
    return sorted(points, key=lambda point: point[1])[cut : len(points) - cut]


def _figure(title: str, height: int, parts: Sequence[str], colours: Mapping[str, str] | None = None) -> str:
    """A drawing below its title and, where there is more than one colour, what they stand for."""
    legend = "".join(
        f'<span><i style="background:{colour}"></i>{_text(name)}</span>'
        for name, colour in (colours or {}).items()
        if len(colours) > 1
    )
    return (
        f"<figure><figcaption><b>{_text(title)}</b>{f'<div class=legend>{legend}</div>' if legend else ''}</figcaption>"
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


def _log_ticks(low: float, high: float) -> list[float]:
    """Values of a logarithmic axis between 10^low and 10^high: 1, 2, 5, 10, ..., or round ones where those are few."""
    exponents = range(math.floor(low), math.ceil(high) + 1)
    for factors in ((1.0,), (1.0, 2.0, 5.0)):
        ticks = [factor * 10.0**e for e in exponents for factor in factors if low <= math.log10(factor) + e <= high]
        if len(ticks) > 2:
            return ticks[:: math.ceil(len(ticks) / 8)]
    return [tick for tick in _ticks(10.0**low, 10.0**high) if tick > 0]


def _short(tick: float) -> str:
    """A round number for an axis: 20k, 1.5M."""
    if 1e4 <= abs(tick) < 1e12:
        unit, size = next((unit, size) for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)) if abs(tick) >= size)
        return f"{tick / size:g}{unit}"
    return f"{tick:g}"
