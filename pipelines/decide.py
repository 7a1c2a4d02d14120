"""`danlu decide`: what other thresholds would change in a finished run, from stored measures, without reading text.

Each `--set` names an option of a filter as STAGE.OPERATOR.OPTION=VALUE. Limits by language may be written short:
`gopher_quality.min_words=30` is `gopher_quality.thresholds.*.min_words=30`, for all languages that the recipe sets no limit
of their own. Files of measures are replayed one by one, in as many processes or Ray tasks as asked for; only counts and a
few examples come back, and the text of those examples is the only text that is read.
"""

from __future__ import annotations

import copy
import json
import multiprocessing
import re
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pyarrow.parquet as pq
import yaml

from cluster import storage
from operators import registry, shards
from operators.config import SettingsError, first_model, nearest
from operators.replay import Example, Fate, Outcome, Replay

EXCERPT_CHARACTERS = 160
_MOVES_SHOWN = 8  # ways in which rejected rows are rejected for another reason
_UNIT = re.compile(r"^\w+/(\d+)-")


@dataclass(frozen=True)
class Setting:
    """One changed option: `old` is what the recipe says, None where it says nothing."""

    operator: str
    option: str
    old: Any
    new: Any

    def __str__(self) -> str:
        old = "default" if self.old is None else json.dumps(self.old, ensure_ascii=False)
        return f"{self.operator}  {self.option}: {old} -> {json.dumps(self.new, ensure_ascii=False)}"


@dataclass
class Shown:
    """An example for people: which document changes its fate, on which number, and the start of its text."""

    id: str
    lang: str
    value: float | None
    text: str


@dataclass
class Decision:
    """What would change in one stage."""

    stage: str
    directory: str
    measure: str
    settings: list[Setting]
    outcome: Outcome
    examples: dict[tuple[Fate, Fate], list[Shown]] = field(default_factory=dict)

    @property
    def kept(self) -> tuple[int, int, int]:
        """Rows kept before, after at least, after at most (undecided rows make the difference)."""
        before: Counter[str] = Counter()
        after: Counter[str] = Counter()
        for (old, new, _), count in self.outcome.fates.items():
            before[old.kind] += count
            after[new.kind] += count
        return before["kept"], after["kept"], after["kept"] + after["undecided"]

    def changes(self) -> list[tuple[Fate, Fate, Counter[str]]]:
        """(old fate, new fate, rows by language) of the rows whose fate changes, the largest of each kind first."""
        found: dict[tuple[Fate, Fate], Counter[str]] = {}
        for (old, new, lang), count in self.outcome.fates.items():
            if old != new:
                found.setdefault((old, new), Counter())[lang] += count
        order = {("kept", "rejected"): 0, ("rejected", "kept"): 1, ("rejected", "undecided"): 2, ("rejected", "rejected"): 3}
        ranked = sorted(found.items(), key=lambda item: (order[item[0][0].kind, item[0][1].kind], -item[1].total(), str(item[0])))
        return [(old, new, langs) for (old, new), langs in ranked]

    def to_json(self) -> dict[str, Any]:
        before, least, most = self.kept
        return {
            "stage": self.stage,
            "directory": self.directory,
            "measure": self.measure,
            "settings": [setting.__dict__ for setting in self.settings],
            "rows": self.outcome.rows,
            "disagreeing": self.outcome.disagreeing,
            "kept": {"before": before, "after": least, "undecided": most - least},
            "changes": [
                {
                    "from": old.__dict__,
                    "to": new.__dict__,
                    "rows": langs.total(),
                    "languages": dict(sorted(langs.items())),
                    "examples": [shown.__dict__ for shown in self.examples.get((old, new), [])],
                }
                for old, new, langs in self.changes()
            ],
        }


