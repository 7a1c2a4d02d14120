"""`danlu stats`: counts, lengths, languages and score distributions of a finished stage or of any files it can read."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from typing import Any

import pyarrow as pa
from rich.console import Group
from rich.table import Table
from rich.text import Text

from cluster import storage
from operators import shards
from operators.config import SettingsError, parse
from operators.sources.units import ReadSettings, Unit, plan_units, read_unit
from operators.statistics import Distribution, Statistics
from operators.tokens.encode import Encoder, TokenizerFiles, single_threaded

_GROUPS_SHOWN = 20
_VALUE_CHARACTERS = 60


def stage_directory(path: str) -> str | None:
    """The directory of a finished stage that `path` names: itself, or `RUN/STAGE` by the run's last plan; None for other paths.

    Raises SettingsError for a stage of a run that is not finished.
    """
    if storage.exists(storage.join(path, "manifest.json")):
        return path
    run, _, name = path.rstrip("/").rpartition("/")
    record = storage.join(run, "run.json")
    if not run or not storage.exists(record):
        return None
    stages = json.loads(storage.read_bytes(record))["stages"]
    if name not in stages:
        return None
    directory = storage.join(run, stages[name]["directory"])
    if not storage.exists(storage.join(directory, "manifest.json")):
        raise SettingsError(f"stage {name} of {run} is not finished: `danlu run` finishes it")
    return directory


def statistics(path: str, *, tokenizer: str | None = None, workers: int = 2, options: dict[str, Any] | None = None) -> Statistics:
    """Read every row of a stage (through its removal bitmaps) or of files (`options` are ReadSettings), in `workers` processes.

    Memory is bounded by a batch a process. Raises SettingsError, FileNotFoundError.
    """
    model = TokenizerFiles.load(tokenizer).model if tokenizer else None
    directory = stage_directory(path)
    jobs: Sequence[tuple[Any, ...]]
    if directory is not None:
        if options:
            raise SettingsError(f"{path} is a stage: {sorted(options)} are for files")
        jobs = [(part, None, model) for part in shards.parts([directory]) if part.kept_rows]
    else:
        read = parse(ReadSettings, {"path": path, **(options or {})}, "stats")
        jobs = [(unit.to_json(), read.model_dump(mode="json"), model) for unit in plan_units(read, os.getcwd())]
    total = Statistics()
    for found in _run(jobs, workers):
        total.add(found)
    return total


def _run(jobs: Sequence[tuple[Any, ...]], workers: int) -> Iterator[Statistics]:
    if len(jobs) <= 1 or workers == 1:
        yield from (_measure(*job) for job in jobs)
        return
    with ProcessPoolExecutor(min(workers, len(jobs)), mp_context=multiprocessing.get_context("spawn")) as pool:
        waiting, running = iter(jobs), set[Future[Statistics]]()
        while True:
            while len(running) < 2 * workers and (job := next(waiting, None)) is not None:
                running.add(pool.submit(_measure, *job))
            if not running:
                return
            done, running = wait(running, return_when=FIRST_COMPLETED)
            yield from (future.result() for future in done)


def _measure(piece: Any, read: dict[str, Any] | None, tokenizer: bytes | None) -> Statistics:
    """The statistics of one part of a stage, or of one unit of files."""
    single_threaded()
    found, encoder = Statistics(), Encoder(tokenizer) if tokenizer is not None else None
    if read is None:
        for _, batch in shards.read(piece, batch_rows=2048):
            found.take(pa.Table.from_batches([batch]), encoder)
        return found
    for rows in read_unit(Unit.from_json(piece), parse(ReadSettings, read, "stats")):
        found.take(rows.table, encoder)
        found.unreadable.update(row.reason for row in rows.bad)
    return found


def tables(found: Statistics) -> Group:
    """The statistics as tables for the terminal."""
    head = _table("", "value")
    head.add_row("rows", f"{found.rows:,}")
    for reason, count in sorted(found.unreadable.items()):
        head.add_row(shorten(f"unreadable: {reason}"), f"{count:,}")
    for name, total in sorted(found.sums.items()):
        head.add_row(name, f"{total:,}")
    shown = [head]
    if found.by_language:
        units = ["rows", *(name for name in ("bytes", "characters", "words", "tokens") if name in found.sums)]
        languages = _table("language", *units, "share of characters")
        ranked = sorted(found.by_language.items(), key=lambda item: (-item[1]["rows"], item[0]))
        for name, counts in ranked[:_GROUPS_SHOWN]:
            share = counts["characters"] / max(1, found.sums["characters"])
            languages.add_row(shorten(name), *(f"{counts[unit]:,}" for unit in units), f"{share:.1%}")
        _cut(languages, len(ranked))
        shown.append(languages)
    for column, values in sorted(found.groups.items()):
        if column == "lang":
            continue
        table = _table(column, "rows")
        for value, count in values.most_common(_GROUPS_SHOWN):
            table.add_row(shorten(value), f"{count:,}")
        _cut(table, len(values))
        shown.append(table)
    if found.numbers:
        numbers = _table("distribution", "rows", "missing", "mean", "min", "p10", "p50", "p90", "p99", "max")
        for name, measured in sorted(found.numbers.items()):
            numbers.add_row(shorten(name), f"{measured.count:,}", f"{measured.missing:,}", *_figures(measured))
        shown.append(numbers)
    return Group(*(piece for table in shown for piece in (table, "")))


def shorten(value: str) -> Text:
    """A value on one line, cut to 60 characters; never read as markup."""
    line = " ".join(value.split()) or "(none)"
    return Text(line if len(line) <= _VALUE_CHARACTERS else line[: _VALUE_CHARACTERS - 1] + "…")


def _figures(values: Distribution) -> list[str]:
    known = values.to_json()
    return [f"{known[key]:,.4g}" if key in known else "–" for key in ("mean", "min", "p10", "p50", "p90", "p99", "max")]


def _table(first: str, *others: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column(first, no_wrap=True)
    for name in others:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _cut(table: Table, rows: int) -> None:
    if rows > _GROUPS_SHOWN:
        table.add_row(f"({rows - _GROUPS_SHOWN} more)")
