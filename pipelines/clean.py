"""`danlu clean`: takes away what a run's directory holds and no record of it names. Committed data is never touched.

What may go: files half written when a process was killed, scratch, keys that a finished stage exchanged, and files named by
content that no unit record and no manifest names. On demand, whole directories of fingerprints that the recipe left behind.
The rest stays, whatever it is: replies are paid for, and a file that this module does not know is none of its business.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from cluster import storage
from cluster.storage import FileEntry
from operators import shards
from operators.config import SettingsError, nearest
from pipelines.forget import redo
from pipelines.runner import hold

_TEMPORARY = re.compile(r"^\..+[.-][0-9a-f]{32}$")  # storage.write_bytes before the rename, and probes of a lease's age
_SCRATCH_FILE = re.compile(r"^[0-9a-f]{32}$")
_BY_CONTENT = re.compile(r"^\d{8}(-\d{3})?-[0-9a-f]{12}\.(parquet|bits)$")
_CONTENT_FOLDERS = ("parts", "rejects", "measures", "removed", "cut")
_EXCHANGED = ("keys", "work")  # a finished stage deletes them; a kill between manifest and deletion leaves them
_NAMING = re.compile(r"^(manifest\.json|(units|embeddings)/[^/]+\.json)$")  # records that name files
_NAMING_MEANWHILE = re.compile(r"^(keys|work)/.*\.json$")  # and those of a stage that is not finished
_TRAINING = ".train"  # Ray Train's own state, made anew by every group of workers; checkpoints lie in the stages

TEMPORARY, SCRATCH, KEYS, UNREFERENCED, SUPERSEDED = "temporary", "scratch", "exchanged keys", "unreferenced", "superseded"


@dataclass
class Cleaning:
    """What was (or with a dry run would be) removed: files and bytes by kind, and by directory of superseded fingerprints."""

    directory: str
    dry_run: bool
    files: Counter[str] = field(default_factory=Counter)
    bytes: Counter[str] = field(default_factory=Counter)
    superseded: dict[str, int] = field(default_factory=dict)  # STAGE/FINGERPRINT -> bytes
    kept_back: list[str] = field(default_factory=list)  # superseded directories that stay, and why

    def to_json(self) -> dict[str, Any]:
        kinds = {kind: {"files": count, "bytes": self.bytes[kind]} for kind, count in sorted(self.files.items())}
        return {
            "directory": self.directory, "dry_run": self.dry_run, "removed": kinds,
            "superseded": self.superseded, "kept_back": self.kept_back,
        }  # fmt: skip


def clean(run_directory: str, *, dry_run: bool = False, superseded: bool = False, older: Sequence[str] = ()) -> Cleaning:
    """Remove what no record names. `superseded` removes also the stage directories that run.json does not name, nor any stage
    that it names reads; `older` limits that to fingerprints (or STAGE/FINGERPRINT).

    Safe to kill and to repeat. Raises FileNotFoundError when the directory is no run, SettingsError when a live run holds it or a
    fingerprint is unknown.
    """
    path = storage.join(run_directory, "run.json")
    if not storage.exists(path):
        raise FileNotFoundError(f"{run_directory} is no run: it has no run.json (a run is e.g. runs/quickstart)")
    if older and not superseded:
        raise SettingsError("--older names fingerprints for --superseded: give that too")
    found = Cleaning(run_directory, dry_run)
    lost: list[str] = []
    with hold(run_directory, lost.append):
        if dry_run and redo.pending(run_directory) is not None:
            raise SettingsError(f"{run_directory}: a takedown was interrupted; clean without --dry-run finishes it first")
        if not dry_run:
            redo.finish(run_directory, lambda: _still_ours(run_directory, lost))
        record = json.loads(storage.read_bytes(path))
        stages = shards.stage_directories(run_directory)
        going = _superseded(run_directory, record, stages, older, found) if superseded else []
        for directory in going:
            _remove_tree(directory, run_directory, found, lost)
        sweep(run_directory, [directory for directory in stages if directory not in going], found, lost)
    return found


def sweep(run_directory: str, stages: Sequence[str], found: Cleaning, lost: list[str]) -> None:
    """Remove what no record of these stage directories names, and temporary files of the run. The caller holds the run."""
    for entry in _loose(run_directory):
        _remove(entry, TEMPORARY if _TEMPORARY.match(_name(entry.path)) else SCRATCH, found, lost)
    for directory in stages:
        for kind, entry in _stray(directory):
            _remove(entry, kind, found, lost)
        if not found.dry_run:
            for folder in _empty(directory):
                storage.delete(folder)
    if not found.dry_run and found.files[SCRATCH]:
        storage.delete(storage.join(run_directory, _TRAINING))


def _name(path: str) -> str:
    return path.rstrip("/").rsplit("/", 1)[1]


def _loose(run_directory: str) -> Iterator[FileEntry]:
    """Temporary files beside run.json, and the folder of Ray Train."""
    for entry in storage.list_beside(run_directory):
        if _TEMPORARY.match(entry.relative):
            yield entry
    yield from storage.list_all(storage.join(run_directory, _TRAINING))


def _stray(directory: str) -> Iterator[tuple[str, FileEntry]]:
    """(kind, file) of what may go from one stage's directory."""
    entries = storage.list_all(directory)
    finished = any(entry.relative == "manifest.json" for entry in entries)
    named = _named(entries, finished)
    for entry in entries:
        folders, name = entry.relative.split("/")[:-1], _name(entry.path)
        if any("/".join([*folders, name][:depth]) in named for depth in range(1, len(folders) + 2)):
            continue  # a record names it, or a folder that holds it
        if _TEMPORARY.match(name):
            yield TEMPORARY, entry
        elif ".scratch" in folders:
            # an unfinished stage goes on from folders of its scratch, which hold committed units like any other directory
            if finished or (folders[-1] == ".scratch" and _SCRATCH_FILE.match(name)):
                yield SCRATCH, entry
        elif folders and folders[0] in _EXCHANGED:
            if finished:
                yield KEYS, entry
        elif len(folders) == 1 and folders[0] in _CONTENT_FOLDERS and _BY_CONTENT.match(name):
            yield UNREFERENCED, entry


