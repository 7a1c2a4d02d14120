"""Named sets that models are scored on, as recipes write them; and what a model was trained on, which no set may hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field, model_validator

from cluster import storage
from operators import shards
from operators.config import Settings
from operators.stage import StageContext

TRAINS = frozenset({"pretrain", "sft", "dpo", "kto", "reward", "grpo"})


class SetSettings(Settings):
    """A named set that models are scored on: rows of stages, or files of questions with choices."""

    input: str | list[str] | None = Field(
        default=None,
        description="Stages with conversations (scored on what the assistant says), documents, or preference pairs (scored by how "
        "often the chosen reply is likelier than the rejected one).",
    )
    choices: str | list[str] | None = Field(
        default=None,
        description="Files in JSON Lines instead, one object a question: `question`, `choices`, `answer` (one of them, its letter "
        "or its index from 0). Scored by accuracy, the likeliest choice a byte being the reply.",
    )
    held_out: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="Score the share of rows that training kept out under the same `held_out`; 0: all.",
    )
    max_rows: int = Field(default=500, ge=1, description="Rows scored at most, drawn by a hash of their id.")
    allow_overlap: bool = Field(
        default=False, description="Score rows that a model was trained on as well, which shows what it remembers, not what it can."
    )

    @model_validator(mode="after")
    def _one_source(self) -> SetSettings:
        if (self.input is None) == (self.choices is None):
            raise ValueError("give exactly one of `input` and `choices`")
        if self.choices is not None and self.held_out:
            raise ValueError("`held_out` belongs to `input`: files of choices are scored whole")
        return self


def listed(value: str | list[str] | None) -> list[str]:
    """One name, several or none as a list."""
    return [value] if isinstance(value, str) else value or []


def scored(
    name: str, chosen: SetSettings, inputs: Mapping[str, str], base_directory: str, limit: int | None = None
) -> dict[str, Any]:
    """A set as a job is told it (train.settings_evaluate.ScoredSet); `inputs` are the directories of stages.

    Raises ValueError for stages of which some hold preference pairs and others none.
    """
    directories = [inputs[stage] for stage in listed(chosen.input)]
    pairs = {"chosen" in shards.columns(directory) for directory in directories}
    if len(pairs) > 1:
        raise ValueError(f"set {name!r}: some of its stages hold preference pairs and others do not; make two sets of them")
    return {
        "name": name,
        "measure": "accuracy" if chosen.choices is not None or pairs == {True} else "loss",
        "inputs": directories,
        "choices": [storage.absolute(path, base_directory) for path in listed(chosen.choices)],
        "held_out": chosen.held_out,
        "max_rows": chosen.max_rows if limit is None else min(chosen.max_rows, limit),
        "allow_overlap": chosen.allow_overlap,
    }


def trained_on(context: StageContext, models: list[str]) -> list[dict[str, Any]]:
    """What stages' models, and those they were made from, were trained on, by the manifests of this run: rows of
    conversations and pairs, and the documents of packs. Of models from outside the run nothing is known."""
    run = shards.run_directory(context.directory)
    waiting = [(name, context.inputs[name]) for name in models if name in context.inputs]
    seen: set[str] = set()
    found: dict[tuple[str, str], dict[str, Any]] = {}
    while waiting:
        stage, directory = waiting.pop()
        if directory in seen:
            continue
        seen.add(directory)
        manifest = shards.load_manifest(directory)
        inputs = {name: storage.join(run, path) for name, path in manifest.inputs.items()}
        taken = mixed(manifest.config.get("input", dict.fromkeys(inputs))) if manifest.kind in TRAINS else set()
        kept = manifest.stats.get("held_out_shares", {})
        for name, path in inputs.items():
            if "model" in shards.load_manifest(path).files:
                waiting.append((name, path))
            elif name in taken:
                share = float(kept.get(name) or manifest.config.get("held_out") or 0.0)
                for row in given(stage, name, path, share, run):
                    found[row["stage"], row["input"]] = row
    return [found[key] for key in sorted(found)]


def mixed(value: object) -> set[str]:
    """The stages that a training stage's `input` names."""
    return {value} if isinstance(value, str) else set(value) if isinstance(value, Mapping) else set()


