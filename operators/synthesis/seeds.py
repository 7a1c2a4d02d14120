"""Seed tasks: the human-written start of a self-instruct pool."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

from cluster import storage
from operators.synthesis.heuristics import language_of


@dataclass(frozen=True)
class SeedTask:
    """One task of a seed file: `instances` are (input, output)."""

    id: str
    name: str
    instruction: str
    instances: tuple[tuple[str, str], ...]
    is_classification: bool
    lang: str


def parse_seed(line: str | bytes, where: str) -> SeedTask:
    """A seed task from its JSON line. Raises ValueError that says what is missing, and where."""
    try:
        row = json.loads(line)
        instances = tuple((str(item["input"]), str(item["output"])) for item in row["instances"])
        instruction = str(row["instruction"]).strip()
        classification = bool(row["is_classification"])
        return SeedTask(str(row["id"]), str(row.get("name", "")), instruction, instances, classification, language_of(instruction))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{where}: not a seed task ({type(error).__name__}: {error}); "
            "needed: id, instruction, instances [{input, output}], is_classification"
        ) from error


def read_seeds(paths: Sequence[str]) -> list[SeedTask]:
    """The tasks of seed files (JSONL), in order. Raises FileNotFoundError, ValueError naming file and line.

    Ids are made unique by the language and, where two files share one, the number of the file.
    """
    found: list[SeedTask] = []
    known: set[str] = set()
    for number, path in enumerate(paths):
        for entry in storage.list_files(path):
            for index, line in enumerate(storage.read_bytes(entry.path).splitlines()):
                if not line.strip():
                    continue
                task = parse_seed(line, f"{entry.path}, line {index + 1}")
                identity = f"{task.lang}:{task.id}"
                if identity in known:
                    identity = f"{task.lang}:{number}:{index}:{task.id}"
                known.add(identity)
                found.append(replace(task, id=identity))
    if not found:
        raise ValueError(f"no seed task in {', '.join(paths)}")
    return found
