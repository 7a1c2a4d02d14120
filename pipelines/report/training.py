"""Training curves: stages of one kind share a chart, one line each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from pipelines.report import charts
from pipelines.report.charts import Series
from pipelines.report.excerpts import translated
from pipelines.report.figures import Number, number, percent
from pipelines.report.messages import MESSAGES
from pipelines.report.view import TRAINING_KINDS, RunView, StageView

_AXES = {"step", "tokens", "samples", "epoch", "seconds", "time"}  # what curves run along, not what they show
_FIRST = ("loss", "learning_rate")
_FROM_ZERO = {"learning_rate", "tokens_per_second", "mfu"}
TABLE_ROWS = 12


@dataclass(frozen=True)
class Panel:
    """One measured quantity of the stages of one kind."""

    kind: str
    measure: str
    chart: Markup
    legend: list[tuple[str, str]]  # (style, stage name)
    table: list[list[str]]  # step, then one value a stage
    names: list[str]
    stages: list[str]


def panels(run: RunView) -> list[Panel]:
    """Loss first, then the learning rate, then whatever else the curves hold."""
    found = []
    for kind in TRAINING_KINDS:
        stages = [stage for stage in run.of_kind(kind) if curve(stage)]
        measures = [name for name in _FIRST if any(_points(stage, name) for stage in stages)]
        others = {name for stage in stages for point in [*curve(stage), *_timed(stage)] for name in point} - _AXES - set(_FIRST)
        measures += sorted(name for name in others if any(len(_points(stage, name)) > 1 for stage in stages))
        for measure in measures:
            series = [
                Series(stage.name if len(stages) > 1 else "", f"s{index % 8 + 1}", _points(stage, measure))
                for index, stage in enumerate(stages)
            ]
            series = [line for line in series if line.points]
            found.append(
                Panel(
                    kind,
                    measure,
                    charts.lines(series, x_name="step", y_from_zero=measure in _FROM_ZERO),
                    [(line.style, line.name) for line in series if line.name],
                    _table(series),
                    [line.name or measure for line in series],
                    [stage.name for stage in stages],
                )
            )
    return found


def curve(stage: StageView) -> list[dict[str, Any]]:
    """The points of a stage that are points; of one at work those so far."""
    points = stage.stats.get("curve", stage.points)
    return [point for point in points if isinstance(point, dict) and isinstance(point.get("step"), int | float)]


def _timed(stage: StageView) -> list[dict[str, Any]]:
    """Points that are no result but a measurement of the machine: tokens a second, MFU."""
    points = stage.timings.get("curve", [])
    return [point for point in points if isinstance(point, dict) and isinstance(point.get("step"), int | float)]


def _points(stage: StageView, measure: str) -> list[tuple[float, float]]:
    points = [(float(point["step"]), point.get(measure)) for point in [*curve(stage), *_timed(stage)]]
    return sorted((x, float(y)) for x, y in points if isinstance(y, int | float) and not isinstance(y, bool))


def _table(series: list[Series]) -> list[list[str]]:
    steps = sorted({x for line in series for x, _ in line.points})
    if len(steps) > TABLE_ROWS:
        steps = [steps[round(index * (len(steps) - 1) / (TABLE_ROWS - 1))] for index in range(TABLE_ROWS)]
    tables = [dict(line.points) for line in series]
    return [[number(step), *(number(table.get(step)) for table in tables)] for step in steps]


@dataclass(frozen=True)
class Summary:
    stage: StageView
    parameters: Number
    trainable: Number
    steps: Number
    tokens: Number
    samples: Number
    first_loss: float | None
    last_loss: float | None
    speed: float | None  # tokens a second
    mixture: dict[str, Number]  # samples by input stage


def summaries(run: RunView) -> list[Summary]:
    """One line a training stage."""
    found = []
    for stage in run.of_kind(*TRAINING_KINDS):
        if stage.manifest is None:
            continue
        losses = [y for _, y in _points(stage, "loss")]
        found.append(
            Summary(
                stage,
                parameters=stage.count("parameters"),
                trainable=stage.count("trainable_parameters"),
                steps=stage.count("steps"),
                tokens=stage.count("tokens"),
                samples=stage.count("samples"),
                first_loss=losses[0] if losses else None,
                last_loss=losses[-1] if losses else None,
                speed=speed(stage),
                mixture=_mixture(stage),
            )
        )
    return found


def _mixture(stage: StageView) -> dict[str, Number]:
    shares = stage.stats.get("mixture")
    if not isinstance(shares, dict):
        return {}
    return {str(name): share.get("samples", 0) for name, share in shares.items() if isinstance(share, dict)}


def speed(stage: StageView) -> float | None:
    """Tokens a second as the stage has timed itself."""
    for name in ("tokens_per_second", "tokens_per_s", "tokens/s"):
        value = stage.timings.get(name)
        if isinstance(value, int | float):
            return float(value)
    return None


def measure_title(measure: str) -> Markup:
    """The usual measures have names in both languages; others are shown as the trainer calls them."""
    if f"training.{measure}" in MESSAGES:
        return translated(f"training.{measure}")
    return Markup("<code>{}</code>").format(measure)


@dataclass(frozen=True)
class Compared:
    """What a training stage has gained and lost, one sentence a set."""

    stage: StageView
    sentences: list[Markup]
    verdict: Markup | None


def compared(run: RunView) -> list[Compared]:
    """Training stages that scored their model before and after."""
    found = []
    for stage in run.of_kind(*TRAINING_KINDS):
        evaluation = stage.stats.get("evaluation")
        if not isinstance(evaluation, dict):
            continue
        rows = [row for row in evaluation.get("sets", []) if isinstance(row, dict)]
        sentences = [_gain(row) for row in rows]
        for role in ("general", "domain"):
            if not any(row.get("role") == role for row in rows):
                sentences.append(translated("training.not_compared", role=_role(role)))
        found.append(Compared(stage, sentences, _verdict(stage, rows)))
    return found


def _role(role: str) -> Markup:
    return translated("training.general") if role == "general" else translated("training.domain")


def _gain(row: dict[str, Any]) -> Markup:
    accuracy = row.get("measure") == "accuracy"
    before, after = (percent(row[side], 1) if accuracy else number(row[side]) for side in ("before", "after"))
    told = {"set": row["set"], "share": percent(abs(row["lost"]), 1), "before": before, "after": after, "rows": row["rows"]}
    sentence = translated("training.lost", **told) if row["lost"] > 0 else translated("training.gained", **told)
    return Markup("{} {}").format(_role(str(row.get("role"))), sentence)


def _verdict(stage: StageView, rows: list[dict[str, Any]]) -> Markup | None:
    settings = stage.manifest.config.get("evaluate") if stage.manifest is not None else None
    if not isinstance(settings, dict) or settings.get("most_lost") is None:
        return None
    bound = settings["most_lost"]
    kept = all(row["lost"] <= bound for row in rows if row.get("role") == "general")
    if kept:
        verdict = translated("training.within")
    elif settings.get("override"):
        verdict = translated("training.overridden")
    else:
        verdict = translated("training.beyond")
    return translated("training.bound", bound=percent(bound, 1), verdict=verdict)
