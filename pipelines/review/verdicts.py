"""Verdicts of reviewers: lines of JSON, checked against the sample that they judge, and kept in the run.

A line holds `sample`, `item` (from 0), `id`, `verdict`, `reviewer`, and where there are some `note` and `time`. Of
conversations a verdict is accept or reject; of pairs, which are shown in random order, it is left, right, tie (both are as
good) or neither (both are bad). `skip` is no judgement. A line whose verdict is empty is one not judged yet.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cluster import storage
from operators.config import SettingsError, nearest
from operators.synthesis.conversations import Unreadable, read_rows
from pipelines.review.sample import Item, Sample, Shown, kept, load, place

SKIP = "skip"
_OF_ROWS = ("accept", "reject", SKIP)
_OF_PAIRS = ("left", "right", "tie", "neither", SKIP)
_SHOWN_PROBLEMS = 20
_NAME_CHARACTERS, _NOTE_CHARACTERS = 100, 10_000


def verdicts_of(table: Shown) -> tuple[str, ...]:
    """The verdicts that rows of a table may be given."""
    return _OF_PAIRS if table == "preferences" else _OF_ROWS


@dataclass(frozen=True)
class Verdict:
    """One reviewer's judgement of one item."""

    sample: str
    item: int
    id: str
    verdict: str
    reviewer: str
    note: str = ""
    time: str = ""


@dataclass
class Imported:
    """What an import did."""

    added: int = 0
    replaced: int = 0
    known: int = 0  # already imported, the same
    open: int = 0  # lines without a verdict
    reviewers: set[str] = field(default_factory=set)


def import_files(stage_directory: str, paths: Sequence[str], reviewer: str | None = None, replace: bool = False) -> Imported:
    """Check all lines of all files, then keep them; nothing is kept if one is wrong.

    `reviewer` names the one who wrote lines that name none. Raises SettingsError with a line for each problem.
    """
    found, outcome, problems = read(stage_directory, paths, reviewer)
    before = {(item.sample, item.item, item.reviewer): item for item in imported(stage_directory)}
    new: list[Verdict] = []
    for verdict in found:
        earlier = before.get((verdict.sample, verdict.item, verdict.reviewer))
        if earlier is not None and (earlier.verdict, earlier.note) == (verdict.verdict, verdict.note):
            outcome.known += 1
            continue
        if earlier is not None and not replace:
            problems.append(
                f"item {verdict.item}: {verdict.reviewer} has judged it {earlier.verdict!r} before, now {verdict.verdict!r}; "
                "import with --replace to change verdicts"
            )
        outcome.replaced += earlier is not None
        outcome.added += earlier is None
        new.append(verdict)
    if problems:
        more = [f"and {len(problems) - _SHOWN_PROBLEMS} more"] if len(problems) > _SHOWN_PROBLEMS else []
        raise SettingsError("\n".join([*problems[:_SHOWN_PROBLEMS], *more, "nothing was imported"]))
    outcome.reviewers = {verdict.reviewer for verdict in found}
    if new:
        data = "".join(json.dumps(verdict.__dict__, ensure_ascii=False) + "\n" for verdict in new).encode("utf-8", "surrogatepass")
        folder = storage.join(place(stage_directory), "verdicts")
        number = len(_files(stage_directory))
        name = f"{hashlib.sha256(data).hexdigest()[:12]}.jsonl"
        while not storage.create_if_absent(storage.join(folder, f"{number:06d}-{name}"), data):
            number += 1
    return outcome


def imported(stage_directory: str) -> list[Verdict]:
    """The verdicts that are in force: of one reviewer on one item the one imported last."""
    found: dict[tuple[str, int, str], Verdict] = {}
    for path in _files(stage_directory):
        for line in storage.read_bytes(path).decode("utf-8", "surrogatepass").splitlines():
            verdict = Verdict(**json.loads(line))
            found[verdict.sample, verdict.item, verdict.reviewer] = verdict
    return list(found.values())


def _files(stage_directory: str) -> list[str]:
    try:
        return sorted(entry.path for entry in storage.list_files(storage.join(place(stage_directory), "verdicts", "*.jsonl")))
    except FileNotFoundError:
        return []


