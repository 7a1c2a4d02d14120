"""Which rows of a run are a document, descend from it, or name it: every Parquet file of every stage directory is looked at.

Only columns of ids are read, batch by batch. What is remembered grows with the rows that are to be forgotten, not with the run.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cluster import storage
from operators import shards, tombstones

_BATCH_ROWS = 65_536
_PASSAGE = r"#\d+-\d+$"  # what a chunk's name has after the id of its document (operators.synthesis.documents.passage)
_MENTIONS = ("match_id", "kept_id")  # columns that name another row than their own
_MADE_FROM = ("source_id", "provenance")
_WORKING = (".scratch", "keys", "work")
MODEL_KINDS = ("pretrain", "sft", "dpo", "kto", "reward", "grpo")
READS_FILES = ("corpus", "conversations", "rankings", "self_instruct")
"""Kinds whose rows come from files, not from other stages: an unfinished one keeps its committed units."""


@dataclass
class StageDirectory:
    """One fingerprint of one stage, also one that the recipe has left behind: its rows lie there all the same."""

    name: str
    relative: str  # STAGE/FINGERPRINT
    path: str
    kind: str
    manifest: shards.Manifest | None
    inputs: list[str]  # relative
    current: bool  # run.json names it

    @property
    def trains(self) -> bool:
        return self.kind in MODEL_KINDS


@dataclass
class FileHits:
    """The rows of one Parquet file that go, and those that stay but name one that goes."""

    relative: str  # to the stage's directory
    rows: int
    gone: np.ndarray  # int64, ascending
    mentions: bool = False
    fates: Counter[str] = field(default_factory=Counter)  # of rejects and removed rows: `operator:reason` or `quarantined`
    sequences: list[int] = field(default_factory=list)  # of packed rows: the sequences that hold pieces

    @property
    def folder(self) -> str:
        return self.relative.partition("/")[0]


@dataclass
class Found:
    """All that a takedown has to touch."""

    asked: dict[str, bool]  # id -> whether a row of the run is, or names, it
    ids: set[str]  # those asked for and those of rows that descend from them
    hits: dict[str, list[FileHits]]  # STAGE/FINGERPRINT -> its files

    def lost(self, relative: str) -> dict[str, FileHits]:
        """The files of a stage's rows that lose some, by their name."""
        return {hit.relative: hit for hit in self.hits.get(relative, []) if len(hit.gone) and hit.folder in ("parts", "data")}


def directories(run_directory: str) -> list[StageDirectory]:
    """Every stage directory, every one after those that it reads.

    Raises FileNotFoundError when the directory is no run.
    """
    path = storage.join(run_directory, "run.json")
    if not storage.exists(path):
        raise FileNotFoundError(f"{run_directory} is no run: it has no run.json (a run is e.g. runs/quickstart)")
    record = json.loads(storage.read_bytes(path))
    present = {directory[len(run_directory.rstrip("/")) + 1 :]: directory for directory in shards.stage_directories(run_directory)}
    named = {record["stages"][name]["directory"]: name for name in record["order"]}
    found = []
    for relative in [*(item for item in named if item in present), *(item for item in present if item not in named)]:
        stage = relative.partition("/")[0]
        entry = record["stages"].get(stage, {})
        done = storage.exists(storage.join(present[relative], "manifest.json"))
        manifest = shards.load_manifest(present[relative]) if done else None
        if manifest is not None:
            kind, inputs = manifest.kind, list(manifest.inputs.values())
        else:
            kind = str(entry.get("kind", "unknown"))
            inputs = [record["stages"][name]["directory"] for name in entry.get("inputs", [])]
        found.append(StageDirectory(stage, relative, present[relative], kind, manifest, inputs, relative in named))
    return _inputs_first(found)


def _inputs_first(stages: list[StageDirectory]) -> list[StageDirectory]:
    """In the order given, but every directory after those that it reads."""
    ordered: dict[str, StageDirectory] = {}
    waiting = {stage.relative: stage for stage in stages}
    while waiting:
        ready = [stage for stage in waiting.values() if not set(stage.inputs) & (waiting.keys() - {stage.relative})]
        for stage in ready or list(waiting.values()):  # a cycle cannot be, but must not hang
            ordered[stage.relative] = waiting.pop(stage.relative)
    return list(ordered.values())


