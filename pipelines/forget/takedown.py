"""`danlu forget`: the order of a takedown, its record, and what the command prints."""

from __future__ import annotations

import datetime
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from cluster import storage
from operators import shards, tombstones
from operators.config import SettingsError
from operators.ledger import Ledger
from operators.tokens import twin
from pipelines import clean, heartbeat
from pipelines.forget import packed, redo, replies, rewrite, search
from pipelines.forget.rewrite import Changes, Entry, Staging
from pipelines.forget.search import FileHits, Found, Saw, StageDirectory
from pipelines.forget.texts import say
from pipelines.runner import hold


@dataclass
class Takedown:
    """What was (or with a dry run would be) taken down. Ids are plain here, for whoever asked; the run keeps hashes."""

    directory: str
    dry_run: bool
    time: str
    reason: str
    asked: list[str]
    not_found: list[str] = field(default_factory=list)
    earlier: dict[str, str] = field(default_factory=dict)  # id -> when it was forgotten before
    descendants: int = 0
    stages: dict[str, dict[str, int]] = field(default_factory=dict)  # STAGE/FINGERPRINT -> rows by what they are
    resets: list[str] = field(default_factory=list)  # begun anew by the next run
    models: list[Saw] = field(default_factory=list)
    duplicates: list[str] = field(default_factory=list)  # ids of rows of nearly the same text that stay
    replies: tuple[int, int] = (0, 0)  # removed, left in the files that were looked through
    outside: list[tuple[str, str]] = field(default_factory=list)  # (kind, place) of what lies outside the run's directory
    bytes_written: int = 0
    resumed: str | None = None  # time of an interrupted takedown that was finished first

    @property
    def rows(self) -> int:
        return sum(sum(counts.values()) for counts in self.stages.values())

    def to_json(self) -> dict[str, Any]:
        own = {**self.__dict__, "rows": self.rows, "models": [model.to_json() for model in self.models]}
        return {
            **own,
            "replies": {"removed": self.replies[0], "left": self.replies[1]},
            "outside": [{"kind": kind, "place": place} for kind, place in self.outside],
        }


def forget(
    run_directory: str, asked: Sequence[str], *, dry_run: bool = False, reason: str = "", with_duplicates: bool = False
) -> Takedown:
    """Take the rows of these ids, and all rows that were made from them, out of the run.

    Safe to kill and to repeat. Raises FileNotFoundError when the directory is no run, SettingsError when a live run holds it.
    """
    if not storage.exists(storage.join(run_directory, "run.json")):
        raise FileNotFoundError(f"{run_directory} is no run: it has no run.json (a run is e.g. runs/quickstart)")
    if not asked:
        raise SettingsError("danlu forget needs the ID of what is to be forgotten, or --ids FILE")
    lost: list[str] = []

    def check() -> None:
        if lost:
            raise SettingsError(f"{run_directory} was taken over by {lost[0]} meanwhile; forget again when that is done")

    with hold(run_directory, lost.append):
        if dry_run and redo.pending(run_directory) is not None:
            raise SettingsError(f"{run_directory}: a takedown was interrupted; forget without --dry-run finishes it first")
        resumed = None if dry_run else redo.finish(run_directory, check)
        if not dry_run:
            _sweep(run_directory, lost)
        time = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        told = Takedown(run_directory, dry_run, time, reason, list(dict.fromkeys(asked)))
        told.resumed = resumed["time"] if resumed is not None else None
        _plan(run_directory, told, with_duplicates, check)
        reported = storage.exists(storage.join(run_directory, "report.html"))
        if not dry_run:
            redo.finish(run_directory, check)
            _sweep(run_directory, lost)
    if reported and not dry_run:
        from pipelines.report.build import build_report

        build_report(run_directory)
    return told


def _sweep(run_directory: str, lost: list[str]) -> None:
    """Files that no record names may hold the text as well: those of attempts that were killed."""
    clean.sweep(run_directory, shards.stage_directories(run_directory), clean.Cleaning(run_directory, False), lost)