def decide(
    run_directory: str,
    settings: Sequence[str],
    *,
    stage: str | None = None,
    examples: int = 3,
    workers: int = 1,
    address: str | None = None,
) -> list[Decision]:
    """Replay the corpus stages that the settings name; without settings those with measures (or `stage`), as they are.

    `workers` processes share the files of measures, or the tasks of the Ray at `address`.
    Raises SettingsError for an unknown stage, operator or option, one that cannot be replayed, and a stage without
    measures; FileNotFoundError when the directory is no run.
    """
    record = _record(run_directory)
    stages = {name: entry for name, entry in record["stages"].items() if entry["status"] == "done"}
    manifests = {name: shards.load_manifest(storage.join(run_directory, entry["directory"])) for name, entry in stages.items()}
    wanted = _wanted(settings, manifests, record, stage)
    found = []
    for name, changes in wanted.items():
        directory, manifest = storage.join(run_directory, stages[name]["directory"]), manifests[name]
        if not manifest.measures:
            raise SettingsError(
                f"stage {name} kept no measures (its setting `measure` is {manifest.config.get('measure', 'of an older version')}, "
                "or no filter of it leaves the text alone): run it again with `measure: seen` or `measure: all`"
            )
        entries = manifest.config["operators"]
        changed = copy.deepcopy(entries)
        told = [_apply(name, changed, *change) for change in changes]
        stored = _columns(directory, manifest)
        arguments = (entries, changed, manifest.config["measure"], stored)
        Replay(*arguments)  # wrong settings are told before any work starts
        jobs = [(arguments, storage.join(directory, part["name"]), _unit_of(part), examples) for part in manifest.measures]
        total = Outcome()
        for outcome in _run(jobs, workers, address):
            total.add(outcome, examples)
        shown = {change: [_show(directory, manifest, change[0], item) for item in rows] for change, rows in total.examples.items()}
        found.append(Decision(name, directory, manifest.config["measure"], told, total, shown))
    return found


def _record(run_directory: str) -> dict[str, Any]:
    path = storage.join(run_directory, "run.json")
    if not storage.exists(path):
        raise FileNotFoundError(f"{run_directory} is no run: it has no run.json (a run is e.g. runs/quickstart)")
    return dict(json.loads(storage.read_bytes(path)))


def _wanted(
    settings: Sequence[str], manifests: dict[str, shards.Manifest], record: dict[str, Any], only: str | None
) -> dict[str, list[tuple[str, str, Any]]]:
    """Stage -> [(operator, option path, value)]."""
    corpus = [name for name, manifest in manifests.items() if manifest.kind == "corpus"]
    if not corpus:
        raise SettingsError("the run has no finished corpus stage; only their filters can be replayed")
    if only is not None:
        _check_stage(only, corpus, record)
    if not settings:
        return {name: [] for name in ([only] if only else [name for name in corpus if manifests[name].measures])}
    wanted: dict[str, list[tuple[str, str, Any]]] = {}
    for item in settings:
        path, equals, written = item.partition("=")
        pieces = [piece.strip() for piece in path.split(".")]
        if not equals or len(pieces) < 2 or not all(pieces):
            raise SettingsError(f"--set {item!r}: write [STAGE.]OPERATOR.OPTION=VALUE, e.g. web.gopher_quality.min_words=30")
        where = [only] if only else corpus
        if pieces[0] in record["stages"] and len(pieces) > 2:
            _check_stage(pieces[0], corpus, record)
            if only not in (None, pieces[0]):
                raise SettingsError(f"--set {item!r} is for stage {pieces[0]}, but --stage is {only}")
            where, pieces = [pieces[0]], pieces[1:]
        holders = [name for name in where if any(pieces[0] in key for key in _keys(manifests[name]).values())]
        if not holders:
            known = sorted(
                {key for name in where for keys in _keys(manifests[name]).values() for key in keys if not key[0].isdigit()}
            )
            told = nearest(pieces[0], known + ([] if only else corpus))
            raise SettingsError(f"--set {item!r}: {pieces[0]!r} is no operator of {', '.join(where)}{told}")
        for name in holders:
            wanted.setdefault(name, []).append((pieces[0], ".".join(pieces[1:]), _value(written)))
    return wanted


def _check_stage(name: str, corpus: list[str], record: dict[str, Any]) -> None:
    if name in corpus:
        return
    if name not in record["stages"]:
        raise SettingsError(f"the run has no stage {name!r}{nearest(name, list(record['stages']))}")
    if record["stages"][name]["status"] != "done":
        raise SettingsError(f"stage {name} is not finished: `danlu run` finishes it")
    raise SettingsError(f"stage {name} is no corpus stage; those of this run: {', '.join(corpus) or 'none'}")


