"""Draws docs/forgetting.svg from benchmarks/results/forgetting.json: `python -m benchmarks.train.forgetting_plot`.

Left: what a fine-tune keeps of general ability against its share of plain SFT's domain gain, every setting a number, lines from its
worst to its best seed. Right: three fine-tunes in a row, what is left of the first domain's gain.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from benchmarks import measure
from pipelines.report.charts import nice_ticks, text

TARGET = measure.ROOT / "docs" / "forgetting.svg"
COLOURS = ("#1f6feb", "#d1242f", "#1a7f37", "#9a6700", "#8250df", "#0a7d8c", "#bf3989", "#57606a", "#953800")
WIDTH, HEIGHT, LEFT, TOP, SIDE = 860, 400, 60, 30, 330


def axes(x: tuple[float, float], y: tuple[float, float], left: float, names: tuple[str, str], percent: bool = True) -> list[str]:
    """A frame of SIDE x SIDE with ticks, in the coordinates of `place`."""
    pieces = [f'<rect x="{left}" y="{TOP}" width="{SIDE}" height="{SIDE}" fill="none" stroke="#8c959f"/>']
    for value in nice_ticks(*x):
        if x[0] <= value <= x[1]:
            across, _ = place(value, y[0], x, y, left)
            label = f"{value:.0%}" if percent else f"{value:g}"
            pieces.append(f'<line x1="{across:.1f}" x2="{across:.1f}" y1="{TOP}" y2="{TOP + SIDE}" stroke="#d0d7de"/>')
            pieces.append(f'<text x="{across:.1f}" y="{TOP + SIDE + 16}" text-anchor="middle">{label}</text>')
    for value in nice_ticks(*y):
        if y[0] <= value <= y[1]:
            _, up = place(x[0], value, x, y, left)
            pieces.append(f'<line x1="{left}" x2="{left + SIDE}" y1="{up:.1f}" y2="{up:.1f}" stroke="#d0d7de"/>')
            pieces.append(f'<text x="{left - 6}" y="{up + 4:.1f}" text-anchor="end">{value:.0%}</text>')
    pieces.append(f'<text x="{left + SIDE / 2}" y="{TOP + SIDE + 34}" text-anchor="middle">{text(names[0])}</text>')
    pieces.append(f'<text x="{left}" y="{TOP - 10}">{text(names[1])}</text>')
    return pieces


def place(x: float, y: float, xs: tuple[float, float], ys: tuple[float, float], left: float) -> tuple[float, float]:
    return left + SIDE * (x - xs[0]) / (xs[1] - xs[0]), TOP + SIDE * (1 - (y - ys[0]) / (ys[1] - ys[0]))


def around(values: Sequence[float], *marks: float) -> tuple[float, float]:
    """A range that holds all values and marks, with a margin."""
    low, high = min(*values, *marks), max(*values, *marks)
    margin = 0.06 * (high - low or 1)
    return low - margin, high + margin


def grid_chart(grid: dict[str, Any]) -> list[str]:
    """Every setting: mean as a numbered dot, the range of its seeds as a line."""
    kept = [line["kept"] for line in grid.values()] + [value for line in grid.values() for value in line["kept_each_seed"]]
    gains = [line["gain_share"][key] for line in grid.values() for key in ("min", "mean", "max")]
    xs, ys = around(kept, 0.95, 1.0), around(gains, 0.9, 1.0)
    pieces = axes(xs, ys, LEFT, ("general ability kept", "share of plain SFT's domain gain"))
    left, up = place(0.95, 0.9, xs, ys, LEFT)
    right, top = place(xs[1], ys[1], xs, ys, LEFT)
    pieces.append(
        f'<rect x="{left:.1f}" y="{top:.1f}" width="{right - left:.1f}" height="{up - top:.1f}" fill="#1a7f37" fill-opacity="0.1"/>'
        f'<text x="{right - 6:.1f}" y="{top + 14:.1f}" text-anchor="end" fill="#1a7f37">goal</text>'
    )
    for number, (name, line) in enumerate(grid.items()):
        colour = COLOURS[number % len(COLOURS)]
        x, y = place(line["kept"], line["gain_share"]["mean"], xs, ys, LEFT)
        x0, _ = place(min(line["kept_each_seed"]), 0, xs, ys, LEFT)
        x1, _ = place(max(line["kept_each_seed"]), 0, xs, ys, LEFT)
        _, y0 = place(0, line["gain_share"]["min"], xs, ys, LEFT)
        _, y1 = place(0, line["gain_share"]["max"], xs, ys, LEFT)
        pieces.append(
            f'<g stroke="{colour}" fill="{colour}"><line x1="{x0:.1f}" x2="{x1:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{y0:.1f}" y2="{y1:.1f}"/><circle cx="{x:.1f}" cy="{y:.1f}" r="8"/></g>'
            f'<text x="{x:.1f}" y="{y + 4:.1f}" text-anchor="middle" fill="#ffffff" font-weight="bold">{number + 1}</text>'
            f'<text x="{LEFT + SIDE + 14}" y="{TOP + 12 + 18 * number}" fill="{colour}">{number + 1}  {text(name)}</text>'
        )
    return pieces


def chain_chart(chains: dict[str, Any], names: Sequence[str]) -> list[str]:
    """What is left of the first domain's gain after each fine-tune, one line a setting."""
    left = LEFT + SIDE + 190
    values = {name: [row[0] / chain["gain_nats"][0][0] for row in chain["gain_nats"]] for name, chain in chains.items()}
    xs, ys = (0.8, 3.2), around([value for line in values.values() for value in line], 0.0, 1.0)
    pieces = axes(xs, ys, left, ("fine-tune in the row", "what is left of the first domain's gain"), percent=False)
    for name, line in values.items():
        colour = COLOURS[list(names).index(name) % len(COLOURS)]
        points = [place(step + 1, value, xs, ys, left) for step, value in enumerate(line)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        pieces.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        pieces += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"/>' for x, y in points]
        pieces.append(
            f'<text x="{points[-1][0] - 8:.1f}" y="{points[-1][1] - 8:.1f}" text-anchor="end" fill="{colour}">{text(name)}</text>'
        )
    return pieces


def main() -> None:
    figures = json.loads((measure.RESULTS / "forgetting.json").read_text("utf-8"))["figures"]
    width = WIDTH + (110 if figures["chains"] else -SIDE - 20)
    pieces = grid_chart(figures["grid"])
    if figures["chains"]:
        pieces += chain_chart(figures["chains"], list(figures["grid"]))
    TARGET.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {HEIGHT + 10}" width="{width}" height="{HEIGHT + 10}" '
        f'font-family="sans-serif" font-size="12"><rect width="100%" height="100%" fill="#ffffff"/>{"".join(pieces)}</svg>\n',
        "utf-8",
    )
    print(TARGET)


if __name__ == "__main__":
    main()