def search(stages: list[StageDirectory], asked: list[str]) -> Found:
    """Follow lineage until nothing new is found, then look at every file for the ids that were found."""
    ids = set(asked)
    files = {stage.relative: list(_files(stage)) for stage in stages}
    while True:
        before = len(ids)
        for stage in stages:
            for relative in files[stage.relative]:
                ids |= _descendants(storage.join(stage.path, relative), ids)
        if len(ids) == before:
            break
    found = Found(dict.fromkeys(asked, False), ids, {})
    values = pa.array(sorted(ids), pa.string())
    for stage in stages:
        hits = []
        for relative in files[stage.relative]:
            hit = _look(stage, relative, values, found.asked)
            if hit is not None:
                hits.append(hit)
        if hits:
            found.hits[stage.relative] = hits
    return found


def _files(stage: StageDirectory) -> Iterator[str]:
    """Parquet files with rows: not those in work, nor the long lists of a manifest, nor what trainings gave out."""
    for entry in storage.list_all(stage.path):
        folders = entry.relative.split("/")[:-1]
        if entry.relative.endswith(".parquet") and folders and not any(name in _WORKING for name in folders):
            yield entry.relative


def _batches(path: str, wanted: Sequence[str], needed: Sequence[str] = ()) -> Iterator[tuple[int, dict[str, pa.Array]]]:
    """(first row, columns) of the columns that the file has; `provenance` gives the lists of parents. Nothing of a file that has
    none of those `needed`."""
    with storage.open_input(path) as stream:
        file = pq.ParquetFile(stream)
        schema = file.schema_arrow
        names = [item.name for item in schema if item.name != "provenance" or _has_parents(item.type)]
        present = [name for name in wanted if name in names]
        read = ["provenance.parents" if name == "provenance" else name for name in present]
        if not present or (needed and not set(needed) & set(names)):
            return
        start = 0
        for batch in file.iter_batches(batch_size=_BATCH_ROWS, columns=read):
            columns = {name: batch.column(name) for name in present}
            if "provenance" in columns:
                columns["provenance"] = pc.struct_field(columns["provenance"], "parents")
            yield start, columns
            start += batch.num_rows


def _has_parents(provenance: pa.DataType) -> bool:
    """False for a column of this name that a user's own operator has made of something else."""
    return pa.types.is_struct(provenance) and provenance.get_field_index("parents") >= 0


def _hit(values: pa.Array, wanted: pa.Array, passages: bool = False) -> np.ndarray:
    """bool[rows]: the value (or one of a list) is wanted."""
    if pa.types.is_list(values.type) or pa.types.is_large_list(values.type):
        inner = pc.is_in(values.flatten().cast(pa.string()), value_set=wanted)
        mask = np.zeros(len(values), bool)
        mask[pc.list_parent_indices(values).filter(inner).to_numpy(zero_copy_only=False)] = True
        return mask
    if pa.types.is_dictionary(values.type):
        values = values.cast(pa.string())
    if not (pa.types.is_string(values.type) or pa.types.is_large_string(values.type)):
        return np.zeros(len(values), bool)
    values = values.cast(pa.string())
    mask = pc.is_in(values, value_set=wanted)
    if passages:
        mask = pc.or_(mask, pc.is_in(pc.replace_substring_regex(values, _PASSAGE, ""), value_set=wanted))
    return np.asarray(mask.to_numpy(zero_copy_only=False))


def _descendants(path: str, ids: set[str]) -> set[str]:
    """Ids of rows that were made from rows with these ids."""
    wanted = pa.array(sorted(ids), pa.string())
    found: set[str] = set()
    for _, columns in _batches(path, ["id", *_MADE_FROM], needed=_MADE_FROM):
        if "id" not in columns:
            return found
        mask = np.zeros(len(columns["id"]), bool)
        for name in _MADE_FROM:
            if name in columns:
                mask |= _hit(columns[name], wanted)
        if mask.any():
            found |= set(columns["id"].filter(pa.array(mask)).to_pylist())
    return found