def given(stage: str, name: str, path: str, held_out: float, run: str) -> list[dict[str, Any]]:
    """What `stage` is given by its input `name`, as jobs are told it (train.settings_evaluate.TrainedOn)."""
    made = shards.load_manifest(path)
    rows = [(name, path, held_out)]
    if made.kind == "pack":
        held_out = float(made.config.get("holdout", 0.0))
        rows = [(key, storage.join(run, inner), held_out) for key, inner in made.inputs.items()]
    found = []
    for key, source, share in rows:
        columns = shards.columns(source)
        if "id" in columns and columns & {"text", "messages", "chosen"}:
            found.append({"stage": stage, "input": key, "directory": source, "held_out": share})
    return found


# ---------------------------------------------------------------- before and after a fine-tune

_MOST_ROWS = 256  # of all sets that nobody asked for
_LEAST_ROWS = 16  # of each of them
_LEAST_INPUT = 20  # rows; a smaller input is left whole


class CompareSettings(Settings):
    """What a training stage scores its model on before the first step and after the last, and how much may be lost."""

    domain: dict[str, SetSettings] | None = Field(
        default=None,
        description="Named sets of what is to be learnt. Default: rows that are held out of each input (a 20th and 128 at most, or "
        "the stage's `held_out`; of packs the documents that `holdout` kept out).",
    )
    general: dict[str, SetSettings] | None = Field(
        default=None,
        description="Named sets of what is to be kept. Default: rows that are held out of inputs marked `general: true` (in sft "
        "also of documents); without such an input the general sets of the model that training starts from.",
    )
    most_lost: float | None = Field(
        default=None,
        ge=0,
        lt=1,
        description="Share of general ability that may be lost on any general set: 0.05 keeps 95% of accuracy, or lets perplexity "
        "grow to 1/0.95 of what it was. A model that lost more is kept, but the stage fails and no stage is given it.",
    )
    override: str | None = Field(default=None, min_length=8, description="Pass it on whatever was lost, for this reason.")

    @model_validator(mode="after")
    def _names_differ(self) -> CompareSettings:
        both = sorted((self.domain or {}).keys() & (self.general or {}).keys())
        if both:
            raise ValueError(f"`domain` and `general` both have a set {both[0]!r}; give it another name in one of them")
        if self.most_lost is not None and self.general == {}:
            raise ValueError("`most_lost` needs a set of general ability, and `general` is empty")
        return self

    @property
    def sets(self) -> list[tuple[str, str, SetSettings]]:
        """(role, name, set) of all sets that were asked for."""
        return [
            *(("domain", name, chosen) for name, chosen in (self.domain or {}).items()),
            *(("general", name, chosen) for name, chosen in (self.general or {}).items()),
        ]


def rows_kept_out(rows: int) -> float:
    """The share of an input of so many rows that is held out where nobody says how much.

    A 20th, so that training loses little, but 8 rows where a 10th has as many, and 128 at most, which measure a loss in nats a
    token to a few percent; none of an input whose few rows would measure nothing.
    """
    return 0.0 if rows < _LEAST_INPUT else min(0.1, max(0.05, 8 / rows), 128 / rows)


def automatic(role: str, name: str, directory: str, held_out: float, run: str) -> dict[str, Any] | None:
    """A set of the rows that are held out of an input; None where none are."""
    found = given("", name, directory, held_out, run)
    shares = {row["held_out"] for row in found}
    if not found or shares == {0.0}:
        return None
    directories = [row["directory"] for row in found]
    pairs = all("chosen" in shards.columns(path) for path in directories)
    return {
        "name": name, "role": role, "measure": "accuracy" if pairs else "loss", "inputs": directories, "held_out": max(shares),
        "automatic": True, "source": {"input": name},
    }  # fmt: skip


