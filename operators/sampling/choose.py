"""The two stages that choose rows: `select` (the best or a sample of each group) and `mix` (shares of groups, with repeats).

keys    part -> 20 bytes a row, totals of each group           (committed units, resumed)
passes  radix selection over the keys: a limit for each group  (operators/sampling/radix.py)
write   part -> one removal bitmap for each time the part is read, and the table of the rows that go
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray

from cluster import storage
from operators import shards
from operators.ledger import Ledger, merge_stats
from operators.sampling.card import CardSettings, write_card
from operators.sampling.describe import describe
from operators.sampling.keys import MOST_GROUPS, Order, batches, read_keys, write_keys
from operators.sampling.radix import Search, digits, select
from operators.sampling.raking import SharesError, rake
from operators.shards import Part
from operators.stage import StageContext
from operators.tasks import run_tasks

REMOVED = pa.schema(
    [
        pa.field("ordinal", pa.uint64(), nullable=False),
        pa.field("id", pa.string(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("value", pa.float64()),  # the combined score, null where rows are drawn by chance
    ]
)


@dataclass(frozen=True)
class Choice:
    """What is taken of each group (sorted names): all its rows `whole` times, then those below `limits`."""

    names: tuple[str, ...]
    whole: np.ndarray  # int64[n]
    limits: np.ndarray  # uint64[n]
    all_taken: np.ndarray  # bool[n]: the last time takes everything, too
    reason: str

    @property
    def times(self) -> int:
        """How often a part is read at most."""
        return max(1, int((self.whole + (self.all_taken | (self.limits > 0))).max(initial=0)))

    def taken(self, time: int, groups: np.ndarray, keys: np.ndarray) -> np.ndarray:
        """bool[rows]: whether the rows are taken when their part is read for the (time + 1)-th time."""
        whole = self.whole[groups]
        return (time < whole) | ((time == whole) & (self.all_taken[groups] | (keys < self.limits[groups])))


class Chooser:
    """Groups, measures and chooses the kept rows of finished stages, and finishes the stage as a view."""

    def __init__(self, context: StageContext, inputs: Sequence[str], order: Order, tokenizer: bytes | None = None) -> None:
        self.context, self.order, self.tokenizer = context, order, tokenizer
        self._inputs = list(inputs)
        self.parts: list[tuple[str, Part]] = []
        first = 0
        for name in inputs:  # ordinals run on from one input to the next
            for part in shards.parts([context.inputs[name]]):
                self.parts.append((name, Part(part.path, part.rows, first, part.removed, part.removed_rows)))
                first += part.rows
        self._scratch = storage.join(context.directory, ".scratch", "keys")
        self._records: dict[int, dict[str, Any]] = {}
        self._total = 3 * len(self.parts)

    def measure(self) -> dict[str, dict[str, int]]:
        """`{group: {documents, size}}` of all kept rows, by name. Raises ValueError for more than 4,096 groups."""
        self._records = shards.committed_units(self._scratch)
        shared = ray.put(self.tokenizer)
        jobs = [
            (self._scratch, unit, part, source, self.order, shared)
            for unit, (source, part) in enumerate(self.parts)
            if unit not in self._records
        ]
        self._progress(len(self._records))
        for _, record in run_tasks(self.context, write_keys, jobs):
            self._records[record["unit"]] = record
            self._progress(len(self._records))
        totals: dict[str, Any] = {}
        for record in self._records.values():
            merge_stats(totals, record["stats"]["groups"])
            if len(totals) > MOST_GROUPS:
                by = list(self.order.groups)
                raise ValueError(f"stage {self.context.stage}: more than {MOST_GROUPS} groups by {by}: group by fewer columns")
        self.names = tuple(sorted(totals))
        self._places = {name: place for place, name in enumerate(self.names)}
        return {name: totals[name] for name in self.names}

    def limits(self, targets: np.ndarray) -> Search:
        """The limit of each group (in the order of `measure`) for the sizes int64[n] to take."""
        return select(targets, self._pass)

    def _pass(self, search: Search) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        shared = ray.put(search)
        jobs = [
            (self._scratch, record, self._numbers(record), shared) for _, record in sorted(self._records.items()) if record["parts"]
        ]
        for _, found in run_tasks(self.context, _digits, jobs):
            yield found

    def _numbers(self, record: dict[str, Any]) -> np.ndarray:
        """Group numbers of a part's own numbering in the stage's."""
        return np.array([self._places[name] for name in record["names"]], np.int64)

    def write(self, choice: Choice, stats: dict[str, Any], card: CardSettings | None = None) -> shards.Manifest:
        """Bitmaps, tables of removed rows, the data card if there is to be one, and the manifest."""
        directory, entries = self.context.directory, {}
        shared = ray.put(choice)
        jobs = [
            (
                directory,
                unit,
                part,
                self._scratch,
                self._records[unit],
                self._numbers(self._records[unit]),
                shared,
                source,
                self.order,
            )
            for unit, (source, part) in enumerate(self.parts)
        ]
        for index, entry in run_tasks(self.context, _write, jobs):
            entries[index] = entry
            self._progress(2 * len(self.parts) + len(entries))
        view, created, rejected = [], 0, 0
        for time in range(choice.times):
            for unit, (_, part) in enumerate(self.parts):
                kept = entries[unit]["kept"][time]
                if time and not kept:
                    continue  # nothing of this part is repeated so often
                created += kept if time else 0
                rejected += 0 if time else part.kept_rows - kept
                view.append(
                    {
                        "path": shards.relative_to_run(directory, part.path),
                        "rows": part.rows,
                        "removed": entries[unit]["bitmaps"][time],
                        "removed_rows": part.rows - kept,
                    }
                )
        rows_in = sum(part.kept_rows for _, part in self.parts)
        counts = Counter({choice.reason: rejected}) if rejected else Counter[str]()
        ledger = Ledger(rows_in, created, sum(part["rows"] - part["removed_rows"] for part in view), counts)
        taken: dict[str, Any] = {}
        for entry in entries.values():
            merge_stats(taken, entry["taken"])
        for name, found in stats["groups"].items():
            found["taken"] = taken.get(name, {"documents": 0, "size": 0})
        files: dict[str, Any] = {"removed": [entries[unit]["table"] for unit in sorted(entries) if entries[unit]["table"]]}
        if card is not None:
            stats["shares"] = reached_shares(stats["groups"], self.order.groups)
            stats["mixture"] = self._described(choice)
            files["card"] = write_card(self.context, card, self.order, stats, [self.context.inputs[name] for name in self._inputs])
        return self.context.finish(ledger=ledger, stats=stats, view=view, files=files)

    def _described(self, choice: Choice) -> dict[str, Any]:
        """What the card tells of the rows that were taken, each as often as it was taken."""
        shared = ray.put(choice)
        jobs = [
            (part, source, self._scratch, self._records[unit], self._numbers(self._records[unit]), shared)
            for unit, (source, part) in enumerate(self.parts)
        ]
        found: dict[str, Any] = {}
        for _, entry in run_tasks(self.context, _describe, jobs):
            merge_stats(found, entry)
        return found

    def _progress(self, done: int) -> None:
        self.context.progress(done, self._total, "units")


def _rows(scratch: str, record: dict[str, Any], numbers: np.ndarray) -> Iterator[tuple[np.ndarray, ...]]:
    """(row, group, key, size) of one part's keys, batch by batch."""
    for batch in read_keys(scratch, record):
        row, group, key, size = (batch[name].to_numpy() for name in ("row", "group", "key", "size"))
        yield row, numbers[group], key, size


