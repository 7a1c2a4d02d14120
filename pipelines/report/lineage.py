"""The stages and what they read, drawn as a layered graph from left to right.

Layers are longest paths from the sources. An edge that passes layers gets a waypoint in each, so that it runs between
boxes and not through them. Order inside a layer is found by barycentre sweeps (Sugiyama, Tagawa, Toda 1981); ties keep
the recipe's order, so the drawing is the same every time.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from markupsafe import Markup

from pipelines.report.charts import text
from pipelines.report.evaluation import models
from pipelines.report.excerpts import sentence, visible
from pipelines.report.figures import duration, number
from pipelines.report.messages import MESSAGES
from pipelines.report.view import TRAINING_KINDS, RunView, StageView

BOX_WIDTH, BOX_HEIGHT = 124.0, 66.0
_GAP_X, _GAP_Y, _WAYPOINT_HEIGHT = 26.0, 16.0, 10.0
_MARGIN = 6.0


@dataclass
class _Node:
    layer: int
    order: int
    height: float
    stage: StageView | None = None
    before: list[_Node] = field(default_factory=list)
    after: list[_Node] = field(default_factory=list)
    y: float = 0.0  # of the middle


def layers(inputs: dict[str, list[str]]) -> dict[str, int]:
    """The longest path that leads to each stage. Inputs that are no stages count as nothing; a cycle raises ValueError."""
    depth: dict[str, int] = {}
    open_names: set[str] = set()

    def visit(name: str) -> int:
        if name in depth:
            return depth[name]
        if name in open_names:
            raise ValueError(f"stages read each other in a circle, through {name!r}")
        open_names.add(name)
        depth[name] = max((visit(other) + 1 for other in inputs[name] if other in inputs), default=0)
        return depth[name]

    for name in inputs:
        visit(name)
    return depth


def drawing(run: RunView) -> Markup:
    """The whole graph as one SVG; each box links to its stage's row of the ledger."""
    if not run.stages:
        return Markup("")
    columns = _columns(run)
    _order(columns)
    _place(columns)
    lowest = min(node.y - node.height / 2 for column in columns for node in column)
    for column in columns:
        for node in column:
            node.y += _MARGIN - lowest
    height = max(node.y + node.height / 2 for column in columns for node in column) + _MARGIN
    width = len(columns) * (BOX_WIDTH + _GAP_X) - _GAP_X + 2 * _MARGIN
    edges = [_edge(a, b) for column in columns for a in column for b in a.after]
    boxes = [_box(node) for column in columns for node in column if node.stage is not None]
    # the spacer keeps the drawing from shrinking below legibility: its box scrolls instead
    return Markup(
        f'<div class="fit"><svg width="{width * 0.8:.0f}" height="0" aria-hidden="true"></svg>'
        f'<svg class="lineage" viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" height="{height:.0f}" role="group"'
        f' aria-labelledby="lineage-title"><g class="edges" aria-hidden="true">{"".join(edges)}</g>{"".join(boxes)}</svg></div>'
    )


def _columns(run: RunView) -> list[list[_Node]]:
    inputs = {stage.name: stage.inputs for stage in run.stages}
    depth = layers(inputs)
    columns: list[list[_Node]] = [[] for _ in range(max(depth.values()) + 1)]
    nodes: dict[str, _Node] = {}
    for stage in run.stages:
        column = columns[depth[stage.name]]
        nodes[stage.name] = _Node(depth[stage.name], len(column), BOX_HEIGHT, stage)
        column.append(nodes[stage.name])
    for stage in run.stages:
        for name in dict.fromkeys(stage.inputs):
            if name in nodes:
                _connect(nodes[name], nodes[stage.name], columns)
    return columns


def _connect(start: _Node, end: _Node, columns: list[list[_Node]]) -> None:
    previous = start
    for layer in range(start.layer + 1, end.layer):
        shared = next((node for node in previous.after if node.stage is None and node.layer == layer), None)
        if shared is None:  # edges that leave one box share their way until they part
            shared = _Node(layer, len(columns[layer]), _WAYPOINT_HEIGHT)
            columns[layer].append(shared)
            _join(previous, shared)
        previous = shared
    _join(previous, end)


def _join(a: _Node, b: _Node) -> None:
    if b not in a.after:
        a.after.append(b)
        b.before.append(a)


def _order(columns: list[list[_Node]], sweeps: int = 12) -> None:
    best, best_crossings = [list(column) for column in columns], _crossings(columns)
    for sweep in range(sweeps):
        forward = sweep % 2 == 0
        for column in columns if forward else reversed(columns):
            keys = {}
            for node in column:
                near = node.before if forward else node.after
                keys[id(node)] = sum(other.order for other in near) / len(near) if near else float(node.order)
            column.sort(key=lambda node: keys[id(node)])
            for position, node in enumerate(column):
                node.order = position
        crossings = _crossings(columns)
        if crossings < best_crossings:
            best, best_crossings = [list(column) for column in columns], crossings
    for column, order in zip(columns, best, strict=True):
        column[:] = order
        for position, node in enumerate(column):
            node.order = position


def _crossings(columns: list[list[_Node]]) -> int:
    count = 0
    for column in columns:
        edges = [(a.order, b.order) for a in column for b in a.after]
        count += sum(1 for i, e in enumerate(edges) for f in edges[:i] if (e[0] - f[0]) * (e[1] - f[1]) < 0)
    return count


