"""What `danlu diagnose` found out about models of the run, as it lies on file."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from cluster import storage
from pipelines.report.view import DIAGNOSIS_FILE, RunView
from pipelines.symptom_texts import VERDICTS

_ORDER = {"bad": 0, "inherited": 1, "unmeasured": 2, "ok": 3}
_SHOWN = 8  # replies
_SYMPTOM = ("name", "remedy", "note", "verdict", "value", "before", "bound", "direction")
_REPLY = ("lang", "text", "reply", "before")


@dataclass(frozen=True)
class Diagnosis:
    """One model's. `symptoms` are pairs (English, Chinese) of the same mapping, the bad ones first; `stale` says that the
    stage has made another model since."""

    stage: str
    base: str | None
    counts: dict[str, int]
    symptoms: list[tuple[dict[str, Any], dict[str, Any]]]
    replies: list[dict[str, Any]]
    stale: bool


@dataclass(frozen=True)
class Diagnoses:
    """Those of a run in the order of its stages. `problem` says why a file that is there cannot be read."""

    found: list[Diagnosis] = field(default_factory=list)
    problem: str | None = None


def diagnoses(run: RunView) -> Diagnoses:
    """Read the run's diagnosis.json; nothing is found where it has none."""
    path = storage.join(run.directory, DIAGNOSIS_FILE)
    if not storage.exists(path):
        return Diagnoses()
    try:
        stages = json.loads(storage.read_bytes(path))["stages"]
        fingerprints = {view.name: view.manifest.fingerprint if view.manifest else None for view in run.stages}
        found = [_diagnosis(stages[name], fingerprints[name]) for name in fingerprints if name in stages]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return Diagnoses(problem=f"{path}: {type(error).__name__}: {error}")
    return Diagnoses(found)


def _diagnosis(told: dict[str, Any], fingerprint: str | None) -> Diagnosis:
    symptoms = [(_copied(both["en"], _SYMPTOM), _copied(both["zh"], _SYMPTOM)) for both in told["symptoms"]]
    symptoms.sort(key=lambda pair: _ORDER[pair[0]["verdict"]])
    counts = {verdict: sum(english["verdict"] == verdict for english, _ in symptoms) for verdict in VERDICTS}
    # Spread over the groups and languages: every so many of those that were asked.
    asked = [_copied(reply, _REPLY) for reply in told["replies"]]
    step = max(1, len(asked) // _SHOWN)
    return Diagnosis(told["stage"], told["base"], counts, symptoms, asked[::step][:_SHOWN], told["model"] != fingerprint)


def _copied(told: dict[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    """What the page shows; a KeyError here, not in its midst, where the file lacks it."""
    return {key: told[key] for key in keys}
