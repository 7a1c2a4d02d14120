"""A stratified sample of a stage's rows, the same whenever it is drawn again.

Strata are made of where a row comes from and by which method it was made. Each gets a few rows at least, the rest go by
size; inside a stratum the rows with the smallest seeded hash of their id are taken. The rows' ids are read once, in bounded
memory; of each stratum no more keys are held than rows are wanted.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cluster import storage
from operators import shards, tables
from operators.config import SettingsError
from operators.synthesis.formats import table_of_schema
from operators.tokens.hashing import hash_strings

Shown = Literal["conversations", "preferences", "labelled", "documents"]
Line = Literal["source", "method", "lang"]
LINES: tuple[Line, ...] = ("source", "method", "lang")
DEFAULT_LINES: tuple[Line, ...] = ("source", "method")

_LEAST = 5  # rows of a stratum, where there are as many and enough are wanted
_MOST_STRATA = 1024
_DRAW, _SIDE, _ORDER = 0x72_65_76_69_65_77, 0x73_69_64_65, 0x6F_72_64_65_72  # "review", "side", "order"
_BATCH_ROWS = 8192


@dataclass(frozen=True)
class Stratum:
    """Rows that agree in the sample's lines, and how many of them were drawn."""

    values: tuple[str, ...]
    rows: int
    drawn: int


@dataclass(frozen=True)
class Item:
    """One drawn row: its ordinal in the stage (-1: it was taken down since), its stratum, and whether a pair is shown with the
    rejected reply first."""

    row: int
    id: str
    stratum: int
    swapped: bool


@dataclass(frozen=True)
class Sample:
    """What reviewers are given. `name` is `ROWS.SEED.LINES.HASH`: what the sample was drawn with, and what it holds."""

    name: str
    stage: str
    fingerprint: str
    table: Shown
    lines: tuple[Line, ...]
    strata: tuple[Stratum, ...]
    items: tuple[Item, ...]

    def to_json(self) -> bytes:
        return json.dumps(asdict(self), indent=1, ensure_ascii=False, sort_keys=True).encode()

    @classmethod
    def from_json(cls, data: bytes) -> Sample:
        values = json.loads(data)
        strata = tuple(Stratum(tuple(item.pop("values")), **item) for item in values.pop("strata"))
        items = tuple(Item(**item) for item in values.pop("items"))
        return cls(lines=tuple(values.pop("lines")), strata=strata, items=items, **values)


def place(stage_directory: str) -> str:
    """Where samples and verdicts of a finished stage lie."""
    run, stage, fingerprint = stage_directory.rstrip("/").rsplit("/", 2)
    return storage.join(run, ".review", stage, fingerprint)


def load(stage_directory: str, name: str) -> Sample:
    """The sample of this name: the one that was kept, else drawn again. Raises SettingsError where the stage has no such one."""
    path = storage.join(place(stage_directory), "samples", f"{name}.json")
    if storage.exists(path):
        return Sample.from_json(storage.read_bytes(path))
    pieces = name.split(".")
    if len(pieces) == 4 and pieces[0].isdecimal() and pieces[1].isdecimal():
        lines = tuple(line for line in LINES if line in pieces[2].split("-"))
        sample = draw(stage_directory, int(pieces[0]), int(pieces[1]), lines)
        if sample.name == name:
            return sample
    stage = stage_directory.rstrip("/").rsplit("/", 2)[1]
    raise SettingsError(f"sample {name!r} is none of stage {stage} as it is now: its rows have changed, or it is another stage's")


def keep(stage_directory: str, sample: Sample) -> None:
    """Write the sample into the run."""
    storage.write_bytes(storage.join(place(stage_directory), "samples", f"{sample.name}.json"), sample.to_json())


def kept(stage_directory: str) -> list[Sample]:
    """The samples that were written into the run, by name."""
    try:
        entries = storage.list_files(storage.join(place(stage_directory), "samples", "*.json"))
    except FileNotFoundError:
        return []
    return [Sample.from_json(storage.read_bytes(entry.path)) for entry in sorted(entries, key=lambda entry: entry.path)]


# --- drawing


class _Lowest:
    """Of one stratum: how many rows there are, and the ordinals of the `most` smallest keys."""

    def __init__(self, most: int) -> None:
        self.rows, self._most = 0, most
        self.keys, self.ordinals = np.zeros(0, np.uint64), np.zeros(0, np.uint64)

    def add(self, keys: np.ndarray, ordinals: np.ndarray) -> None:
        self.rows += len(keys)
        keys, ordinals = np.concatenate([self.keys, keys]), np.concatenate([self.ordinals, ordinals])
        order = np.lexsort((ordinals, keys))[: self._most]
        self.keys, self.ordinals = keys[order], ordinals[order]


