"""The ledger of every stage added up again, the verdict on the run, and the few numbers that stand at the top."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from pipelines.report.excerpts import translated
from pipelines.report.figures import duration, number, percent
from pipelines.report.view import SYNTHESIS_KINDS, TRAINING_KINDS, RunView, StageView


@dataclass(frozen=True)
class Account:
    """One stage's rows, both sides of the equation."""

    stage: StageView
    rows_in: int
    created: int
    kept: int
    rejected: int
    quarantined: int
    forgotten: int = 0

    @property
    def left(self) -> int:
        return self.rows_in + self.created

    @property
    def right(self) -> int:
        return self.kept + self.rejected + self.quarantined + self.forgotten

    @property
    def balances(self) -> bool:
        return self.left == self.right


@dataclass(frozen=True)
class Balance:
    """An equation about something other than rows: both sides as named terms."""

    stage: StageView
    name: str
    left: list[tuple[str, int]]
    right: list[tuple[str, int]]

    @property
    def sums(self) -> tuple[int, int]:
        return sum(value for _, value in self.left), sum(value for _, value in self.right)

    @property
    def balances(self) -> bool:
        return self.sums[0] == self.sums[1]


def accounts(run: RunView) -> list[Account]:
    """The account of every stage that has a manifest."""
    found = []
    for stage in run.stages:
        if stage.manifest is not None:
            ledger = stage.manifest.ledger
            found.append(
                Account(
                    stage,
                    ledger.rows_in,
                    ledger.created,
                    ledger.kept,
                    ledger.rejected.total(),
                    ledger.quarantined,
                    ledger.forgotten,
                )
            )
    return found


def balances(run: RunView) -> list[Balance]:
    """The other equations that stages have stated."""
    return [
        Balance(stage, str(item["name"]), list(item["left"].items()), list(item["right"].items()))
        for stage in run.stages
        if stage.manifest is not None
        for item in stage.manifest.equations
    ]


@dataclass(frozen=True)
class Verdict:
    """`tone` is good, open (not finished) or bad."""

    tone: str
    sentence: Markup
    reused: int
    equations: int
    stages: int


def verdict(run: RunView) -> Verdict:
    """The one sentence that a reader came for."""
    rows, others = accounts(run), balances(run)
    crooked = [item.stage.name for item in [*rows, *others] if not item.balances]  # type: ignore[attr-defined]
    failed = [stage.name for stage in run.stages if stage.status == "failed"]
    broken = [stage.name for stage in run.stages if stage.status == "missing"]
    done = [stage for stage in run.stages if stage.status == "done"]
    if failed:
        tone, sentence = "bad", translated("verdict.failed", stage=", ".join(failed))
    elif crooked:
        tone, sentence = "bad", translated("verdict.unbalanced", stage=", ".join(dict.fromkeys(crooked)))
    elif broken:
        tone, sentence = "bad", translated("verdict.broken", stage=", ".join(broken))
    elif run.now is not None:
        tone, sentence = "open", translated("verdict.running", done=len(done), total=len(run.stages))
    elif len(done) < len(run.stages):
        tone, sentence = "open", translated("verdict.partial", done=len(done), total=len(run.stages))
    else:
        tone, sentence = "good", translated("verdict.complete")
    return Verdict(tone, sentence, sum(stage.reused for stage in done), len(rows) + len(others), len(run.stages))


@dataclass(frozen=True)
class KeyFigure:
    value: str
    label: Markup
    note: Markup | None = None


def key_figures(run: RunView) -> list[KeyFigure]:
    """The counts that matter, each from the manifests of finished stages; kinds that the recipe lacks are left out."""
    found: list[KeyFigure] = []
    done = {stage.name: stage for stage in run.stages if stage.manifest is not None}
    by_kind = {kind: [stage for stage in done.values() if stage.kind == kind] for kind in {stage.kind for stage in done.values()}}
    rows = {account.stage.name: account for account in accounts(run)}
    corpus = by_kind.get("corpus", [])
    if corpus:
        read, kept = sum(rows[s.name].left for s in corpus), sum(rows[s.name].kept for s in corpus)
        found.append(KeyFigure(number(read), translated("figure.read")))
        found.append(KeyFigure(number(kept), translated("figure.kept"), translated("figure.of_read", share=percent(kept, read))))
    if dedup := by_kind.get("dedup", []):
        removed, compared = sum(rows[s.name].rejected for s in dedup), sum(rows[s.name].left for s in dedup)
        found.append(
            KeyFigure(
                number(removed), translated("figure.duplicates"), translated("figure.of_checked", share=percent(removed, compared))
            )
        )
    if pack := by_kind.get("pack", []):
        tokens, sequences = sum(s.count("tokens") for s in pack), sum(s.count("sequences") for s in pack)
        found.append(KeyFigure(number(tokens), translated("figure.tokens"), translated("figure.sequences", n=number(sequences))))
    synthesis = [stage for kind in SYNTHESIS_KINDS for stage in by_kind.get(kind, [])]
    if synthesis:
        consumed = {name for stage in synthesis for name in stage.inputs}
        last = [stage for stage in synthesis if stage.name not in consumed]  # an earlier round's rows are not counted twice
        calls = sum(stage.count("calls") for stage in synthesis)
        found.append(
            KeyFigure(
                number(sum(stage.manifest.rows for stage in last if stage.manifest)),
                translated("figure.instructions"),
                translated("figure.calls", n=number(calls)),
            )
        )
    if pairs := by_kind.get("preferences", []):
        found.append(KeyFigure(number(sum(stage.manifest.rows for stage in pairs if stage.manifest)), translated("figure.pairs")))
    training = [stage for kind in TRAINING_KINDS for stage in by_kind.get(kind, [])]
    if training:
        found.append(
            KeyFigure(
                number(sum(stage.count("tokens") for stage in training)),
                translated("figure.trained"),
                translated("figure.models", n=len(training)),
            )
        )
    reused = any(stage.reused for stage in done.values())
    found.append(KeyFigure(duration(run.seconds), translated("figure.time"), translated("figure.time_reused") if reused else None))
    return found


def stage_problems(run: RunView) -> list[tuple[StageView, str]]:
    """What failed or unreadable stages said."""
    return [(stage, stage.problem) for stage in run.stages if stage.problem]


def unfinished(stages: list[StageView]) -> list[StageView]:
    return [stage for stage in stages if stage.manifest is None]


def as_terms(account: Account) -> dict[str, Any]:
    """The account's numbers by column, for templates."""
    return {
        "in": account.rows_in,
        "created": account.created,
        "kept": account.kept,
        "rejected": account.rejected,
        "quarantined": account.quarantined,
    }