def _plan(run_directory: str, told: Takedown, with_duplicates: bool, check: Any) -> None:
    """Find everything, write everything new, and commit what is to be put in its place (not in a dry run)."""
    stages = search.directories(run_directory)
    found = search.search(stages, told.asked)
    told.duplicates = search.duplicates(stages, found.ids)
    if with_duplicates and told.duplicates:
        found = search.search(stages, list(dict.fromkeys([*told.asked, *told.duplicates])))
        told.asked, told.duplicates = list(found.asked), search.duplicates(stages, found.ids)
    known = {row_id: tombstones.of(run_directory, row_id) for row_id in told.asked}
    told.earlier = {row_id: records[0]["time"] for row_id, records in known.items() if records}
    told.not_found = [row_id for row_id, there in found.asked.items() if not there and row_id not in told.earlier]
    told.descendants = len(found.ids - set(told.asked))
    held = search.holding(stages, found)
    told.models = search.models(stages, found, held)
    told.resets = _resets(stages, found, held)
    told.outside = _outside(stages, held, run_directory)
    told.stages = {name: dict(_counts(hits)) for name, hits in found.hits.items() if name not in told.resets and _counts(hits)}
    new_ids = [row_id for row_id in told.asked if row_id not in told.earlier]
    if told.dry_run or not (new_ids or found.hits):
        return
    number = len(tombstones.files(run_directory)) + 1
    staging = Staging(run_directory, redo.STAGING)
    moved = _rewrite(staging, stages, found, told, check)
    asking = {stage.name for stage in stages if stage.relative in found.hits or any(item in held for item in stage.inputs)}
    check()
    told.replies = replies.forget_replies(staging, stages, found, asking)
    told.bytes_written = staging.bytes_written
    _settle_reviews(staging, stages, found, told.resets)
    _reopen(staging, stages, told.resets)
    if storage.exists(storage.join(run_directory, "report.html")):
        staging.deletes.append("report.html")  # it shows beginnings of rows; it is written anew
    record = {
        "time": told.time,
        "reason": told.reason,
        "ids": sorted(tombstones.hashed(row_id) for row_id in told.asked),
        "descendants": sorted(tombstones.hashed(row_id) for row_id in found.ids - set(told.asked)),
        "rows": told.rows,
        "accounts": moved,
        "stages": told.stages,
        "resets": told.resets,
        "models": [model.to_json() for model in told.models],
        "replies": {"removed": told.replies[0], "left": told.replies[1]},
    }
    fresh = {target for _, target in staging.swaps} | staging.made
    deletes = sorted({name for name in staging.deletes if name not in fresh and name.partition("/")[0]})
    check()
    redo.commit(
        run_directory, {"number": number, "takedown": record, "swaps": staging.swaps, "deletes": deletes, "resets": told.resets}
    )


def _counts(hits: list[FileHits]) -> Counter[str]:
    """Rows that go, by the folder that they are in."""
    return +Counter({folder: sum(len(hit.gone) for hit in hits if hit.folder == folder) for folder in {hit.folder for hit in hits}})


def _resets(stages: list[StageDirectory], found: Found, held: dict[str, int]) -> list[str]:
    """Stage directories that the next run begins anew.

    Unfinished ones that have read it, for what they have noted (ordinals, windows, checkpoints) counts rows that are no more; and
    finished exports to files other than the stage's own Parquet parts, which are written again as a whole.
    """
    resets: list[str] = []
    for stage in stages:
        read = any(item in held or item in resets for item in stage.inputs)
        if stage.manifest is None:
            begins = stage.kind not in search.READS_FILES and (read or stage.relative in found.hits)
        else:
            begins = stage.kind == "export" and read and not stage.manifest.parts
        if begins:
            resets.append(stage.relative)
    return resets


