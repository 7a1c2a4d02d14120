"""Charts as inline SVG, drawn here so that the page needs no script and no library.

Colours are classes (`s1`..`s8`, `kept`, `lost`, `odd`) that the style sheet defines for light and dark. Charts with a text
are drawn for a width of about 360 units and laid out side by side, so that their letters keep their size on a phone.
Every mark that stands for a number has `data-tip`; the same numbers stand in a table below the chart.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from pipelines.report.excerpts import visible
from pipelines.report.figures import Number, compact, number, tick

WIDTH = 372
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 8, 10, 24
MAX_POINTS = 160


@dataclass(frozen=True)
class Series:
    """One line: a name, its class, and points in order of x."""

    name: str
    style: str
    points: list[tuple[float, float]]


@dataclass(frozen=True)
class Segment:
    """A piece of a stacked bar."""

    value: Number
    style: str
    tip: str


def text(value: object) -> Markup:
    """A value as escaped text for SVG content and attributes."""
    return escape(value) if isinstance(value, Markup) else escape(visible(str(value)))


def bar(segments: Sequence[Segment], total: Number, label: str = "") -> Markup:
    """A stacked horizontal bar as wide as its place; `total` is the full width."""
    pieces, x = [], 0.0
    for segment in segments:
        if total <= 0 or segment.value <= 0:
            continue
        width = min(100 - x, 100 * segment.value / total)
        shown = max(width, 0.35)  # a thread of colour even for one row in a million
        pieces.append(
            f'<rect class="{segment.style}" x="{min(x, 100 - shown):.3f}%" width="{shown:.3f}%" y="0" height="100%"'
            f' data-tip="{text(segment.tip)}"/>'
        )
        x += width
    aria = f' role="img" aria-label="{text(label)}"' if label else ' aria-hidden="true"'
    return Markup(
        f'<svg class="bar" width="100%" height="10"{aria}><rect class="track" width="100%" height="100%"/>{"".join(pieces)}</svg>'
    )


def rate(value: float, style: str = "s1", mark: float | None = None) -> Markup:
    """A share between 0 and 1 as a bar, with an optional mark such as chance."""
    line = "" if mark is None else f'<line class="mark" x1="{100 * mark:.2f}%" x2="{100 * mark:.2f}%" y1="0" y2="100%"/>'
    return Markup(
        f'<svg class="bar tall" width="100%" height="14" aria-hidden="true"><rect class="track" width="100%" height="100%"/>'
        f'<rect class="{style}" width="{100 * max(0.0, min(1.0, value)):.3f}%" height="100%"/>{line}</svg>'
    )


def span(start: float, length: float, total: float, style: str, tip: str) -> Markup:
    """A bar from `start` over `length` on an axis of `total`."""
    left = 100 * start / total if total else 0
    width = max(0.3, 100 * length / total) if total else 0
    return Markup(
        f'<svg class="bar tall" width="100%" height="14" aria-hidden="true"><rect class="track" width="100%" height="100%"/>'
        f'<rect class="{style}" x="{min(left, 99.7):.3f}%" width="{width:.3f}%" height="100%" data-tip="{text(tip)}"/></svg>'
    )


def nice_ticks(low: float, high: float, count: int = 4, least_step: float = 0.0) -> list[float]:
    """Round numbers that span low..high: steps of 1, 2, 2.5 or 5 times a power of ten, whole ones with `least_step` 1."""
    if not (math.isfinite(low) and math.isfinite(high)):
        return [0.0, 1.0]
    if high - low <= max(1e-9 * max(abs(low), abs(high)), 1e-290):
        pad = abs(low) * 0.1 if abs(low) > 1e-280 else 1.0
        low, high = low - pad, high + pad
    raw = (high - low) / max(1, count)
    power = 10.0 ** math.floor(math.log10(raw))
    factors = (1, 2, 5, 10) if least_step == power == 1 else (1, 2, 2.5, 5, 10)  # counts have no halves
    step = max(least_step, next(factor * power for factor in factors if factor * power >= raw * 0.999))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    digits = 3 - math.floor(math.log10(step))
    return [round(index * step, digits) + 0.0 for index in range(first, last + 1)]


def histogram(bins: Sequence[tuple[str, Number]], style: str = "s1", height: int = 148) -> Markup:
    """Upright bars of counts. Labels are thinned so that they do not touch."""
    if not bins:
        return Markup("")
    top = max(value for _, value in bins)
    ticks = nice_ticks(0, max(1, top), 3, least_step=1)
    ceiling = ticks[-1]
    plot_width, plot_height = WIDTH - _LEFT - _RIGHT, height - _TOP - _BOTTOM
    pieces = _horizontal_grid(ticks, lambda mark: _TOP + plot_height * (1 - mark / ceiling), compact)
    slot = plot_width / len(bins)
    longest = max(_text_width(label) for label, _ in bins) + 8
    every = max(1, math.ceil(longest / slot))
    for index, (label, value) in enumerate(bins):
        x = _LEFT + index * slot
        tall = plot_height * value / ceiling
        if value > 0:
            tall = max(tall, 1.0)
        gap = min(2.0, slot * 0.12)
        pieces.append(
            f'<g class="hit" data-tip="{text(label)} · {number(value)}">'
            f'<rect class="hot" x="{x:.2f}" y="{_TOP}" width="{slot:.2f}" height="{plot_height}"/>'
            f'<rect class="{style}" x="{x + gap / 2:.2f}" y="{_TOP + plot_height - tall:.2f}"'
            f' width="{max(0.5, slot - gap):.2f}" height="{tall:.2f}"/></g>'
        )
        if index % every == 0:
            pieces.append(f'<text class="ax mid" x="{x + slot / 2:.2f}" y="{height - 7}">{text(label)}</text>')
    return _svg(pieces, height)


def lines(series: Sequence[Series], height: int = 196, x_name: str = "", y_from_zero: bool = False) -> Markup:
    """Several lines over one x axis. Points that are not finite break off nothing: they are left out."""
    cleaned = [Series(s.name, s.style, thin([p for p in s.points if math.isfinite(p[0]) and math.isfinite(p[1])])) for s in series]
    cleaned = [s for s in cleaned if s.points]
    if not cleaned:
        return Markup("")
    xs = [x for s in cleaned for x, _ in s.points]
    ys = [y for s in cleaned for _, y in s.points]
    x_low, x_high = min(xs), max(xs)
    if 0 < x_low < 0.1 * x_high:
        x_low = 0.0  # steps begin near nothing: so does the axis
    if x_high == x_low:
        x_low, x_high = x_low - 0.5, x_high + 0.5
    ticks = nice_ticks(0.0 if y_from_zero else min(ys), max(ys), 4)
    y_low, y_high = ticks[0], ticks[-1]
    left = max(_LEFT, 12 + max(_text_width(tick(mark)) for mark in ticks))
    plot_width, plot_height = WIDTH - left - _RIGHT, height - _TOP - _BOTTOM

    def place_x(x: float) -> float:
        return left + plot_width * (x - x_low) / (x_high - x_low)

    def place_y(y: float) -> float:
        return _TOP + plot_height * (1 - (y - y_low) / (y_high - y_low))

    pieces = _horizontal_grid(ticks, place_y, tick, left)
    for mark in nice_ticks(x_low, x_high, 4):
        if x_low <= mark <= x_high:
            anchor = "end" if place_x(mark) > WIDTH - 24 else "mid"
            pieces.append(f'<text class="ax {anchor}" x="{place_x(mark):.2f}" y="{height - 7}">{tick(mark)}</text>')
    for s in cleaned:
        path = " ".join(f"{'M' if i == 0 else 'L'}{place_x(x):.2f} {place_y(y):.2f}" for i, (x, y) in enumerate(s.points))
        pieces.append(f'<path class="line {s.style}" d="{path}"/>')
        x, y = s.points[-1]
        pieces.append(f'<circle class="dot {s.style}" cx="{place_x(x):.2f}" cy="{place_y(y):.2f}" r="2.6"/>')
    stops = sorted({x for s in cleaned for x, _ in s.points})
    edges = [x_low, *((a + b) / 2 for a, b in itertools.pairwise(stops)), x_high]
    tables = [dict(s.points) for s in cleaned]
    for index, stop in enumerate(stops):
        values = [
            f"{s.name} {number(table[stop])}" if s.name else number(table[stop])
            for s, table in zip(cleaned, tables, strict=True)
            if stop in table
        ]
        a, b = place_x(edges[index]), place_x(edges[index + 1])
        pieces.append(
            f'<g class="hit" data-tip="{text(x_name)} {number(stop)} · {text(" · ".join(values))}">'
            f'<rect class="hot" x="{a:.2f}" y="{_TOP}" width="{max(1.0, b - a):.2f}" height="{plot_height}"/>'
            f'<line class="cross" x1="{place_x(stop):.2f}" x2="{place_x(stop):.2f}" y1="{_TOP}" y2="{_TOP + plot_height}"/></g>'
        )
    return _svg(pieces, height)


def thin(points: list[tuple[float, float]], limit: int = MAX_POINTS) -> list[tuple[float, float]]:
    """At most `limit` of the points themselves (no averages), the first and the last among them."""
    if len(points) <= limit:
        return points
    return [points[round(index * (len(points) - 1) / (limit - 1))] for index in range(limit)]


def dots(rows: Sequence[tuple[str, Sequence[tuple[str, str, float]]]]) -> Markup:
    """A row of dots a label, on one logarithmic axis: rows of (label, [(name, style, value)]). Values must be positive."""
    values = [value for _, marks in rows for _, _, value in marks if value > 0 and math.isfinite(value)]
    if not values:
        return Markup("")
    low, high = math.log10(min(values)), math.log10(max(values))
    pad = max(0.05, (high - low) * 0.06)
    low, high = low - pad, high + pad
    left = min(150.0, max(_text_width(label) for label, _ in rows) + 14)
    plot_width = WIDTH - left - 12
    height = 30 + 24 * len(rows)

    def place(value: float) -> float:
        return left + plot_width * (math.log10(value) - low) / (high - low)

    pieces = []
    last = -100.0
    candidates = [factor * 10.0**power for power in range(math.floor(low), math.ceil(high) + 1) for factor in (1, 2, 5)]
    marks_inside = [mark for mark in candidates if low <= math.log10(mark) <= high]
    if len(marks_inside) < 2:  # less than one step of 1-2-5
        marks_inside = [mark for mark in nice_ticks(10**low, 10**high) if mark > 0 and low <= math.log10(mark) <= high]
    for mark in marks_inside:
        x = place(mark)
        pieces.append(f'<line class="grid" x1="{x:.2f}" x2="{x:.2f}" y1="4" y2="{height - 22}"/>')
        if x - last > 38:
            pieces.append(f'<text class="ax mid" x="{x:.2f}" y="{height - 7}">{compact(mark)}</text>')
            last = x
    for index, (label, marks) in enumerate(rows):
        y = 18 + 24 * index
        placed = [(name, style, value, place(value)) for name, style, value in marks if value > 0 and math.isfinite(value)]
        pieces.append(f'<text class="ax row" x="0" y="{y + 4}">{text(_clip(label, left - 10))}</text>')
        if placed:
            ends = [x for *_, x in placed]
            pieces.append(f'<line class="range" x1="{min(ends):.2f}" x2="{max(ends):.2f}" y1="{y}" y2="{y}"/>')
        for name, style, value, x in placed:
            pieces.append(
                f'<circle class="dot big {style}" cx="{x:.2f}" cy="{y}" r="5"'
                f' data-tip="{text(name)} · {text(label)} · {number(value)}"/>'
            )
    return _svg(pieces, height)


def _clip(label: str, width: float) -> str:
    if _text_width(label) <= width:
        return label
    while label and _text_width(label) > width - 8:
        label = label[:-1]
    return label + "…"


def _text_width(label: str) -> float:
    """Estimated width in units at the axis's 11 px: CJK letters are square."""
    return sum(11.0 if ord(letter) > 0x2E7F else 6.2 for letter in label)


def _horizontal_grid(
    ticks: Sequence[float], place: Callable[[float], float], form: Callable[[float], str], left: float = _LEFT
) -> list[str]:
    pieces = []
    for mark in ticks:
        y = place(mark)
        pieces.append(f'<line class="grid" x1="{left:.0f}" x2="{WIDTH - _RIGHT}" y1="{y:.2f}" y2="{y:.2f}"/>')
        pieces.append(f'<text class="ax end" x="{left - 6:.0f}" y="{y + 3.5:.2f}">{text(form(mark))}</text>')
    return pieces


def _svg(pieces: Sequence[str], height: float) -> Markup:
    return Markup(f'<svg class="chart" viewBox="0 0 {WIDTH} {height}" aria-hidden="true" focusable="false">{"".join(pieces)}</svg>')
