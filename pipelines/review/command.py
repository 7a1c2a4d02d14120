"""`danlu review`: what its three actions do, as lines to print."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

from rich.console import Group

from cluster import storage
from operators.config import SettingsError, nearest
from pipelines.review import findings, page, sample, verdicts
from pipelines.review.sample import Line
from pipelines.stats import stage_directory


def export(run: str, stage: str, rows: int, seed: int, lines: Sequence[Line], out: str) -> Iterator[str]:
    """Draw a sample, keep it in the run, write its page and its lines. Raises SettingsError, FileNotFoundError."""
    directory = finished(run, stage)
    drawn = sample.draw(directory, rows, seed, lines)
    sample.keep(directory, drawn)
    written = page.write(directory, drawn, out)
    yield f"{len(drawn.items):,} rows of {len(drawn.strata):,} strata, sample {drawn.name}"
    for stratum in drawn.strata:
        name = " · ".join(" ".join(value.split()) or "(unknown)" for value in stratum.values) or "all rows"
        yield f"  {name}: {stratum.drawn:,} of {stratum.rows:,}"
    yield from written


def import_verdicts(run: str, stage: str, files: Sequence[str], reviewer: str | None, replace: bool) -> Iterator[str]:
    """Check and keep verdicts. Raises SettingsError with a line for each problem."""
    directory = finished(run, stage)
    done = verdicts.import_files(directory, files, reviewer, replace)
    told = f"{done.added:,} verdicts imported, {done.replaced:,} replaced, {done.known:,} known already"
    yield f"{told}, {done.open:,} rows not judged; reviewers: {', '.join(sorted(done.reviewers)) or 'none'}"
    found = findings.findings(directory)
    yield f"{stage}: {findings.shown(found.total)}"


def report(run: str, stage: str | None, as_json: bool) -> Iterator[str | Group]:
    """The findings of one stage, or of all that have a sample. Raises SettingsError where there is none."""
    names = [stage] if stage is not None else _reviewed(run)
    found = {name: findings.findings(finished(run, name)) for name in names}
    if not found:
        raise SettingsError(f"nothing of {run} was reviewed: `danlu review export` draws a sample")
    required = {name: findings.requirements(run, name) for name in names}
    if as_json:
        yield json.dumps({name: entry.to_json() for name, entry in found.items()}, ensure_ascii=False)
        return
    for name, entry in found.items():
        yield findings.tables(entry, required[name])


def finished(run: str, stage: str) -> str:
    """The directory of a finished stage of a run. Raises SettingsError, FileNotFoundError."""
    record = storage.join(run, "run.json")
    if not storage.exists(record):
        raise FileNotFoundError(f"{run} is no run: it has no run.json (a run is e.g. runs/quickstart)")
    stages = json.loads(storage.read_bytes(record))["stages"]
    if stage not in stages:
        raise SettingsError(f"{run} has no stage {stage!r}{nearest(stage, list(stages))}")
    found = stage_directory(storage.join(run, stage))
    assert found is not None
    return found


def _reviewed(run: str) -> list[str]:
    """The stages of a run as it is now that a sample was drawn of."""
    record = storage.join(run, "run.json")
    if not storage.exists(record):
        raise FileNotFoundError(f"{run} is no run: it has no run.json (a run is e.g. runs/quickstart)")
    entries = json.loads(storage.read_bytes(record))["stages"]
    return [name for name, entry in entries.items() if sample.kept(storage.join(run, entry["directory"]))]