def _outside(stages: list[StageDirectory], held: dict[str, int], run_directory: str) -> list[tuple[str, str]]:
    """What a takedown does not reach: told by place, so that somebody can."""
    found = []
    for stage in stages:
        if stage.manifest is None or not any(item in held for item in stage.inputs):
            continue
        path = (stage.manifest.files.get("export") or {}).get("path", ".") if stage.kind == "export" else "."
        if path != ".":
            found.append(("export", path))
        if stage.manifest.config.get("index"):
            found.append(("index", str(stage.manifest.config["index"])))
    if storage.is_remote(run_directory):
        found.append(("nodes", "$DANLU_CACHE"))
    return list(dict.fromkeys(found))


def _rewrite(staging: Staging, stages: list[StageDirectory], found: Found, told: Takedown, check: Any) -> dict[str, int]:
    """New files and staged records of every stage that stays. Returns the rows that each one moved to `forgotten`."""
    moved: dict[str, int] = {}
    changed: dict[str, tuple[Entry, np.ndarray]] = {}  # parts relative to the run -> (new entry, rows that are gone)
    for stage in stages:
        if stage.relative in told.resets:
            continue
        removed = packed.Removed()
        units: dict[int, packed.Removed] = {}
        hits = {hit.relative: hit for hit in found.hits.get(stage.relative, [])}
        changes = Changes({}, hits, {})
        for relative, hit in hits.items():
            check()
            changes.entries[relative] = _file(staging, stage, hit, found.ids, units)
            if hit.folder in ("parts", "data") and len(hit.gone) and stage.kind != "pack":
                changed[f"{stage.relative}/{relative}"] = (changes.entries[relative], hit.gone)
        for unit in units.values():
            removed.add(unit)
        _measures(staging, stage, changes)
        view, unseen = _view(staging, stage, changed)
        if not hits and view is None:
            continue
        _units(staging, stage, changes, units, found.ids)
        if stage.manifest is not None:
            moved[stage.relative] = _manifest(staging, stage, changes, found.ids, told, view, unseen, removed)
    return {name: count for name, count in moved.items() if count}


def _unit_of(relative: str) -> int | None:
    name = relative.rsplit("/", 1)[1]
    return int(name[:8]) if name[:8].isdecimal() else None


def _file(staging: Staging, stage: StageDirectory, hit: FileHits, ids: set[str], units: dict[int, packed.Removed]) -> Entry:
    """One Parquet file without its rows, and without the names of rows that are gone."""
    path = storage.join(stage.path, hit.relative)
    if stage.kind == "pack" and hit.folder == "parts":
        removed = units.setdefault(_unit_of(hit.relative) or 0, packed.Removed())
        index = json.loads(storage.read_bytes(storage.join(stage.path, twin.INDEX)))
        change = packed.without(hit.gone, ids, int(index["padding_token_id"]), removed)
    else:
        drop, blank = rewrite.without(hit.gone), rewrite.unnamed(ids) if hit.mentions else None

        def change(table: Any, start: int) -> Any:
            left = drop(table, start)
            return left if blank is None else blank(left, start)

    return rewrite.write(staging, stage, hit.relative, rewrite.filtered(path, change))


def _gone_of(stage: StageDirectory, changes: Changes, folder: str, unit: int, entries: Sequence[Entry]) -> np.ndarray:
    """int64: the rows of a unit that are gone, numbered over all its files of a folder."""
    start, found = 0, [np.zeros(0, np.int64)]
    for entry in entries:
        hit = changes.hits.get(entry["name"])
        if hit is not None:
            found.append(hit.gone + start)
        start += entry["rows"]
    return np.concatenate(found)


def _measures(staging: Staging, stage: StageDirectory, changes: Changes) -> None:
    """What was measured of rows that are gone goes too; the positions of the others move up."""
    for unit in sorted({_unit_of(name) for name in list(changes.hits) if _unit_of(name) is not None} - {None}, key=int):  # type: ignore[arg-type]
        assert unit is not None
        path = storage.join(stage.path, "units", f"{unit:08d}.json")
        if not storage.exists(path):
            continue
        record = json.loads(storage.read_bytes(path))
        if not record.get("measures"):
            continue
        kept, rejected = (_gone_of(stage, changes, folder, unit, record[folder]) for folder in ("parts", "rejects"))
        for entry in record["measures"]:
            change = rewrite.remeasured(kept, rejected)
            tables = rewrite.filtered(storage.join(stage.path, entry["name"]), change)
            changes.entries[entry["name"]] = rewrite.write(staging, stage, entry["name"], tables)