def _look(stage: StageDirectory, relative: str, wanted: pa.Array, asked: dict[str, bool]) -> FileHits | None:
    """The rows of one file that are, descend from, or name a wanted row."""
    path = storage.join(stage.path, relative)
    folder = relative.partition("/")[0]
    if (stage.trains or stage.kind == "evaluate") and folder == "parts":
        return None  # which samples a training took, what a row scored: ids and numbers, no text; they tell which model saw what
    packed = stage.kind == "pack" and folder == "parts"
    rejects = folder == "rejects" and stage.kind != "corpus"  # `source` is the row that a reject was made from
    columns = ["documents", "sequence"] if packed else ["id", "source_id", "provenance", *_MENTIONS]
    columns += ["source"] if rejects else []
    columns += ["operator", "reason", "quarantined"] if folder in ("rejects", "removed") else []
    gone, mentions, fates, sequences, rows = [], False, Counter[str](), list[int](), 0
    for start, batch in _batches(path, columns):
        count = len(next(iter(batch.values())))
        rows = start + count
        mask = np.zeros(count, bool)
        for name in ("id", "source_id", "provenance", "documents", *(["source"] if rejects else [])):
            if name in batch:
                own = _hit(batch[name], wanted, passages=folder == "rejects")
                mask |= own
                if name != "source" and own.any():
                    _tell(batch[name].filter(pa.array(own)), asked)
        for name in _MENTIONS:
            mentions = mentions or (name in batch and bool((_hit(batch[name], wanted) & ~mask).any()))
        if mask.any():
            gone.append(np.flatnonzero(mask) + start)
            fates.update(_fates({name: batch[name].filter(pa.array(mask)) for name in batch}))
            if packed:
                sequences += batch["sequence"].filter(pa.array(mask)).to_pylist()
    positions = np.concatenate(gone) if gone else np.zeros(0, np.int64)
    return FileHits(relative, rows, positions, mentions, fates, sequences) if len(positions) or mentions else None


def _tell(values: pa.Array, asked: dict[str, bool]) -> None:
    """Note the ids asked for that were seen."""
    flat = values.flatten() if pa.types.is_list(values.type) or pa.types.is_large_list(values.type) else values
    for value in pc.unique(flat.cast(pa.string())).to_pylist():
        if value in asked:
            asked[value] = True


def _fates(columns: dict[str, pa.Array]) -> Counter[str]:
    """What rejects and removed rows are counted as in the ledger."""
    if "reason" not in columns:
        return Counter()
    reasons = columns["reason"].to_pylist()
    if "operator" not in columns:
        return Counter(reasons)
    operators, quarantined = columns["operator"].to_pylist(), columns["quarantined"].to_pylist()
    return Counter(
        "quarantined" if aside else f"{operator}:{reason}"
        for operator, reason, aside in zip(operators, reasons, quarantined, strict=True)
    )


def holding(stages: list[StageDirectory], found: Found) -> dict[str, int]:
    """Rows (of packed stages: sequences) that each stage gave to those that read it and that held what is to be forgotten."""
    held: dict[str, int] = {}
    lost: dict[str, FileHits] = {}
    for stage in stages:
        for name, hit in found.lost(stage.relative).items():
            lost[f"{stage.relative}/{name}"] = hit
            held[stage.relative] = held.get(stage.relative, 0) + len(hit.gone)
    for stage in stages:
        if stage.manifest is None or stage.manifest.view is None:
            continue
        for entry in stage.manifest.view:
            if entry["path"] in lost:
                part = shards.Part("", entry["rows"], 0, _bitmap(stage, entry), entry["removed_rows"])
                kept = int((~shards.load_bitmap(part)[lost[entry["path"]].gone]).sum())
                held[stage.relative] = held.get(stage.relative, 0) + kept
    return {name: count for name, count in held.items() if count}


def _bitmap(stage: StageDirectory, entry: dict[str, Any]) -> str | None:
    return storage.join(stage.path, entry["removed"]) if entry["removed"] else None


@dataclass
class Saw:
    """A model (or tokenizer, or classifier) that what is to be forgotten went into. `samples` and steps where they are logged."""

    stage: str
    relative: str
    kind: str
    samples: int | None
    rows: int  # distinct rows (of packed corpora: sequences) of its inputs
    first_step: int | None
    last_step: int | None
    checkpoint_before: str | None  # the last one that is kept from before the first of these steps
    through: list[str]  # models that it was made from and that saw it
    finished: bool

    def to_json(self) -> dict[str, Any]:
        return dict(self.__dict__)