def _describe(part: Part, source: str, scratch: str, record: dict[str, Any], numbers: np.ndarray, choice: Choice) -> dict[str, Any]:
    """The counts of one part's rows by what the card lists (see describe)."""
    times, sizes = np.zeros(part.rows, np.int64), np.zeros(part.rows, np.int64)
    for row, group, key, size in _rows(scratch, record, numbers):
        sizes[row] = size
        for time in range(choice.times):
            times[row] += choice.taken(time, group, key)
    return describe(part, source, times, sizes)


def _digits(scratch: str, record: dict[str, Any], numbers: np.ndarray, search: Search) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    found = [digits(search, group, key, size) for _, group, key, size in _rows(scratch, record, numbers)]
    cells, size, count = (np.concatenate(column) for column in zip(*found, strict=True))
    unique, place = np.unique(cells, return_inverse=True)
    totals = np.zeros((2, len(unique)), np.int64)
    np.add.at(totals[0], place, size)
    np.add.at(totals[1], place, count)
    return unique, totals[0], totals[1]


def _write(
    directory: str, unit: int, part: Part, scratch: str, record: dict[str, Any], numbers: np.ndarray,
    choice: Choice, source: str, order: Order,
) -> dict[str, Any]:  # fmt: skip
    """The bitmaps of one part and the table of its rows that are never taken. Written again by a retry, byte for byte."""
    removed = np.ones((choice.times, part.rows), bool)
    documents, sizes = np.zeros(len(choice.names), np.int64), np.zeros(len(choice.names), np.int64)
    for row, group, key, size in _rows(scratch, record, numbers):
        for time in range(choice.times):
            taken = choice.taken(time, group, key)
            removed[time, row[taken]] = False
            documents += np.bincount(group[taken], minlength=len(documents))
            np.add.at(sizes, group[taken], size[taken])
    entry: dict[str, Any] = {"kept": (~removed).sum(axis=1).tolist(), "bitmaps": [], "table": None}
    for time in range(choice.times):
        name = (
            shards.save_bitmap(directory, unit, removed[time])
            if removed[time].any() and (not time or entry["kept"][time])
            else None
        )
        entry["bitmaps"].append(name)
    entry["taken"] = {
        choice.names[group]: {"documents": int(documents[group]), "size": int(sizes[group])} for group in np.flatnonzero(documents)
    }
    if entry["kept"][0] < part.kept_rows:
        entry["table"] = _removed_table(directory, unit, part, removed[0], choice.reason, source, order)
    return entry