def _view(staging: Staging, stage: StageDirectory, changed: dict[str, tuple[Entry, np.ndarray]]) -> tuple[list[Entry] | None, int]:
    """(the view's entries over the new parts, rows that it showed and shows no more); None where none of its parts changed."""
    if stage.manifest is None or stage.manifest.view is None:
        return None, 0
    if not any(entry["path"] in changed for entry in stage.manifest.view):
        return None, 0
    view, unseen = [], 0
    for entry in stage.manifest.view:
        if entry["path"] not in changed:
            view.append(entry)
            continue
        new, gone = changed[entry["path"]]
        name, removed_rows = rewrite.bitmap(staging, stage, entry, gone)
        if name is not None:
            staging.made.add(f"{stage.relative}/{name}")
        shown = entry["rows"] - entry["removed_rows"]
        unseen += shown - (new["rows"] - removed_rows)
        if new["name"] is None:
            continue
        folder = entry["path"].rsplit("/", len(new["name"].split("/")))[0]
        path = f"{folder}/{new['name']}"
        view.append({**entry, "path": path, "rows": new["rows"], "removed": name, "removed_rows": removed_rows})
    embeddings = storage.join(stage.path, "embeddings")
    if storage.list_all(embeddings):
        staging.deletes.append(f"{stage.relative}/embeddings")  # they can be made again, and text can be guessed from them
    return view, unseen


def _units(staging: Staging, stage: StageDirectory, changes: Changes, units: dict[int, packed.Removed], ids: set[str]) -> None:
    """The unit records that name changed files."""
    staging.made |= {f"{stage.relative}/{entry['name']}" for entry in changes.entries.values() if entry["name"] is not None}
    if not changes.entries:
        return
    for number, record in shards.unit_records(stage.path):
        own = [item["name"] for folder in ("parts", "rejects", "measures") for item in record.get(folder, ())]
        own += [value for value in record.values() if isinstance(value, str)]
        own += [record["file"]["name"]] if isinstance(record.get("file"), dict) else []
        if not set(own) & set(changes.entries):
            continue
        hits = [changes.hits[name] for name in own if name in changes.hits]
        aside = sum((hit.fates for hit in hits if hit.folder == "rejects"), Counter[str]())
        if stage.kind == "pack":
            packed.settle(record["stats"], units.get(number, packed.Removed()), aside)
        else:
            kept = sum(len(changes.hits[item["name"]].gone) for item in record["parts"] if item["name"] in changes.hits)
            ledger = Ledger.from_json(record["ledger"])
            rewrite.account(ledger, kept, aside)
            rewrite.funnel(record["stats"], kept, aside)
            record["ledger"] = ledger.to_json()
        record = rewrite.renamed({**record, "stats": rewrite.scrubbed(record["stats"], ids)}, changes.entries)
        staging.replace(f"{stage.relative}/units/{number:08d}.json", rewrite.dumped(record))


