"""Decisions made again from stored measures (operators.measures) with other thresholds, without reading text.

A row's new fate follows the chain in order. At a filter that measured it, the filter's `decide` tells; at an operator that
cannot be replayed (it changes the text), what happened there still holds for rows that came that far. A row that comes
further than it did in the stage is undecided from there on, unless no operator that is left can reject it: with
`measure: all` that is only at the next operator that changes text, otherwise at the next filter.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cluster import storage
from operators import registry
from operators.config import SettingsError
from operators.measures import KEPT, Measure, replayable, segments
from operators.operator import Filter, Operator

_BATCH_ROWS = 16384
_UNDECIDED = -2


@dataclass(frozen=True)
class Fate:
    """What becomes of a row: kept, rejected by an operator for a reason, or undecided at an operator."""

    kind: str  # kept, rejected, undecided
    operator: str = ""  # `NN:name`
    reason: str = ""

    def __str__(self) -> str:
        return {"kept": "kept", "rejected": f"{self.operator}: {self.reason}"}.get(self.kind, f"undecided at {self.operator}")


@dataclass
class Example:
    """A row whose fate changes: where it is (position among the kept rows or the rejects of its unit), and the number that
    decides: for a newly rejected row the one that rejects it, otherwise the one that had rejected it."""

    unit: int
    position: int
    lang: str
    value: float | None


@dataclass
class Outcome:
    """Counts of rows by old fate, new fate and language; `disagreeing` rows are not replayed to what the stage decided."""

    rows: int = 0
    disagreeing: int = 0
    fates: Counter[tuple[Fate, Fate, str]] = field(default_factory=Counter)
    examples: dict[tuple[Fate, Fate], list[Example]] = field(default_factory=dict)

    def add(self, other: Outcome, examples: int) -> None:
        self.rows += other.rows
        self.disagreeing += other.disagreeing
        self.fates.update(other.fates)
        for change, found in other.examples.items():
            self.examples[change] = (self.examples.get(change, []) + found)[:examples]


class Replay:
    """The stage's chain with its own settings (`entries`) and with changed ones, for measures kept in a `measure` mode.

    Raises SettingsError when a changed option is unknown, or needs what was not measured.
    """

    def __init__(
        self,
        entries: Sequence[str | dict[str, Any]],
        changed: Sequence[str | dict[str, Any]],
        measure: Measure,
        stored: Sequence[str],
    ) -> None:
        self._old = [registry.build(entry) for entry in entries]
        self._new = [registry.build(entry) for entry in changed]
        self._names = [f"{place:02d}:{operator.name}" for place, operator in enumerate(self._old)]
        self._start = {place: start for start, stop in segments(self._old) for place in range(start, stop)}
        self._measure = measure
        self._columns = {place: [name for name in stored if _place(name) == place] for place in range(len(self._old))}
        self._changed = {place for place, pair in enumerate(zip(entries, changed, strict=True)) if pair[0] != pair[1]}
        for place in sorted(self._changed):
            self._check(place)
        self._certain = len(self._new)  # from this place on nothing can be rejected
        while self._certain and not self._new[self._certain - 1].may_reject():
            self._certain -= 1
        self._decided = {place for place in self._start if self._columns[place] and (not self._changed or self._asks(place))}

    def _asks(self, place: int) -> bool:
        """Whether the new fates need this filter's decisions, beyond what the stage recorded."""
        if self._measure == "all":
            return any(self._start.get(changed) == self._start[place] and changed <= place for changed in self._changed)
        return place in self._changed

    def _check(self, place: int) -> None:
        old, new, name = self._old[place], self._new[place], self._names[place]
        if not replayable(old) or not replayable(new):
            raise SettingsError(f"{name} changes the text: what it would do with other options is known only by a run")
        assert isinstance(old, Filter) and isinstance(new, Filter)
        if not self._columns[place]:
            raise SettingsError(f"{name}: no measures were kept of it")
        made = [column for column in old.adds if f"{place:02d}.{column}" not in self._columns[place]]
        for later in self._old[place + 1 :]:
            if isinstance(later, Filter) and (shared := sorted(set(made) & set(later.reads))):
                raise SettingsError(
                    f"{name} makes column {shared[0]!r} from its decisions, and {later.name} reads it: that needs a run"
                )
        measured = old.measured_as()
        for key, wanted in new.measured_as().items():
            if key not in measured or measured[key] != wanted:
                had = f"measured with {measured[key]!r}" if key in measured else "not measured"
                raise SettingsError(f"{name}: {key} = {wanted!r} was {had}; that changes what is measured and needs a run")

    def part(self, path: str, unit: int, examples: int) -> Outcome:
        """The outcome of one file of measures. Memory is bounded by a row group."""
        outcome = Outcome()
        names = ["position", "step", "reason", "lang", *(name for place in sorted(self._decided) for name in self._columns[place])]
        with storage.open_input(path) as stream:
            for batch in pq.ParquetFile(stream).iter_batches(batch_size=_BATCH_ROWS, columns=names):
                self._batch(batch, unit, examples, outcome)
        return outcome

    def _batch(self, batch: pa.RecordBatch, unit: int, examples: int, outcome: Outcome) -> None:
        old_step = batch.column("step").to_numpy().astype(np.int64)
        old_code, reasons = _encoded(batch.column("reason"))
        count = len(old_step)
        new_step, new_code = np.full(count, KEPT), np.full(count, -1)
        old_value, new_value = np.full(count, np.nan), np.full(count, np.nan)
        disagrees = np.zeros(count, bool)
        walking = np.ones(count, bool)  # rows that come to the place under the new settings
        for place in range(self._certain):
            came = (old_step == KEPT) | (old_step >= place)
            measured = came
            if place in self._start and self._measure == "all":
                measured = (old_step == KEPT) | (old_step >= self._start[place])
            rejected = np.zeros(count, bool)
            if place in self._decided:
                rows = np.flatnonzero(measured)
                code, value = self._decisions(self._old[place], place, batch, rows, reasons)
                told = np.where(old_step[rows] == place, old_code[rows], -1)
                disagrees[rows] |= came[rows] & (code != told)
                old_value[rows] = np.where(old_step[rows] == place, value, old_value[rows])
                if place in self._changed:
                    code, value = self._decisions(self._new[place], place, batch, rows, reasons)
                hit = (code >= 0) & walking[rows]
                rejected[rows[hit]] = True
                new_code[rows[hit]], new_value[rows[hit]] = code[hit], value[hit]
            else:
                measured = came
                rejected = walking & (old_step == place)
                new_code[rejected] = old_code[rejected]
            undecided = walking & ~measured
            new_step[rejected], new_step[undecided] = place, _UNDECIDED - place
            walking &= measured & ~rejected
        outcome.rows += count
        outcome.disagreeing += int(disagrees.sum())
        self._tally(batch, unit, examples, outcome, (old_step, old_code, old_value), (new_step, new_code, new_value), reasons)

    def _decisions(
        self, operator: Operator, place: int, batch: pa.RecordBatch, rows: np.ndarray, reasons: list[str]
    ) -> tuple[np.ndarray, np.ndarray]:
        """(place of the reason in `reasons`, which grows, or -1; value or nan) of the rows."""
        assert isinstance(operator, Filter)
        seen = batch if len(rows) == batch.num_rows else batch.take(pa.array(rows))
        columns: dict[str, Any] = {"position": seen.column("position")}
        scores: dict[str, pa.Array] = {}
        for name in self._columns[place]:
            mark = name[len(name) - len(name.lstrip("0123456789"))]
            (scores if mark == "." else columns)[name.split(mark, 1)[1]] = seen.column(name)
        try:
            reason, value = operator.decide(pa.table(columns), scores)
        except KeyError as error:
            raise SettingsError(
                f"{self._names[place]}: its decision uses {error}, which is neither a score nor in `reads`"
            ) from error
        code, found = _encoded(reason)
        for item in found:
            if item not in reasons:
                reasons.append(item)
        mapped = np.array([reasons.index(item) for item in found] + [-1])
        number = value.cast(pa.float64()).to_numpy(zero_copy_only=False)
        return mapped[code], np.asarray(number, np.float64)

    def _tally(
        self,
        batch: pa.RecordBatch,
        unit: int,
        examples: int,
        outcome: Outcome,
        old: tuple[np.ndarray, np.ndarray, np.ndarray],
        new: tuple[np.ndarray, np.ndarray, np.ndarray],
        reasons: list[str],
    ) -> None:
        lang_code, langs = _encoded(batch.column("lang"))
        columns = {"s": old[0], "r": old[1], "t": new[0], "q": new[1], "l": lang_code, "row": np.arange(len(lang_code))}
        groups = (
            pa.table(columns).group_by(["s", "r", "t", "q", "l"], use_threads=False).aggregate([("row", "count"), ("row", "min")])
        )
        for group in sorted(groups.to_pylist(), key=lambda item: item["row_min"]):
            before, after = self._fate(group["s"], group["r"], reasons), self._fate(group["t"], group["q"], reasons)
            lang = langs[group["l"]] if group["l"] >= 0 else ""
            outcome.fates[before, after, lang] += group["row_count"]
        if not examples:
            return
        position = batch.column("position").to_numpy()
        for row in _first_of_each(old, new, examples):
            change = (self._fate(old[0][row], old[1][row], reasons), self._fate(new[0][row], new[1][row], reasons))
            found = outcome.examples.setdefault(change, [])
            if len(found) < examples:
                value = new[2][row] if change[1].kind == "rejected" else old[2][row]
                lang = langs[lang_code[row]] if lang_code[row] >= 0 else ""
                found.append(Example(unit, int(position[row]), lang, None if np.isnan(value) else float(value)))

    def _fate(self, step: int, code: int, reasons: list[str]) -> Fate:
        if step == KEPT:
            return Fate("kept")
        if step <= _UNDECIDED:
            return Fate("undecided", self._names[_UNDECIDED - step])
        return Fate("rejected", self._names[step], reasons[code])


