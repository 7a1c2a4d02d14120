"""Which files of a Hugging Face folder hold its rows: one that `datasets` saved, or one laid out as on the Hub."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from cluster import storage
from operators.config import SettingsError
from operators.sources.settings import format_by_name

_DATA = ("parquet", "arrow", "jsonl", "csv", "tsv")


def data_files(entries: Sequence[storage.FileEntry], split: str | None, pattern: str) -> list[storage.FileEntry]:
    """The data files among a folder's files, in order.

    Of a folder with a `state.json` (written by `save_to_disk`), the files that it lists, in its order: caches that lie
    beside them are left out. Of any other, all Parquet, Arrow, JSONL and CSV files. With `split`, those whose path names it as
    the `datasets` library understands it: a folder or a piece of the file's name (`train-00000-of-00004.parquet`).
    Raises FileNotFoundError when none is left and SettingsError when a state.json cannot be read or lists a file that is not there.
    """
    by_path = {entry.path: entry for entry in entries}
    states = [entry for entry in entries if entry.path.rsplit("/", 1)[-1] == "state.json"]
    listed: dict[str, list[storage.FileEntry]] = {}
    for state in states:
        folder = state.path.rsplit("/", 1)[0]
        listed[folder] = [_member(by_path, folder, name, state.path) for name in _listed(state.path)]
    found: list[storage.FileEntry] = []
    done: set[str] = set()
    for entry in entries:
        folder = entry.path.rsplit("/", 1)[0]
        if folder in listed:
            found += [] if folder in done else listed[folder]
            done.add(folder)
        elif format_by_name(entry.relative) in _DATA:
            found.append(entry)
    if split is not None:
        named = re.compile(rf"(?:^|[-._ 0-9/]){re.escape(split)}(?:$|[-._ 0-9/])")
        found = [entry for entry in found if named.search(entry.relative)]
    if not found:
        wanted = f"no data file of split {split!r}" if split else f"no {', '.join(_DATA)} file"
        raise FileNotFoundError(f"{pattern!r} holds {wanted}")
    return found


def _listed(path: str) -> list[str]:
    try:
        state = json.loads(storage.read_bytes(path))
        return [str(entry["filename"]) for entry in state["_data_files"]]
    except (ValueError, KeyError, TypeError) as error:
        raise SettingsError(f"{path} is no state.json that datasets wrote (its _data_files cannot be read): {error!r}") from None


def _member(by_path: dict[str, storage.FileEntry], folder: str, name: str, state: str) -> storage.FileEntry:
    entry = by_path.get(f"{folder}/{name}")
    if entry is None:
        raise SettingsError(f"{state} lists {name!r}, which is not in its folder: the data set is incomplete")
    return entry