def draw(stage_directory: str, rows: int, seed: int = 0, lines: Sequence[Line] = DEFAULT_LINES) -> Sample:
    """A sample of `rows` rows, or of all if there are fewer.

    Raises SettingsError for a stage without rows that people can read, and for more than 1,024 strata.
    """
    manifest = shards.load_manifest(stage_directory)
    parts = shards.parts([stage_directory])
    shown = _shown(manifest.stage, parts)
    found: dict[tuple[str, ...], _Lowest] = {}
    for part in parts:
        with storage.open_input(part.path) as stream:
            names = set(pq.read_schema(stream).names)
        wanted = [name for name in ("id", "source", "lang", "provenance") if name in names]
        for ordinals, batch in shards.read(part, wanted, _BATCH_ROWS):
            _collect(found, batch, ordinals.to_numpy(), lines, seed, rows)
            if len(found) > _MOST_STRATA:
                by = ", ".join(lines)
                raise SettingsError(f"stage {manifest.stage}: more than {_MOST_STRATA} strata by {by}; take fewer with --by")
    keys = sorted(found)
    drawn = allocate([found[key].rows for key in keys], rows)
    strata = tuple(Stratum(key, found[key].rows, count) for key, count in zip(keys, drawn, strict=True))
    chosen = np.concatenate(
        [found[key].ordinals[:count] for key, count in zip(keys, drawn, strict=True)] or [np.zeros(0, np.uint64)]
    )
    stratum = np.repeat(np.arange(len(keys)), drawn)
    ids = _ids(parts, chosen)
    order = np.lexsort((chosen, hash_strings(pa.array(ids, pa.string()), seed ^ _ORDER)))  # strata mixed, so that none is guessed
    sides = hash_strings(pa.array(ids, pa.string()), seed ^ _SIDE) & np.uint64(1)
    items = tuple(Item(int(chosen[at]), ids[at], int(stratum[at]), shown == "preferences" and bool(sides[at])) for at in order)
    fingerprint = stage_directory.rstrip("/").rsplit("/", 1)[-1]
    digest = tables.content_hash([manifest.stage, fingerprint, shown, [asdict(item) for item in items]])[:12]
    name = f"{rows}.{seed}.{'-'.join(lines) or 'all'}.{digest}"
    return Sample(name, manifest.stage, fingerprint, shown, tuple(lines), strata, items)


def allocate(sizes: Sequence[int], wanted: int) -> list[int]:
    """How many rows are drawn of each stratum: a few at least, the rest in proportion to what is left (largest remainder)."""
    size = np.array(sizes, np.int64)
    wanted = min(wanted, int(size.sum()))
    taken = np.minimum(size, min(_LEAST, wanted // max(1, len(size))))
    while (rest := wanted - int(taken.sum())) > 0:
        free = size - taken
        exact = rest * free / free.sum()
        more = np.minimum(np.floor(exact + 1e-9).astype(np.int64), free)
        if not more.any():
            largest = np.lexsort((np.arange(len(size)), -np.round(exact, 9)))[:rest]
            more[largest] = np.minimum(1, free[largest])
        taken += more
    return [int(count) for count in taken]


def _shown(stage: str, parts: Sequence[shards.Part]) -> Shown:
    if not parts:
        raise SettingsError(f"stage {stage} has no rows to review")
    with storage.open_input(parts[0].path) as stream:
        names = pq.read_schema(stream).names
    table = table_of_schema(names) or ("documents" if "text" in names else None)
    if table is None or "id" not in names:
        raise SettingsError(f"stage {stage} has no rows that people could judge: it needs `id` and `messages`, pairs or `text`")
    return table


def _collect(
    found: dict[tuple[str, ...], _Lowest], batch: pa.RecordBatch, ordinals: np.ndarray, lines: Sequence[Line], seed: int, most: int
) -> None:
    columns = [_line(batch, line) for line in lines]
    keys = hash_strings(batch["id"], seed ^ _DRAW)
    joined = pc.binary_join_element_wise(*columns, "\x1f") if columns else pa.array([""] * batch.num_rows)
    encoded = joined.dictionary_encode()
    codes = encoded.indices.to_numpy()
    for code, value in enumerate(encoded.dictionary.to_pylist()):
        here = codes == code
        found.setdefault(tuple(value.split("\x1f")) if lines else (), _Lowest(most)).add(keys[here], ordinals[here])


def _line(batch: pa.RecordBatch, line: Line) -> Any:
    """string[rows]: a row's source is its column `source`, else its generator; its method is what made it."""
    names = batch.schema.names
    if line in names:
        column: Any = batch[line]
    else:
        field = {"source": "generator", "method": "operation"}.get(line, "")
        known = "provenance" in names and batch["provenance"].type.get_field_index(field) >= 0
        column = pc.struct_field(batch["provenance"], field) if known else pa.nulls(batch.num_rows, pa.string())
    return pc.replace_substring(pc.fill_null(column.cast(pa.string()), ""), "\x1f", " ")


def _ids(parts: Sequence[shards.Part], chosen: np.ndarray) -> list[str]:
    found = {ordinal: str(row["id"]) for ordinal, row in rows_at(parts, chosen, ["id"])}
    return [found[int(ordinal)] for ordinal in chosen]


def rows_at(
    parts: Sequence[shards.Part], chosen: np.ndarray, columns: Sequence[str] | None = None
) -> list[tuple[int, dict[str, Any]]]:
    """(ordinal, row) of the rows with these ordinals, in the order of the stage."""
    wanted = np.sort(chosen.astype(np.uint64))
    found: list[tuple[int, dict[str, Any]]] = []
    for part in parts:
        low, high = np.searchsorted(wanted, [part.first_ordinal, part.first_ordinal + part.rows])
        if low == high:
            continue
        for ordinals, batch in shards.read(part, columns, _BATCH_ROWS):
            mask = np.isin(ordinals.to_numpy(), wanted[low:high])
            if mask.any():
                here = ordinals.to_numpy()[mask].tolist()
                found += zip(here, batch.filter(pa.array(mask)).to_pylist(), strict=True)
    return found


def by_ordinal(stage_directory: str, sample: Sample) -> Mapping[int, dict[str, Any]]:
    """The sample's rows, whole."""
    return dict(rows_at(shards.parts([stage_directory]), np.array([item.row for item in sample.items], np.uint64)))
