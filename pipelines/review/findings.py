"""The findings of a review: acceptance of a stage by strata, reviewers and their agreement, and whether a requirement is met."""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from rich.console import Group
from rich.table import Table
from rich.text import Text

from cluster import storage
from operators import shards
from operators.config import Settings, SettingsError
from pipelines.review.agreement import Agreement, Estimate, agreements, estimate, total
from pipelines.review.sample import Sample, kept, load
from pipelines.review.verdicts import SKIP, Verdict, accepts, imported, meaning


@dataclass(frozen=True)
class Findings:
    """What reviewers found of a stage. `rejected` are the ordinals of rows that most of their reviewers do not accept."""

    stage: str
    table: str
    lines: tuple[str, ...]
    strata: dict[tuple[str, ...], Estimate]
    total: Estimate
    verdicts: dict[str, int]
    reviewers: dict[str, int]
    agreement: list[Agreement]
    rejected: tuple[int, ...]

    def to_json(self) -> dict[str, Any]:
        strata = [dict(zip(self.lines, key, strict=True)) | asdict(found) for key, found in self.strata.items()]
        values = {name: getattr(self, name) for name in ("stage", "table", "verdicts", "reviewers")}
        return values | {"strata": strata, "total": asdict(self.total), "agreement": [asdict(item) for item in self.agreement]}


def findings(stage_directory: str, verdicts: Iterable[Verdict] | None = None, confidence: float = 0.95) -> Findings:
    """Of all verdicts that are imported, or of those given.

    A row that several judged counts once, with the share of its votes that accept. Raises SettingsError when verdicts of
    samples with other lines of strata are mixed.
    """
    samples: dict[str, Sample] = {sample.name: sample for sample in kept(stage_directory)}
    votes: dict[int, list[bool]] = defaultdict(list)
    strata: dict[int, tuple[str, ...]] = {}
    sizes: dict[tuple[str, ...], int] = {}
    lines: set[tuple[str, ...]] = set()
    said: dict[str, dict[int, str]] = defaultdict(dict)
    counts: Counter[str] = Counter()
    table: str = next(iter(samples.values())).table if samples else "conversations"
    given = list(imported(stage_directory) if verdicts is None else verdicts)
    for name in sorted({verdict.sample for verdict in given} - samples.keys()):
        samples[name] = load(stage_directory, name)
    used = {verdict.sample for verdict in given} or set(samples)
    for name in sorted(used):
        lines.add(samples[name].lines)
        sizes |= {stratum.values: stratum.rows for stratum in samples[name].strata}
    if len(lines) > 1:
        told = " and ".join(", ".join(line) or "none" for line in sorted(lines))
        raise SettingsError(f"verdicts of samples with different strata ({told}) cannot be put together")
    for verdict in given:
        sample = samples[verdict.sample]
        item = sample.items[verdict.item]
        table = sample.table
        if item.row < 0:  # the row was taken down (pipelines.forget)
            continue
        counts[meaning(sample.table, item, verdict.verdict)] += 1
        if verdict.verdict == SKIP or item.row in said[verdict.reviewer]:
            continue
        said[verdict.reviewer][item.row] = meaning(sample.table, item, verdict.verdict)
        votes[item.row].append(accepts(sample.table, item, verdict.verdict))
        strata[item.row] = sample.strata[item.stratum].values
    values: dict[tuple[str, ...], list[float]] = defaultdict(list)
    for row in sorted(votes):
        values[strata[row]].append(sum(votes[row]) / len(votes[row]))
    found = {key: estimate(sizes[key], values[key], confidence) for key in sorted(sizes)}
    return Findings(
        stage_directory.rstrip("/").rsplit("/", 2)[1], table, next(iter(lines), ()), found, total(list(found.values()), confidence),
        dict(sorted(counts.items())), {name: len(rows) for name, rows in sorted(said.items())}, agreements(said),
        tuple(row for row in sorted(votes) if sum(votes[row]) * 2 < len(votes[row])),
    )  # fmt: skip