def _place(columns: list[list[_Node]], rounds: int = 24) -> None:
    for column in columns:
        y = 0.0
        for node in column:
            node.y = y + node.height / 2
            y += node.height + _GAP_Y
        for node in column:
            node.y -= y / 2
    for turn in range(rounds):
        for column in columns if turn % 2 == 0 else reversed(columns):
            wanted = []
            for node in column:
                near = node.before + node.after
                weights = [3.0 if node.stage is None or other.stage is None else 1.0 for other in near]
                pull = sum(w * o.y for w, o in zip(weights, near, strict=True)) / sum(weights) if near else node.y
                wanted.append(0.5 * node.y + 0.5 * pull)
            _separate(column, wanted)


def _separate(column: list[_Node], wanted: list[float]) -> None:
    """Move nodes as near as possible to where they want to be without touching: blocks of the isotonic regression."""
    offsets, total = [], 0.0
    for index, node in enumerate(column):
        if index:
            total += column[index - 1].height / 2 + node.height / 2 + _GAP_Y
        offsets.append(total)
    blocks: list[list[float]] = []  # mean, size
    for want, offset in zip(wanted, offsets, strict=True):
        blocks.append([want - offset, 1])
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            mean, size = blocks.pop()
            blocks[-1][0] = (blocks[-1][0] * blocks[-1][1] + mean * size) / (blocks[-1][1] + size)
            blocks[-1][1] += size
    levels = [mean for mean, size in blocks for _ in range(int(size))]
    for node, level, offset in zip(column, levels, offsets, strict=True):
        node.y = level + offset


def _left(node: _Node) -> float:
    return _MARGIN + node.layer * (BOX_WIDTH + _GAP_X)


def _edge(a: _Node, b: _Node) -> str:
    start, end = _left(a) + BOX_WIDTH, _left(b)
    bend = _GAP_X * 0.55
    passing = f" M{_left(a):.1f} {a.y:.1f} L{start:.1f} {a.y:.1f}" if a.stage is None else ""
    curve = f"C{start + bend:.1f} {a.y:.1f} {end - bend:.1f} {b.y:.1f} {end:.1f} {b.y:.1f}"
    return f'<path class="edge" d="M{start:.1f} {a.y:.1f} {curve}{passing}"/>'


def outcome(stage: StageView) -> tuple[str, int] | None:
    """The message key and the count of what a stage produced."""
    if stage.manifest is None:
        return None
    if stage.kind in TRAINING_KINDS and stage.count("steps"):
        return "lineage.steps", int(stage.count("steps"))
    if stage.kind == "tokenizer" and stage.count("vocab_size"):
        return "lineage.entries", int(stage.count("vocab_size"))
    if stage.kind == "pack":
        return "lineage.sequences", int(stage.count("sequences") or stage.manifest.rows)
    if stage.kind == "evaluate":
        return "lineage.models", len(models(stage))
    return (
        "lineage.rows",
        stage.manifest.rows if stage.manifest.parts or stage.manifest.view is not None else stage.manifest.ledger.kept,
    )


def _box(node: _Node) -> str:
    stage = node.stage
    assert stage is not None
    x, y = _left(node), node.y - BOX_HEIGHT / 2
    made = outcome(stage)
    room = 15 if stage.state == "pending" else 11  # letters beside the time
    third = []
    for language, css in ((0, "en"), (1, "zh")):
        if made is not None:
            line = sentence(made[0], language, n=number(made[1]))
        else:
            line = sentence(f"status.{stage.state}", language) if f"status.{stage.state}" in MESSAGES else text(stage.status)
        third.append(f'<text class="what {css}" x="{x + 12:.1f}" y="{y + 40:.1f}">{line}</text>')
        kind = sentence(f"kind.{stage.kind}", language) if f"kind.{stage.kind}" in MESSAGES else text(_fit(stage.kind, 12))
        time = sentence("status.reused", language) if stage.state == "reused" else duration(stage.seconds)
        third.append(f'<text class="kind {css}" x="{x + 12:.1f}" y="{y + 56:.1f}">{kind}</text>')
        if stage.state in ("done", "reused", "failed") or stage.seconds > 0:
            third.append(f'<text class="time end {css}" x="{x + BOX_WIDTH - 10:.1f}" y="{y + 21:.1f}">{time}</text>')
    return (
        f'<a class="stage {text(stage.state)}" href="#stage-{text(anchor(stage.name))}">'
        f'<rect class="box" x="{x:.1f}" y="{y:.1f}" width="{BOX_WIDTH:.1f}" height="{BOX_HEIGHT:.1f}" rx="5"/>'
        f'<rect class="side" x="{x:.1f}" y="{y + 8:.1f}" width="3" height="{BOX_HEIGHT - 16:.1f}" rx="1.5"/>'
        f'<text class="name" x="{x + 12:.1f}" y="{y + 21:.1f}">{text(_fit(stage.name, room))}</text>{"".join(third)}</a>'
    )


def anchor(name: str) -> str:
    """A stage's name as it may stand in an id."""
    return "".join(letter if letter.isascii() and (letter.isalnum() or letter in "-_") else f"_{ord(letter):x}" for letter in name)


def _fit(name: str, room: int) -> str:
    name = visible(name)
    wide = [2 if ord(letter) > 0x2E7F else 1 for letter in name]
    if sum(wide) <= room:
        return name
    used, kept = 0, 0
    while kept < len(name) and used + wide[kept] < room:
        used += wide[kept]
        kept += 1
    return name[:kept] + "…"