def _first_of_each(old: tuple[np.ndarray, ...], new: tuple[np.ndarray, ...], examples: int) -> list[int]:
    """The first rows of each change of fate, in order."""
    changed = np.flatnonzero((old[0] != new[0]) | (old[1] != new[1]))
    if not len(changed):
        return []
    keys = np.stack([array[changed] for array in (old[0], old[1], new[0], new[1])], axis=1)
    group = np.unique(keys, axis=0, return_inverse=True)[1].ravel()
    order = np.argsort(group, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(group[order]) > 0])
    rank = np.arange(len(order)) - np.repeat(starts, np.diff(np.r_[starts, len(order)]))
    return sorted(changed[order[rank < examples]].tolist())


def _encoded(values: pa.Array) -> tuple[np.ndarray, list[str]]:
    """(index into the list, -1 for null; the distinct strings)."""
    encoded = pc.dictionary_encode(values.cast(pa.string()))
    codes = pc.fill_null(encoded.indices, -1).to_numpy(zero_copy_only=False).astype(np.int64)
    return codes, encoded.dictionary.to_pylist()


def _place(column: str) -> int:
    """The chain's place of a column of measures, -1 for those that belong to none."""
    digits = column[: len(column) - len(column.lstrip("0123456789"))]
    return int(digits) if digits else -1