def bounded(sets: list[dict[str, Any]], limit: int | None) -> list[dict[str, Any]]:
    """Automatic sets with the number of rows that each may have."""
    most = max(_LEAST_ROWS, _MOST_ROWS // max(1, sum(chosen["automatic"] for chosen in sets)))
    most = most if limit is None else min(most, limit)
    return [{**chosen, "max_rows": most} if chosen["automatic"] else chosen for chosen in sets]


def inherited(context: StageContext, model: str) -> list[dict[str, Any]]:
    """The general sets that the model, or the last before it that has any, was measured on, so that a chain of fine-tunes keeps
    its measure; none for a model from outside the run."""
    run = shards.run_directory(context.directory)
    waiting = [context.inputs[model]] if model in context.inputs else []
    while waiting:
        manifest = shards.load_manifest(waiting.pop())
        inputs = {name: storage.join(run, path) for name, path in manifest.inputs.items()}
        rows = [
            row
            for row in (manifest.stats.get("evaluation") or {}).get("sets", [])
            if row["role"] == "general" and "inherited" not in row
        ]
        if rows:
            return [_again(context, manifest, inputs, row, run) for row in rows]
        waiting += [path for path in inputs.values() if "model" in shards.load_manifest(path).files]
    return []


def _again(
    context: StageContext, manifest: shards.Manifest, inputs: Mapping[str, str], row: Mapping[str, Any], run: str
) -> dict[str, Any]:
    source = {"inherited": manifest.stage}
    if row["automatic"]:
        share = float((manifest.stats.get("held_out_shares") or {}).get(row["input"], 0.0))
        found = automatic("general", str(row["set"]), inputs[row["input"]], share, run)
        if found is None:
            raise ValueError(f"stage {manifest.stage!r} measured {row['set']!r} on held-out rows, and holds none out")
        return {**found, "source": source}
    chosen = SetSettings.model_validate(manifest.config["evaluate"]["general"][row["set"]])
    told = scored(str(row["set"]), chosen, inputs, context.base_directory, context.limit)
    return {**told, "role": "general", "automatic": True, "source": source}


def sentence(row: Mapping[str, Any]) -> str:
    """What was gained or lost on one set: a row of a training stage's `evaluation`."""
    word = "lost" if row["lost"] > 0 else "gained"
    unit = "accuracy" if row["measure"] == "accuracy" else "nats a token"
    return (
        f"{row['role']} set {row['set']}: {word} {abs(row['lost']):.1%} ({unit} {row['before']:.4g} before, {row['after']:.4g} "
        f"now; {row['rows']} rows)"
    )


def lost_too_much(settings: CompareSettings | None, directory: str) -> str | None:
    """Why a finished training stage's model is not passed on; None if it is."""
    if settings is None or settings.most_lost is None or settings.override is not None:
        return None
    found = shards.load_manifest(directory).stats.get("evaluation") or {}
    general = [row for row in found.get("sets", []) if row["role"] == "general"]
    if not general:
        return (
            "`evaluate.most_lost` bounds what may be lost, and no set of general ability was scored; name one under "
            "`evaluate.general`, or mark an input `general: true`, and run again"
        )
    broken = [row for row in general if row["lost"] > settings.most_lost]
    if not broken:
        return None
    others = [row for row in found["sets"] if row not in broken]
    beside = f" Beside that: {'; '.join(map(sentence, others))}." if others else ""
    return (
        f"the model lost more than evaluate.most_lost allows ({settings.most_lost:.1%}): {'; '.join(map(sentence, broken))}."
        f"{beside} It is not passed on to other stages; its weights stay in {storage.join(directory, 'model')}. Train it otherwise "
        "(rehearsal, EWC, LoRA, a lower learning rate: docs/forgetting.md); or, and neither trains anything again, raise the bound "
        "or set `evaluate.override: REASON`"
    )