def models(stages: list[StageDirectory], found: Found, held: dict[str, int]) -> list[Saw]:
    """The models of the run that saw it, directly or through the model they were made from, in the order of the stages."""
    seen: dict[str, Saw] = {}
    by_relative = {stage.relative: stage for stage in stages}
    for stage in stages:
        makes = stage.trains or (stage.manifest is not None and _makes_model(stage.manifest))
        if not makes:
            continue
        through = [by_relative[item].name for item in stage.inputs if item in seen and item not in held]
        rows = sum(held.get(item, 0) for item in stage.inputs)
        samples, first, last = _samples(stage, by_relative, found) if stage.trains else (None, None, None)
        direct = bool(samples) if samples is not None else bool(rows)
        if direct or through:
            before = _checkpoint_before(stage.path, first)
            finished = stage.manifest is not None
            seen[stage.relative] = Saw(
                stage.name, stage.relative, stage.kind, samples, rows, first, last, before, through, finished
            )  # fmt: skip
    return list(seen.values())


def _makes_model(manifest: shards.Manifest) -> bool:
    """True for what was learnt from rows, or is made of what was: tokenizers, classifiers, merges, promoted models."""
    if manifest.kind == "pack":  # holds a copy of its tokenizer
        return False
    return bool({"model", "tokenizer", "fisher", "adapter"} & set(manifest.files))


def _samples(
    stage: StageDirectory, by_relative: dict[str, StageDirectory], found: Found
) -> tuple[int | None, int | None, int | None]:
    """(samples, first step, last step) by the log of samples; None where the stage keeps none."""
    logs = [entry.relative for entry in storage.list_all(storage.join(stage.path, "parts")) if entry.relative.endswith(".parquet")]
    if not logs:
        return None, None, None
    packed = {
        by_relative[item].name: {str(number) for hit in found.hits.get(item, []) for number in hit.sequences}
        for item in stage.inputs
        if item in by_relative and by_relative[item].kind == "pack"
    }
    plain = pa.array(sorted(found.ids), pa.string())
    count, first, last = 0, None, None
    for name in logs:
        for _, batch in _batches(storage.join(stage.path, "parts", name), ["id", "input", "step"]):
            if "id" not in batch or "step" not in batch:
                return None, None, None
            mask = np.zeros(len(batch["id"]), bool)
            inputs = np.asarray(batch["input"].to_pylist(), object) if "input" in batch else None
            from_packed = np.isin(inputs, list(packed)) if inputs is not None else mask
            mask |= _hit(batch["id"], plain) & ~from_packed
            for source, numbers in packed.items():
                if numbers and inputs is not None:
                    mask |= _hit(batch["id"], pa.array(sorted(numbers), pa.string())) & (inputs == source)
            if mask.any():
                taken = pc.filter(batch["step"], pa.array(mask))
                count += len(taken)
                least, most = pc.min(taken).as_py(), pc.max(taken).as_py()
                first, last = min(least, first if first is not None else least), max(most, last or 0)
    return count, first, last


def _checkpoint_before(directory: str, step: int | None) -> str | None:
    """`checkpoints/step-NNNNNNNN`, the last one of at most `step` steps done (steps count from 0)."""
    if step is None:
        return None
    names = [path.rsplit("/", 1)[1] for path in storage.list_directories(storage.join(directory, "checkpoints"))]
    steps = [(int(name[5:]), name) for name in names if name.startswith("step-") and name[5:].isdecimal()]
    before = [item for item in steps if item[0] <= step]
    return f"checkpoints/{max(before)[1]}" if before else None


def duplicates(stages: list[StageDirectory], ids: set[str]) -> list[str]:
    """Ids of rows that a stage removed as copies of these rows, and of those that these rows were removed for: nearly one text."""
    wanted = pa.array(sorted(ids), pa.string())
    found: set[str] = set()
    for stage in stages:
        for relative in _files(stage):
            if not relative.startswith("removed/"):
                continue
            for _, batch in _batches(storage.join(stage.path, relative), ["id", "match_id", "kept_id"]):
                if not {"id", "kept_id"} <= set(batch):
                    break
                own = _hit(batch["id"], wanted)
                named = _hit(batch["kept_id"], wanted) | _hit(batch["match_id"], wanted)
                found |= set(batch["id"].filter(pa.array(named)).to_pylist())
                for name in ("match_id", "kept_id"):
                    found |= set(batch[name].filter(pa.array(own)).to_pylist())
    return sorted(name for name in found - ids if name is not None and not name.startswith(tombstones.MARK))