def _keys(manifest: shards.Manifest) -> dict[int, set[str]]:
    """Place in the chain -> the ways to write the operator: its name, its name in the recipe, `NN:name`."""
    found = {}
    for place, entry in enumerate(manifest.config["operators"]):
        written, _ = registry.split(entry)
        name = registry.load(written).name
        found[place] = {name, written, f"{place:02d}:{name}"}
    return found


def _value(written: str) -> Any:
    try:
        value = yaml.safe_load(written)
    except yaml.YAMLError:
        return written
    return written if isinstance(value, dict) and not written.lstrip().startswith("{") else value


def _apply(stage: str, entries: list[Any], operator: str, option: str, value: Any) -> Setting:
    """Change one option in the recipe's entries. Raises SettingsError when operator or option cannot be told."""
    written = [registry.split(entry)[0] for entry in entries]
    names = [registry.load(name).name for name in written]
    places = [
        place
        for place, (name, path) in enumerate(zip(names, written, strict=True))
        if operator in (name, path, f"{place:02d}:{name}")
    ]
    if len(places) > 1:
        choices = ", ".join(f"{place:02d}:{names[place]}" for place in places)
        raise SettingsError(f"stage {stage} has {operator} {len(places)} times: write one of {choices}")
    place = places[0]
    _, options = registry.split(entries[place])
    model = registry.load(written[place]).settings
    path = _option_path(model, option.split("."), f"stages.{stage}.{operator}")
    target = options
    for depth, piece in enumerate(path[:-1]):
        inner = target.get(piece, model.model_fields[piece].default if depth == 0 else {})
        # one value for all languages becomes that of the others
        target[piece] = dict(inner) if isinstance(inner, dict) else {} if inner is None else {"*": inner}
        target = target[piece]
    old = target.get(path[-1])
    target[path[-1]] = value
    entries[place] = {written[place]: options}
    return Setting(f"{place:02d}:{names[place]}", ".".join(path), old, value)


def _option_path(model: Any, pieces: list[str], where: str) -> list[str]:
    """The path of an option in the settings; `min_words` and `zh.min_words` are found below the limits by language."""
    if pieces[0] in model.model_fields:
        return pieces
    known = list(model.model_fields)
    for name, item in model.model_fields.items():
        inner = first_model(item.annotation)
        if inner is None or not str(item.annotation).startswith("dict[str,"):
            continue
        known += list(inner.model_fields)
        if pieces[0] in inner.model_fields:
            return [name, "*", *pieces]
        if len(pieces) > 1 and pieces[1] in inner.model_fields:
            return [name, *pieces]
        if len(pieces) > 1:
            raise SettingsError(f"{where}: unknown option {'.'.join(pieces)!r}{nearest(pieces[-1], known)}")
    raise SettingsError(f"{where}: unknown option {pieces[0]!r}{nearest(pieces[0], known)}")


def _columns(directory: str, manifest: shards.Manifest) -> list[str]:
    with storage.open_input(storage.join(directory, manifest.measures[0]["name"])) as stream:
        return list(pq.read_schema(stream).names)


def _unit_of(part: dict[str, Any]) -> int:
    match = _UNIT.match(part["name"])
    assert match is not None, part["name"]
    return int(match[1])


_Job = tuple[tuple[Any, ...], str, int, int]


def _replay(arguments: tuple[Any, ...], path: str, unit: int, examples: int) -> Outcome:
    return Replay(*arguments).part(path, unit, examples)


def _run(jobs: Sequence[_Job], workers: int, address: str | None) -> Iterator[Outcome]:
    """The outcomes in order, a bounded number of jobs in work."""
    if address is not None:
        import ray

        from cluster.connect import connect

        cluster = connect(address)
        task = ray.remote(_replay)
        yield from _in_order(jobs, lambda job: task.remote(*job), ray.get, 2 * max(1, int(cluster.cpus)))
    elif workers > 1 and len(jobs) > 1:
        with ProcessPoolExecutor(min(workers, len(jobs)), mp_context=multiprocessing.get_context("spawn")) as pool:
            yield from _in_order(jobs, lambda job: pool.submit(_replay, *job), lambda future: future.result(), 2 * workers)
    else:
        for job in jobs:
            yield _replay(*job)