def read(stage_directory: str, paths: Sequence[str], reviewer: str | None) -> tuple[list[Verdict], Imported, list[str]]:
    """(verdicts, counts, problems) of files. Raises FileNotFoundError, and SettingsError for a file that is no table of rows."""
    samples: dict[str, Sample | str] = {sample.name: sample for sample in kept(stage_directory)}
    found: list[Verdict] = []
    problems: list[str] = []
    outcome = Imported()
    places: dict[tuple[str, int, str], str] = {}
    for path in paths:
        try:
            for number, given in read_rows(path):
                where = f"{path}, line {number + 1}"
                verdict = _verdict(given, where, reviewer, stage_directory, samples, problems)
                if verdict is None:
                    outcome.open += isinstance(given, dict) and given.get("verdict") in (None, "")
                    continue
                key = (verdict.sample, verdict.item, verdict.reviewer)
                if key in places:
                    problems.append(f"{where}: {verdict.reviewer} judges item {verdict.item} twice (also {places[key]})")
                places[key] = where
                found.append(verdict)
        except ValueError as error:
            raise SettingsError(str(error)) from error
    return found, outcome, problems


def _verdict(
    given: Mapping[str, Any] | Unreadable,
    where: str,
    reviewer: str | None,
    stage_directory: str,
    samples: dict[str, Sample | str],
    problems: list[str],
) -> Verdict | None:
    """The verdict of one line, None for one that is not judged yet or wrong; what is wrong is added to `problems`."""
    if isinstance(given, Unreadable):
        problems.append(given.detail)
        return None
    if given.get("verdict") in (None, ""):
        return None
    problem, sample = _sample(given.get("sample"), stage_directory, samples)
    if sample is None:
        problems.append(f"{where}: {problem}")
        return None
    item, said = given.get("item"), given.get("verdict")
    who = given.get("reviewer") or reviewer
    allowed = verdicts_of(sample.table)
    if not isinstance(item, int) or isinstance(item, bool) or not 0 <= item < len(sample.items):
        problem = f"item {item!r} is none of the sample's {len(sample.items)} (0 to {len(sample.items) - 1})"
    elif given.get("id") != sample.items[item].id:
        problem = f"item {item} is row {sample.items[item].id!r}, not {given.get('id')!r}: the line was mixed up"
    elif said not in allowed:
        problem = f"unknown verdict {said!r}{nearest(str(said), list(allowed))}"
    elif not isinstance(who, str) or not who.strip() or len(who) > _NAME_CHARACTERS:
        problem = "no reviewer: name one in the line (`reviewer`) or with --reviewer"
    elif not isinstance(given.get("note") or "", str) or len(given.get("note") or "") > _NOTE_CHARACTERS:
        problem = f"a note is text of at most {_NOTE_CHARACTERS:,} characters"
    else:
        rest = {name: str(given.get(name) or "") for name in ("note", "time")}
        return Verdict(sample.name, item, sample.items[item].id, said, who.strip(), **rest)
    problems.append(f"{where}: {problem}")
    return None


def _sample(name: Any, stage_directory: str, samples: dict[str, Sample | str]) -> tuple[str, Sample | None]:
    if not isinstance(name, str) or not name:
        return "no `sample`: is this a file of verdicts?", None
    if name not in samples:
        try:
            samples[name] = load(stage_directory, name)
        except SettingsError as error:
            samples[name] = str(error)
    known = samples[name]
    return (known, None) if isinstance(known, str) else ("", known)


def accepts(table: Shown, item: Item, verdict: str) -> bool:
    """Whether a verdict agrees with the row: it is accepted, or of a pair the chosen reply is held better."""
    if table != "preferences":
        return verdict == "accept"
    return verdict == ("right" if item.swapped else "left")


def meaning(table: Shown, item: Item, verdict: str) -> str:
    """The verdict in terms of the row: of a pair which reply was held better, whatever side it stood on."""
    if table != "preferences" or verdict not in ("left", "right"):
        return verdict
    return "chosen" if accepts(table, item, verdict) else "rejected"