def _removed_table(directory: str, unit: int, part: Part, removed: np.ndarray, reason: str, source: str, order: Order) -> str:
    scratch = storage.scratch_file(directory)
    with pq.ParquetWriter(scratch, REMOVED, compression="zstd") as writer:
        plain = Order(order.seed, "documents", (), order.scores, order.combine, order.highest)
        ids = shards.read(part, ["id"], 2048)
        for (ordinals, batch), (_, scores) in zip(ids, batches(part, source, plain, None), strict=True):
            gone = removed[(ordinals.to_numpy() - np.uint64(part.first_ordinal)).astype(np.int64)]
            if gone.any():
                mask = pa.array(gone)
                columns = [
                    ordinals.filter(mask), batch["id"].cast(pa.string()).filter(mask),
                    pa.array([reason] * int(gone.sum())), pa.array(scores[gone], mask=np.isnan(scores[gone])),
                ]  # fmt: skip
                writer.write_table(pa.table(columns, schema=REMOVED))
    return shards.publish_by_content(scratch, directory, "removed", unit)


def select_stage(
    context: StageContext,
    inputs: Sequence[str],
    order: Order,
    *,
    fraction: float | None = None,
    amount: int | None = None,
    tokenizer: bytes | None = None,
) -> None:
    """Keep the first rows of each group up to `fraction` of its size, or up to `amount`."""
    chooser = Chooser(context, inputs, order, tokenizer)
    groups = chooser.measure()
    sizes = np.array([found["size"] for found in groups.values()], np.int64)
    targets = np.floor(sizes * fraction + 0.5).astype(np.int64) if fraction is not None else np.full(len(sizes), amount, np.int64)
    search = chooser.limits(targets)
    reason = "select:below" if order.scores else "select:not_drawn"
    choice = Choice(chooser.names, np.zeros(len(sizes), np.int64), search.limits, search.all_taken, reason)
    chooser.write(choice, {"unit": order.unit, "groups": groups})


def shares_of(sizes: dict[str, int], weights: dict[str, float] | None, temperature: float, stage: str) -> dict[str, float]:
    """The share of each group, summing to 1: by weights (`*` stands for each other group), else by size ** (1 / temperature).

    Raises ValueError for a weight of a group that is not there or has no rows.
    """
    present = {name for name, size in sizes.items() if size}
    if weights is None:
        raw = {name: sizes[name] ** (1.0 / temperature) for name in sizes if name in present}
    else:
        unknown = [name for name in weights if name != "*" and weights[name] > 0 and name not in present]
        if unknown:
            raise ValueError(f"stage {stage}: weights name {unknown}, but the groups with rows are {sorted(present)}")
        raw = {name: weights.get(name, weights.get("*", 0.0)) for name in sizes if name in present}
    total = sum(raw.values())
    if not total > 0:
        raise ValueError(f"stage {stage}: no group has a weight above 0 (groups with rows: {sorted(present)})")
    return {name: raw.get(name, 0.0) / total for name in sizes}