def _manifest(
    staging: Staging,
    stage: StageDirectory,
    changes: Changes,
    ids: set[str],
    told: Takedown,
    view: list[Entry] | None,
    unseen: int,
    removed: packed.Removed,
) -> int:
    """Stage the manifest of a finished stage; the rows that moved to `forgotten`."""
    manifest = stage.manifest
    assert manifest is not None
    ledger, stats = Ledger.from_json(manifest.ledger.to_json()), json.loads(json.dumps(manifest.stats))
    folder = "rejects" if manifest.view is None else "removed"
    aside = sum((hit.fates for hit in changes.hits.values() if hit.folder == folder), Counter[str]())
    equations = manifest.equations
    if stage.kind == "pack":
        packed.settle(stats, removed, aside)
        equations = packed.settled(equations, removed, aside)
        _twin(staging, stage, manifest, changes)
        moved = removed.documents + aside.total()
    else:
        listed = {entry["name"] for entry in manifest.parts}
        kept = unseen + sum(len(hit.gone) for hit in changes.hits.values() if hit.relative in listed and not stage.trains)
        moved = rewrite.account(ledger, kept, aside)
        rewrite.funnel(stats, kept, aside)
    stats = rewrite.scrubbed(stats, ids)
    stats["forgotten"] = [*manifest.stats.get("forgotten", []), {"time": told.time, "rows": moved, "tokens": removed.tokens}]
    lists = {name: rewrite.renamed(list(getattr(manifest, name)), changes.entries) for name in ("parts", "rejects", "measures")}
    changed = replace(
        manifest, ledger=ledger, stats=stats, equations=equations, files=rewrite.renamed(manifest.files, changes.entries),
        view=view if view is not None else manifest.view, **lists,
    )  # fmt: skip
    ledger.check(f"stage {stage.name}")
    before = json.loads(storage.read_bytes(storage.join(stage.path, "manifest.json")))
    data = shards.manifest_bytes(stage.path, changed)
    after = json.loads(data)
    beside = [
        {item["parquet"] for item in record.values() if isinstance(item, dict) and "parquet" in item} for record in (before, after)
    ]
    staging.made |= {f"{stage.relative}/{name}" for name in beside[1]}
    staging.deletes += [f"{stage.relative}/{name}" for name in beside[0] - beside[1]]
    staging.replace(f"{stage.relative}/manifest.json", data)
    return moved


def _twin(staging: Staging, stage: StageDirectory, manifest: shards.Manifest, changes: Changes) -> None:
    """The flat twin of the new parts, staged: it has fixed names, so it is put in place with the records."""
    if not any(hit.folder == "parts" for hit in changes.hits.values()):
        return
    index = json.loads(storage.read_bytes(storage.join(stage.path, twin.INDEX)))
    names = [changes.entries.get(entry["name"], entry)["name"] for entry in manifest.parts]
    folder = f"{staging.folder}/twin-{stage.relative.replace('/', '-')}"
    settings = {name: int(index[name]) for name in ("length", "vocab_size", "eos_token_id", "padding_token_id")}
    twin.write_twin(storage.join(staging.run, folder), [storage.join(stage.path, name) for name in names], **settings)
    for name in (twin.TOKENS, twin.BOUNDARIES, twin.BOUNDARY_OFFSETS, twin.INDEX):
        staging.bytes_written += storage.size(storage.join(staging.run, folder, name))
        staging.swaps.append((f"{folder}/{name}", f"{stage.relative}/{name}"))


def _reopen(staging: Staging, stages: list[StageDirectory], resets: list[str]) -> None:
    """Have the run say of stages that are begun anew that they are not done."""
    names = {stage.name for stage in stages if stage.relative in resets and stage.current and stage.manifest is not None}
    for file in ("run.json", heartbeat.NAME) if names else ():
        path = storage.join(staging.run, file)
        if not storage.exists(path):
            continue
        record = json.loads(storage.read_bytes(path))
        for name in names & set(record.get("stages", {})):
            record["stages"][name]["status"] = "pending"
        staging.replace(file, json.dumps(record, indent=1, ensure_ascii=False).encode())