class Requirement(Settings):
    """What a review must have found before a stage may go on."""

    min_acceptance: float
    bound: Literal["lower", "point"] = "lower"
    per: Literal["total", "stratum"] = "total"
    min_rows: int = 30
    confidence: float = 0.95

    def unmet(self, found: Findings) -> list[str]:
        """A line for each thing that is missing; none when the requirement is met."""
        lines = []
        if found.total.judged < self.min_rows:
            lines.append(f"{found.total.judged} rows are judged, {self.min_rows} are needed")
        checked = {"in total": found.total}
        if self.per == "stratum":
            checked |= {f"for {'|'.join(key)}": stratum for key, stratum in found.strata.items()}
        for where, entry in checked.items():
            value = entry.low if self.bound == "lower" else entry.point
            if value is None or value < self.min_acceptance:
                lines.append(
                    f"acceptance {where} is {shown(entry)}, its {self.bound_name} must be at least {self.min_acceptance:.1%}"
                )
        return lines

    @property
    def bound_name(self) -> str:
        return f"lower bound ({self.confidence:.0%} interval)" if self.bound == "lower" else "point estimate"


def shown(found: Estimate) -> str:
    """`87.5% (78.1% to 93.3%, 64 of 1,000 rows judged)`."""
    if found.point is None:
        return f"unknown (none of {found.rows:,} rows is judged)"
    return f"{found.point:.1%} ({found.low:.1%} to {found.high:.1%}, {found.judged:,} of {found.rows:,} rows judged)"


def requirements(run_directory: str, stage: str) -> list[tuple[str, Requirement]]:
    """The `reviewed` stages of a run that ask for a review of this stage, by name."""
    path = storage.join(run_directory, "run.json")
    entries = json.loads(storage.read_bytes(path))["stages"] if storage.exists(path) else {}
    found = []
    for name, entry in entries.items():
        manifest = storage.join(run_directory, entry["directory"], "manifest.json")
        if entry["kind"] == "reviewed" and entry["inputs"] == [stage] and storage.exists(manifest):
            config = shards.load_manifest(storage.join(run_directory, entry["directory"])).config
            found.append((name, Requirement(**{field: config[field] for field in Requirement.model_fields})))
    return found


def tables(found: Findings, required: Sequence[tuple[str, Requirement]] = ()) -> Group:
    """The findings for the terminal."""
    title = "held better: the chosen reply" if found.table == "preferences" else "acceptance"
    strata = _table(found.stage, title)
    for name in (*found.lines, "rows", "judged", title, "95% interval"):
        strata.add_column(name, justify="left" if name in found.lines else "right", no_wrap=True)
    for key, entry in found.strata.items():
        strata.add_row(*(_text(value) for value in key), *_figures(entry))
    strata.add_row(*(["total"] + [""] * (len(found.lines) - 1) if found.lines else []), *_figures(found.total))
    pieces: list[Any] = [strata, ""]
    counts = ", ".join(f"{verdict} {count:,}" for verdict, count in found.verdicts.items()) or "none yet"
    pieces += [
        Text(f"verdicts: {counts}"),
        Text(f"reviewers: {', '.join(f'{n} ({c:,})' for n, c in found.reviewers.items()) or 'none'}"),
    ]
    for pair in found.agreement:
        kappa = "undefined (one verdict only)" if pair.kappa is None else f"{pair.kappa:.2f}"
        pieces.append(Text(f"agreement: {pair.first} and {pair.second} on {pair.rows:,} rows: {pair.agreed:.1%}, kappa {kappa}"))
    for name, requirement in required:
        unmet = requirement.unmet(found)
        pieces.append(Text(f"required by {name}: " + ("met" if not unmet else "NOT met: " + "; ".join(unmet))))
    return Group(*pieces)


def _table(stage: str, title: str) -> Table:
    return Table(
        title=f"{stage}: {title}", title_justify="left", box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0)
    )


def _text(value: str) -> Text:
    line = " ".join(value.split()) or "(unknown)"
    return Text(line if len(line) <= 40 else line[:39] + "…")


def _figures(found: Estimate) -> list[str]:
    if found.point is None or math.isnan(found.point):
        return [f"{found.rows:,}", "0", "–", "–"]
    return [f"{found.rows:,}", f"{found.judged:,}", f"{found.point:.1%}", f"{found.low:.1%} – {found.high:.1%}"]