def raked_shares(sizes: dict[str, int], shares: Mapping[str, Mapping[str, float]], stage: str) -> dict[str, float]:
    """The share of each group so that all `shares` are met (see raking). Raises ValueError."""
    keys = [tuple(name.split("|")) for name in sizes]
    odd = next((name for name, key in zip(sizes, keys, strict=True) if len(key) != len(shares)), None)
    if odd is not None:
        raise ValueError(f"stage {stage}: a value of {list(shares)} holds a `|` ({odd!r}), which joins values; rename it")
    try:
        found = rake(keys, list(sizes.values()), shares)
    except SharesError as error:
        raise ValueError(f"stage {stage}: {error}") from None
    return dict(zip(sizes, found.tolist(), strict=True))


def reached_shares(groups: Mapping[str, Mapping[str, Any]], lines: Sequence[str]) -> dict[str, dict[str, dict[str, float]]]:
    """`{line: {value: {target, reached, error}}}` of sizes, for each column that makes the groups."""
    total = sum(group["taken"]["size"] for group in groups.values()) or 1
    found: dict[str, dict[str, dict[str, float]]] = {line: {} for line in lines}
    for name, group in groups.items():
        values = name.split("|") if name.count("|") == len(lines) - 1 else [name] * len(lines)
        for line, value in zip(lines, values, strict=True):
            entry = found[line].setdefault(value, {"target": 0.0, "reached": 0.0, "documents": 0, "size": 0})
            entry["target"] += group["share"]
            entry["size"] += group["taken"]["size"]
            entry["documents"] += group["taken"]["documents"]
    for entries in found.values():
        for entry in entries.values():
            entry["target"] = round(entry["target"], 6)
            entry["reached"] = round(entry["size"] / total, 6)
            entry["error"] = round(entry["reached"] - entry["target"], 6)
    return found


def mix_stage(
    context: StageContext,
    inputs: Sequence[str],
    order: Order,
    *,
    weights: dict[str, float] | None,
    shares: Mapping[str, Mapping[str, float]] | None = None,
    card: CardSettings | None = None,
    temperature: float,
    total: int | None,
    max_repeats: float,
    tokenizer: bytes | None = None,
) -> None:
    """Bring the groups to their shares by leaving rows out and repeating them (see shares_of and raked_shares).

    `total` is the size of the mixture; left out, it is the largest that repeats no group more than `max_repeats` times.
    Raises ValueError, naming the group, when `total` would repeat one more often.
    """
    chooser = Chooser(context, inputs, order, tokenizer)
    groups = chooser.measure()
    sizes = {name: found["size"] for name, found in groups.items()}
    if shares is not None:
        wanted_shares = raked_shares(sizes, shares, context.stage)
    else:
        wanted_shares = shares_of(sizes, weights, temperature, context.stage)
    wanted = {name: share for name, share in wanted_shares.items() if share > 0}
    if total is None:
        total = int(min(max_repeats * sizes[name] / share for name, share in wanted.items()))
    repeats = {name: total * share / sizes[name] if sizes[name] else 0.0 for name, share in wanted_shares.items()}
    worst = max(repeats, key=lambda name: repeats[name])
    if repeats[worst] > max_repeats * (1 + 1e-9):
        raise ValueError(
            f"stage {context.stage}: a total of {total} {order.unit} would repeat {worst!r} {repeats[worst]:.2f} times "
            f"({sizes[worst]} {order.unit}, share {wanted_shares[worst]:.4f}); "
            f"lower `total` or its weight, or raise `max_repeats` ({max_repeats})"
        )
    whole = np.array([int(repeats[name]) for name in groups], np.int64)
    targets = np.array([max(0, round(total * wanted_shares[name]) - int(repeats[name]) * sizes[name]) for name in groups], np.int64)
    search = chooser.limits(targets)
    nothing = targets == 0
    search.limits[nothing], search.all_taken[nothing] = 0, False
    stats = {
        name: {**found, "share": round(wanted_shares[name], 6), "repeats": round(repeats[name], 4)}
        for name, found in groups.items()
    }
    choice = Choice(chooser.names, whole, search.limits, search.all_taken, "mix:not_drawn")
    chooser.write(choice, {"unit": order.unit, "total": total, "groups": stats}, card or CardSettings())