def _settle_reviews(staging: Staging, stages: list[StageDirectory], found: Found, resets: list[str]) -> None:
    """Samples that people judge name rows by their number: it moves up, and a forgotten row's place in the sample is emptied."""
    if not storage.exists(storage.join(staging.run, ".review")):
        return
    from pipelines.review import sample as review

    for stage in stages:
        if stage.manifest is None or stage.relative in resets:
            continue
        kept = review.kept(stage.path) if storage.exists(review.place(stage.path)) else []
        if not kept or not (gone := _ordinals(stages, stage, found)).size:
            continue
        for item in kept:
            moved = replace(item, items=tuple(_moved(row, gone, found.ids) for row in item.items))
            target = storage.join(review.place(stage.path), "samples", f"{item.name}.json")[len(staging.run.rstrip("/")) + 1 :]
            staging.replace(target, moved.to_json())
        for entry in storage.list_beside(storage.join(review.place(stage.path), "verdicts")):
            verdicts = [json.loads(line) for line in storage.read_bytes(entry.path).decode("utf-8", "surrogatepass").splitlines()]
            if any(verdict["id"] in found.ids for verdict in verdicts):
                data = "".join(json.dumps(_unsaid(verdict, found.ids), ensure_ascii=False) + "\n" for verdict in verdicts)
                staging.replace(entry.path[len(staging.run.rstrip("/")) + 1 :], data.encode("utf-8", "surrogatepass"))


def _moved(item: Any, gone: np.ndarray, ids: set[str]) -> Any:
    if item.id in ids:
        return replace(item, id=tombstones.MARK + tombstones.hashed(item.id), row=-1)
    return replace(item, row=item.row - int(np.searchsorted(gone, item.row)))


def _unsaid(verdict: dict[str, Any], ids: set[str]) -> dict[str, Any]:
    """A verdict on a forgotten row without its id and its note, which may quote it."""
    if verdict["id"] not in ids:
        return verdict
    return {**verdict, "id": tombstones.MARK + tombstones.hashed(verdict["id"]), "note": ""}


def _ordinals(stages: list[StageDirectory], stage: StageDirectory, found: Found) -> np.ndarray:
    """int64, ascending: the ordinals of the stage's rows (before removal, as operators.shards.parts numbers them) that go."""
    assert stage.manifest is not None
    lost = {f"{item.relative}/{name}": hit for item in stages for name, hit in found.lost(item.relative).items()}
    entries = stage.manifest.view
    places = [(f"{stage.relative}/{e['name']}", e["rows"]) for e in stage.manifest.parts] if entries is None else [
        (e["path"], e["rows"]) for e in entries
    ]  # fmt: skip
    start, gone = 0, [np.zeros(0, np.int64)]
    for place, rows in places:
        if place in lost:
            gone.append(lost[place].gone + start)
        start += rows
    return np.concatenate(gone)


def lines(told: Takedown, language: Literal["en", "zh"]) -> list[str]:
    """What `danlu forget` prints."""
    found = [say("resumed", language, time=told.resumed)] if told.resumed else []
    verb = "would" if told.dry_run else "did"
    found.append(say(verb, language, rows=told.rows, ids=len(told.asked) - len(told.not_found), descendants=told.descendants))
    for name, counts in told.stages.items():
        shown = ", ".join(f"{say(f'folder.{folder}', language)} {count:,}" for folder, count in sorted(counts.items()))
        found.append(f"  {name}: {shown}")
    found += [say("reset", language, stage=name) for name in told.resets]
    if sum(told.replies):
        found.append(say("replies", language, removed=told.replies[0], left=told.replies[1], bytes=replies.SHARED_BYTES))
    for model in told.models:
        key = "saw" if model.samples else "saw_rows" if model.rows else "saw_through"
        found.append(
            say(
                key, language, stage=model.relative, kind=model.kind, samples=model.samples or 0, rows=model.rows,
                first=model.first_step, last=model.last_step, through=", ".join(model.through),
            )
        )  # fmt: skip
        if model.checkpoint_before:
            found.append(say("checkpoint", language, path=f"{model.relative}/{model.checkpoint_before}", step=model.first_step))
    if told.models:
        found.append(say("weights", language))
    if told.duplicates:
        shown = ", ".join(told.duplicates[:8]) + (" ..." if len(told.duplicates) > 8 else "")
        found.append(say("duplicates", language, count=len(told.duplicates), ids=shown))
    found += [say(f"outside.{kind}", language, place=place) for kind, place in told.outside]
    found += [say("earlier", language, id=row_id, time=time) for row_id, time in told.earlier.items()]
    found += [say("not_found", language, id=row_id) for row_id in told.not_found]
    return found