def _in_order(
    jobs: Iterable[_Job], submit: Callable[[_Job], Any], result: Callable[[Any], Outcome], at_once: int
) -> Iterator[Outcome]:
    running: deque[Any] = deque()
    for job in jobs:
        running.append(submit(job))
        if len(running) >= at_once:
            yield result(running.popleft())
    while running:
        yield result(running.popleft())


def _show(directory: str, manifest: shards.Manifest, fate: Fate, example: Example) -> Shown:
    """The id and the start of the text of one row, from the unit's parts or rejects."""
    position = example.position
    for part in manifest.parts if fate.kind == "kept" else manifest.rejects:
        if _unit_of(part) != example.unit:
            continue
        if position < part["rows"]:
            row = _row(storage.join(directory, part["name"]), position)
            text = re.sub(r"\s+", " ", row.get("text") or "")
            return Shown(row["id"], example.lang, example.value, text[:EXCERPT_CHARACTERS])
        position -= part["rows"]
    raise FileNotFoundError(f"{directory}: unit {example.unit} has no row {example.position} ({fate.kind}); was a file removed?")


def _row(path: str, position: int) -> dict[str, Any]:
    with storage.open_input(path) as stream:
        file = pq.ParquetFile(stream)
        columns = [name for name in ("id", "text") if name in file.schema_arrow.names]
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            if position < rows:
                return dict(file.read_row_group(group, columns=columns).slice(position, 1).to_pylist()[0])
            position -= rows
    raise FileNotFoundError(f"{path} has fewer rows than its manifest says")


def lines(decision: Decision) -> list[str]:
    """What `danlu decide` prints for one stage."""
    outcome = decision.outcome
    before, least, most = decision.kept
    out = [f"{decision.stage}: {outcome.rows:,} rows with measures (measure: {decision.measure}), {decision.directory}"]
    out += [f"  {setting}" for setting in decision.settings]
    if not decision.settings and not outcome.disagreeing:
        return [*out, f"  the replay makes every decision of the stage again: {before:,} rows kept"]
    if outcome.disagreeing:
        out.append(
            f"  warning: {outcome.disagreeing:,} rows are decided otherwise by this version of Danlu under the stage's own settings"
        )
    changes = decision.changes()
    if not changes:
        return [*out, f"  nothing changes: {before:,} rows kept"]
    up_to = f" to {most:,} (undecided: {most - least:,})" if most > least else ""
    out += [f"  kept: {before:,} -> {least:,}{up_to}", ""]
    moved = [change for change in changes if change[0].kind == change[1].kind]
    for old, new, langs in [change for change in changes if change not in moved] + moved[:_MOVES_SHOWN]:
        shares = ", ".join(f"{lang or '?'} {count:,}" for lang, count in langs.most_common(8))
        more = f", {len(langs) - 8} more languages" if len(langs) > 8 else ""
        out.append(f"  {langs.total():>9,}  {old} -> {new}  ({shares}{more})")
        for shown in decision.examples.get((old, new), []) if old.kind != new.kind else []:
            value = "" if shown.value is None else f" {shown.value:.6g}"
            out.append(f"             {shown.id}{value}: {shown.text}")
    if len(moved) > _MOVES_SHOWN:
        left = sum(langs.total() for _, _, langs in moved[_MOVES_SHOWN:])
        out.append(
            f"  {left:>9,}  rejected for other reasons than before, in {len(moved) - _MOVES_SHOWN} more ways (--json lists them)"
        )
    if any(new.kind == "undecided" for _, new, _ in changes):
        hint = "they need the text" if decision.measure == "all" else "`measure: all` decides those that a later filter would see"
        out += ["", f"  undecided: the operator named was never run on these rows in this stage; {hint}"]
    return out