def _named(entries: Sequence[FileEntry], finished: bool) -> set[str]:
    """Every text in the directory's records: whatever is a file's name among them keeps that file."""
    found: set[str] = set()
    for entry in entries:
        naming = _NAMING.match(entry.relative) or (not finished and _NAMING_MEANWHILE.match(entry.relative))
        if naming and not _TEMPORARY.match(_name(entry.path)):
            found.update(_recorded(entry.path))
    return found


def _recorded(path: str) -> Iterator[str]:
    """Every text of a record, and of the long lists that a manifest keeps beside it."""
    record = json.loads(storage.read_bytes(path))
    yield from _texts(record)
    if _name(path) == "manifest.json":
        for listed in shards.listed_beside(path.rpartition("/")[0], record):
            yield from _texts(listed)


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)


def _superseded(
    run_directory: str, record: dict[str, Any], stages: Sequence[str], older: Sequence[str], found: Cleaning
) -> list[str]:
    """The directories that may go: not named by run.json, not read by one that is."""
    short = {directory: directory[len(run_directory.rstrip("/")) + 1 :] for directory in stages}
    current = {entry["directory"] for entry in record["stages"].values()}
    needed, waiting = set[str](), [directory for directory in stages if short[directory] in current]
    while waiting:
        directory = waiting.pop()
        if directory in needed:
            continue
        needed.add(directory)
        manifest = storage.join(directory, "manifest.json")
        read = _recorded(manifest) if storage.exists(manifest) else iter(())
        places = {"/".join(text.removeprefix("run:").split("/")[:2]) for text in read}
        waiting += [other for other in stages if short[other] in places]
    going = [directory for directory in stages if directory not in needed]
    wanted = set(older)
    known = {name for directory in going for name in (short[directory], _name(directory))}
    for name in sorted(wanted - known):
        if any(name in (short[directory], _name(directory)) for directory in needed):
            raise SettingsError(f"--older {name}: the run uses this fingerprint; only superseded ones can be removed")
        raise SettingsError(f"--older {name}: no superseded fingerprint of {run_directory}{nearest(name, sorted(known))}")
    unfinished = {
        entry["directory"].split("/")[0]
        for entry in record["stages"].values()
        if not storage.exists(storage.join(run_directory, entry["directory"], "manifest.json"))
    }
    chosen = []
    for directory in going:
        if wanted:
            if wanted & {short[directory], _name(directory)}:
                chosen.append(directory)
        elif short[directory].split("/")[0] in unfinished:
            found.kept_back.append(
                f"{short[directory]}: the stage's present fingerprint is unfinished and may take its units over "
                "(--older removes it all the same)"
            )
        else:
            chosen.append(directory)
    return chosen


def _remove(entry: FileEntry, kind: str, found: Cleaning, lost: list[str]) -> None:
    _still_ours(found.directory, lost)
    found.files[kind] += 1
    found.bytes[kind] += entry.size
    if not found.dry_run:
        storage.delete(entry.path)


def _remove_tree(directory: str, run_directory: str, found: Cleaning, lost: list[str]) -> None:
    """The manifest first: what a kill leaves of it is an unfinished directory, not a finished one with holes."""
    _still_ours(found.directory, lost)
    entries = storage.list_all(directory)
    total = sum(entry.size for entry in entries)
    found.files[SUPERSEDED] += len(entries)
    found.bytes[SUPERSEDED] += total
    found.superseded[directory[len(run_directory.rstrip("/")) + 1 :]] = total
    if not found.dry_run:
        storage.delete(storage.join(directory, "manifest.json"))
        storage.delete(storage.join(directory, "units"))
        storage.delete(directory)


def _still_ours(directory: str, lost: list[str]) -> None:
    if lost:
        raise SettingsError(f"{directory} was taken over by {lost[0]} meanwhile; clean it again when that is done")


def _empty(directory: str) -> Iterator[str]:
    """Folders that stray files leave behind."""
    for name in (".scratch", *_EXCHANGED):
        folder = storage.join(directory, name)
        if not storage.list_all(folder):
            yield folder


def lines(found: Cleaning) -> list[str]:
    """What `danlu clean` prints."""
    would = "would remove" if found.dry_run else "removed"
    told = [f"{would} {count:,} {kind} files, {size(found.bytes[kind])}" for kind, count in sorted(found.files.items()) if count]
    told += [f"  {name}: {size(count)}" for name, count in sorted(found.superseded.items())]
    told += [f"kept {line}" for line in found.kept_back]
    if not any(found.files.values()):
        told.insert(0, f"{found.directory}: nothing to remove")
    return told


def size(count: int) -> str:
    """`12.3 MB`; 1 MB is 10^6 bytes."""
    for unit, bound in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= bound:
            return f"{count / bound:,.1f} {unit}"
    return f"{count} bytes"
