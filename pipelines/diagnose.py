"""Symptoms of a model made worse, measured on what a run's model says: each with number, bound, verdict and remedy.

Replies are greedy, so the same model gives the same; they are kept under the run (`.diagnose/`), and a diagnosis that was
broken off goes on where it stopped. The base is what the stage trained from: what it shows as badly is no work of the stage, and
its verdict is `inherited`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from cluster import storage
from operators import shards
from operators.config import SettingsError, nearest
from operators.tables import content_hash
from pipelines.report.view import DIAGNOSIS_FILE, RunView, StageView, load_run
from pipelines.stages.training import is_external
from pipelines.symptom_texts import MEASURES, NOTES, TEXTS, VERDICTS
from train.settings import is_shape

if TYPE_CHECKING:
    from transformers.modeling_utils import PreTrainedModel
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase

Language = Literal["en", "zh"]
MODEL_KINDS = ("pretrain", "sft", "dpo", "kto", "grpo", "merge", "promote")

_SAMPLE_ROWS = 20_000  # training rows that replies and words are compared with
_LEAST_WORDS = 2_000  # a vocabulary below this knows too little to call a word invalid
_BATCH = 8  # prompts of one generation
_VERSION = 1  # of the replies: raised when prompts are put otherwise
_WORSE = 0.1  # by which a number that was bad before must be worse for the stage to have done it

Verdict = Literal["ok", "bad", "inherited", "unmeasured"]
Note = tuple[str, str]  # English, Chinese
_BOTH = ("", "")


@dataclass(frozen=True)
class Symptom:
    """One measure. `verdict`: ok, bad, inherited (as bad in the base), or unmeasured (with `note` saying why); `before` is the
    base's number."""

    code: str
    verdict: Verdict
    value: float | None = None
    bound: float | None = None
    direction: Literal["above", "below"] = "above"  # on which side of the bound it is bad
    before: float | None = None
    note: Note = _BOTH

    def as_json(self, language: Language) -> dict[str, Any]:
        """Everything, with name, remedy and note in a language."""
        side = 0 if language == "en" else 1
        words = {key: TEXTS[self.code][key][side] for key in ("name", "remedy")}
        return {**self.__dict__, "note": self.note[side], **words}

    def line(self, language: Language) -> str:
        """One line for the terminal; the remedy follows where the model is ill."""
        side = 0 if language == "en" else 1
        name, remedy = (TEXTS[self.code][key][side] for key in ("name", "remedy"))
        verdict, colon = VERDICTS[self.verdict][side], (": ", "：")[side]
        verdict += " " * (14 - sum(1 + (ord(char) > 0x2E7F) for char in verdict))
        if self.value is None:
            return f"{verdict}{name}{colon}{self.note[side]}"
        sign = "<=" if self.direction == "above" else ">="
        before = "" if self.before is None else (", before {:.3g}", "，训练前 {:.3g}")[side].format(self.before)
        open_, close = ((" (", ")"), ("（", "）"))[side]
        note = f"{open_}{self.note[side]}{close}" if self.note[side] else ""
        told = f"{verdict}{name}{colon}{self.value:.3g}{open_}{sign} {self.bound:.3g}{before}{close}{note}"
        return f"{told}\n{' ' * 14}-> {remedy}" if self.verdict in ("bad", "inherited") else told


def judged(
    code: str, value: float, bound: float, direction: Literal["above", "below"] = "above", *, before: float | None = None,
    note: Note = _BOTH,
) -> Symptom:  # fmt: skip
    """A symptom with its verdict: `inherited` where the base was past the bound too and the value is worse by 0.1 at most.
    Values are rounded before they are compared."""
    value, before = round(value, 6), None if before is None else round(before, 6)
    sign = 1 if direction == "above" else -1
    verdict: Verdict = "bad" if sign * (value - bound) > 0 else "ok"
    if verdict == "bad" and before is not None and sign * (before - bound) > 0 and sign * (value - before) <= _WORSE:
        verdict = "inherited"
    return Symptom(code, verdict, value, bound, direction, before, note)


@dataclass
class Replies:
    """Greedy replies of one model by group of probes, in the order of the probes."""

    by_group: dict[str, list[str]] = field(default_factory=dict)

    @property
    def all(self) -> list[str]:
        return [reply for replies in self.by_group.values() for reply in replies]


def diagnose(
    run_directory: str, stage: str | None = None, *, max_new_tokens: int = 96, base_directory: str = ".",
    progress: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:  # fmt: skip
    """Measure the symptoms of a stage's model (default: the last that made one) and write RUN/diagnosis.json.

    Returns {"stage", "base", "max_new_tokens", "symptoms": [Symptom]}. Raises FileNotFoundError for no run, SettingsError
    for a stage that made no model.
    """
    run = load_run(run_directory)
    chosen = _chosen(run, stage)
    before = _base(run, chosen, base_directory)
    path = _model_path(chosen)
    from train import models

    found = [_general(run, chosen), *_capacity(run, chosen)]
    model, tokenizer = models.load(path), models.load_tokenizer(path)
    chat = bool(tokenizer.chat_template)
    replies = _answers(run, path, _identity(chosen), model, tokenizer, max_new_tokens, progress)
    del model
    earlier, strange = None, None
    if before is not None:
        base_model, base_tokenizer = models.load(before[1]), models.load_tokenizer(before[1])
        earlier = _answers(run, before[1], before[2], base_model, base_tokenizer, max_new_tokens, progress)
        strange = tuple(_nats(base_model, base_tokenizer, side.all) for side in (replies, earlier))
    found += symptoms_of(replies, earlier, strange, _training_texts(run, chosen), chat)
    result = {"stage": chosen.name, "base": before[0] if before else None, "max_new_tokens": max_new_tokens, "symptoms": found}
    _keep(run, chosen, result, replies, earlier)
    return result


def summary(found: dict[str, Any], language: Language) -> str:
    """A line on a whole diagnosis, and one more where the model before had symptoms too."""
    side = 0 if language == "en" else 1
    counts = Counter(symptom.verdict for symptom in found["symptoms"])
    told = _note("trained_from", base=found["base"]) if found["base"] else _BOTH
    values = {"bad": counts["bad"], "total": len(found["symptoms"]), "inherited": counts["inherited"]}
    line = f"{found['stage']}{told[side]}{_note('counts', **values)[side]}"
    return f"{line}\n{NOTES['mend_before'][side]}" if counts["inherited"] else line


def _keep(run: RunView, view: StageView, result: dict[str, Any], replies: Replies, before: Replies | None) -> None:
    """Put a diagnosis on file beside those of other stages."""
    path = storage.join(run.directory, DIAGNOSIS_FILE)
    kept = json.loads(storage.read_bytes(path)) if storage.exists(path) else {}
    asked = [
        {
            "group": name, **probe, "reply": replies.by_group[name][place],
            "before": before.by_group[name][place] if before else None,
        }
        for name, group in probes().items() for place, probe in enumerate(group)
    ]  # fmt: skip
    symptoms = [{"en": symptom.as_json("en"), "zh": symptom.as_json("zh")} for symptom in result["symptoms"]]
    told = {**result, "model": _identity(view), "symptoms": symptoms, "replies": asked}
    stages = {**kept.get("stages", {}), view.name: told}
    storage.write_bytes(path, json.dumps({"stages": stages}, ensure_ascii=False, indent=1, sort_keys=True).encode())


def symptoms_of(
    replies: Replies, before: Replies | None, nats: Sequence[float] | None, training: Sequence[str], chat: bool
) -> list[Symptom]:
    """What replies show, beside those of the base (`before`). `nats` are the means a token of both under the base.

    A pure function of recorded replies. A model without a chat template follows no instructions: what only shows in answers
    is unmeasured then.
    """
    from train import symptoms

    texts, old = replies.all, before.all if before else None
    found = []
    if nats is not None:
        found.append(judged("strangeness", nats[0] - nats[1], 1.5))
    else:
        found.append(Symptom("strangeness", "unmeasured", note=NOTES["no_base"]))
    vocabulary = symptoms.Vocabulary(training)
    if old is None:
        found.append(Symptom("invalid_words", "unmeasured", note=NOTES["no_base"]))
    elif len(vocabulary.known) < _LEAST_WORDS:
        note = _note("few_words", known=len(vocabulary.known), needed=_LEAST_WORDS)
        found.append(Symptom("invalid_words", "unmeasured", note=note))
    else:
        own = vocabulary.unknown(old)
        note = _note("own_share", share=own)
        found.append(judged("invalid_words", vocabulary.unknown(texts) - own, 0.1, note=note))

    def compared(measure: Callable[[Sequence[str]], float]) -> float | None:
        return None if old is None else measure(old)

    found.append(judged("broken_characters", symptoms.broken(texts), 0.02, before=compared(symptoms.broken)))
    found.append(judged("repetition", symptoms.repetition(texts), 0.3, before=compared(symptoms.repetition)))
    found.append(judged("diversity", symptoms.distinct(texts), 0.35, "below", before=compared(symptoms.distinct)))
    share, opening = symptoms.common_opening(texts)
    note = (f"“{opening}”",) * 2 if opening else _BOTH
    earlier = compared(lambda items: symptoms.common_opening(items)[0])
    found.append(judged("rigid_opening", share, 0.25, before=earlier, note=note))
    found.append(
        judged("copied", symptoms.copied(texts, training), 0.25, before=compared(lambda items: symptoms.copied(items, training)))
    )
    if not chat:
        why = NOTES["no_template"]
        return found + [
            Symptom(code, "unmeasured", note=why) for code in ("refusal", "format_json", "format_xml", "format_sql", "abstention")
        ]
    groups, older = replies.by_group, before.by_group if before else {}

    def pair(group: str, measure: Callable[[Sequence[str]], float]) -> tuple[float, float | None]:
        return measure(groups[group]), measure(older[group]) if group in older else None

    value, was = pair("harmless", lambda items: symptoms.refusing(items)[0])
    found.append(judged("refusal", value, 0.1, before=was))
    for form in ("json", "xml", "sql"):
        value, was = pair(form, lambda items, form=form: symptoms.well_formed(items, form))  # type: ignore[misc]
        found.append(judged(f"format_{form}", value, 0.5, "below", before=was))
    value, was = pair("unanswerable", lambda items: symptoms.refusing(items)[1])
    found.append(judged("abstention", value, 0.5, "below", before=was))
    return found


def _note(key: str, **values: Any) -> Note:
    english, chinese = NOTES[key]
    return english.format(**values), chinese.format(**values)


def _chosen(run: RunView, stage: str | None) -> StageView:
    able = [view for view in run.stages if view.kind in MODEL_KINDS and view.manifest and "model" in view.manifest.files]
    if stage is None:
        if not able:
            raise SettingsError(f"{run.directory}: no finished stage made a model that writes")
        return able[-1]
    for view in able:
        if view.name == stage:
            return view
    raise SettingsError(f"{run.directory}: stage {stage!r} made no model that writes{nearest(stage, [view.name for view in able])}")


def _model_path(view: StageView) -> str:
    assert view.manifest is not None
    return shards.output(view.directory, view.manifest.files["model"])


def _identity(view: StageView) -> str:
    return view.manifest.fingerprint if view.manifest else view.relative


def _base(run: RunView, view: StageView, base_directory: str) -> tuple[str, str, str] | None:
    """(name, path, identity) of the model that the stage trained from; None for one from scratch."""
    assert view.manifest is not None
    if view.kind == "promote":
        return _base(run, run.stage(str(view.manifest.config["model"])), base_directory)
    named = view.manifest.config.get("model")
    if not isinstance(named, str) or is_shape(named):
        return None
    if is_external(named):
        path = named if named.startswith("packaged:") else storage.absolute(named, base_directory)
        return named, path, content_hash({"path": path})[:16]
    earlier = run.stage(named)
    if earlier.manifest is None:
        raise SettingsError(f"stage {view.name}: the record of {named!r}, which it trained from, cannot be read")
    return named, _model_path(earlier), _identity(earlier)


def _inputs(run: RunView, view: StageView) -> Iterator[StageView]:
    """Finished input stages whose rows are conversations or documents."""
    if view.kind in ("promote", "merge") and view.manifest is not None:
        yield from _inputs(run, run.stage(str(view.manifest.config["model"])))
        return
    for name in view.inputs:
        other = run.stage(name)
        if other.manifest is None:
            continue
        if other.kind == "pack":
            yield from _inputs(run, other)
        elif {"text", "messages", "chosen"} & shards.columns(other.directory):
            yield other


def _training_texts(run: RunView, view: StageView) -> list[str]:
    """Replies and documents that the stage was trained on, the same number of rows of each input at most."""
    sources = list(_inputs(run, view))
    texts: list[str] = []
    for source in sources:
        columns = shards.columns(source.directory)
        name = next(column for column in ("messages", "chosen", "text") if column in columns)
        rows = (row for part in shards.parts([source.directory]) for _, batch in shards.read(part, [name]) for row in batch[name])
        for row in islice(rows, _SAMPLE_ROWS // len(sources)):
            value = row.as_py()
            if isinstance(value, str):
                texts.append(value)
            else:
                texts += [turn["content"] for turn in value or [] if turn["role"] == "assistant"]
    return texts


def _general(run: RunView, view: StageView) -> Symptom:
    """The largest loss of this model: on the general sets that its own stage scored before and after, and on those of evaluate
    stages."""
    own = (view.stats.get("evaluation") or {}).get("sets", [])
    rows = [(row, row["before"], row["after"]) for row in own if row["role"] == "general"]
    rows += [
        (row, row["before_value"], row["after_value"])
        for stage in run.of_kind("evaluate")
        for row in stage.stats.get("changes", [])
        if row["after"] == view.name and row["lost"] is not None
    ]
    if not rows:
        return Symptom("general_ability", "unmeasured", note=NOTES["no_comparison"])
    worst, before, after = max(rows, key=lambda row: row[0]["lost"])
    values = f"{worst['set']}: {before:.4g} -> {after:.4g}"
    english, chinese = MEASURES.get(worst["measure"], (worst["measure"],) * 2)
    note = (f"{values} {english}", f"{values} {chinese}")
    return judged("general_ability", max(0.0, worst["lost"]), 0.05, note=note)


def _capacity(run: RunView, view: StageView) -> list[Symptom]:
    """Of adapters: the last training loss against a full fine-tune from the same model on the same inputs, if the run has one."""
    if view.manifest is None or not view.manifest.config.get("lora"):
        return []
    from train import symptoms

    config = view.manifest.config
    own = [float(point["loss"]) for point in view.stats.get("curve", []) if "loss" in point]
    full = [
        other
        for other in run.stages
        if other.kind == view.kind and other.manifest is not None and not other.manifest.config.get("lora")
        and other.manifest.config.get("model") == config.get("model") and other.manifest.config.get("input") == config.get("input")
    ]  # fmt: skip
    rank = config["lora"]["rank"]
    if not own:
        return [Symptom("adapter_capacity", "unmeasured", note=NOTES["no_curve"])]
    last = _tail(own)
    for other in full:
        curve = [float(point["loss"]) for point in other.stats.get("curve", []) if "loss" in point]
        if curve:
            note = _note("full_curve", rank=rank, own=last, other=other.name, loss=_tail(curve))
            return [judged("adapter_capacity", last / _tail(curve) - 1.0, 0.1, note=note)]
    shape = _note("last_third", share=symptoms.plateau(own)) if len(own) >= 9 else _BOTH
    english, chinese = _note("no_full_curve", rank=rank, own=last)
    note = (english.replace("|", shape[0]), chinese.replace("|", shape[1]))
    return [Symptom("adapter_capacity", "unmeasured", note=note)]


def _tail(curve: Sequence[float]) -> float:
    return float(np.mean(curve[-max(1, len(curve) // 5) :]))


def probes() -> dict[str, list[dict[str, str]]]:
    """The prompts: group -> {"lang", "text"}."""
    import train

    loaded: dict[str, list[dict[str, str]]] = json.loads((Path(train.__file__).parent / "probes.json").read_text("utf-8"))
    return loaded


def _answers(
    run: RunView, path: str, identity: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int,
    progress: Callable[[str], None],
) -> Replies:  # fmt: skip
    """Replies to all probes, from the cache where they are there; new ones are kept batch by batch."""
    groups = probes()
    key = content_hash({"version": _VERSION, "model": identity, "path": path, "tokens": max_new_tokens})[:16]
    place = storage.join(run.directory, ".diagnose", f"{key}.json")
    kept: dict[str, str] = json.loads(storage.read_bytes(place)) if storage.exists(place) else {}
    wanted = list(dict.fromkeys(probe["text"] for group in groups.values() for probe in group))
    missing = [text for text in wanted if text not in kept]
    # Of one length together: less padding.
    missing.sort(key=lambda text: (len(text.encode()), text))
    for start in range(0, len(missing), _BATCH):
        prompts = missing[start : start + _BATCH]
        kept |= dict(zip(prompts, generate(model, tokenizer, prompts, max_new_tokens), strict=True))
        storage.write_bytes(place, json.dumps(kept, ensure_ascii=False, sort_keys=True).encode())
        progress(f"{path}: {min(len(missing), start + _BATCH)} of {len(missing)} replies")
    return Replies({name: [kept[probe["text"]] for probe in group] for name, group in groups.items()})


def generate(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], max_new_tokens: int) -> list[str]:
    """Greedy replies, one batch padded on the left; a model without a chat template goes on with the text."""
    import torch

    from train.rendering import encoded, rendered

    if tokenizer.chat_template:
        given = rendered(tokenizer, [[{"role": "user", "content": prompt}] for prompt in prompts], opened=True)
        if any(text is None for text in given):
            raise SettingsError("the chat template refuses a conversation of one question; diagnose needs it")
        rows = encoded(tokenizer, [text or "" for text in given])
    else:
        rows = encoded(tokenizer, list(prompts))
    room = model.config.max_position_embeddings - max_new_tokens
    rows = [row[-max(1, room) :] for row in rows]
    width = max(map(len, rows))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    ids = torch.full((len(rows), width), int(pad or 0), dtype=torch.long)  # type: ignore[arg-type]
    mask = torch.zeros_like(ids)
    for place, row in enumerate(rows):
        ids[place, width - len(row) :] = torch.tensor(row)
        mask[place, width - len(row) :] = 1
    model.eval()
    with torch.inference_mode():
        output = model.generate(  # type: ignore[operator]
            ids.to(model.device), attention_mask=mask.to(model.device), max_new_tokens=max_new_tokens, do_sample=False,
            use_cache=True, pad_token_id=int(pad or 0),  # type: ignore[arg-type]
        )  # fmt: skip
    return [str(text).strip() for text in tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)]


def _nats(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, replies: Sequence[str]) -> float:
    """Mean nats a token of texts under a model; 0.0 where all are shorter than two tokens."""
    from train.rendering import encoded
    from train.scoring import Row, log_probabilities

    limit = model.config.max_position_embeddings
    rows = [np.asarray(ids[:limit], np.int64) for ids in encoded(tokenizer, [reply for reply in replies if reply]) if len(ids) > 1]
    scored = [Row(ids, np.ones(len(ids), bool)) for ids in rows]
    if not scored:
        return 0.0
    return float(-log_probabilities(model, scored, 4096, model.device).sum() / sum(row.count for row in scored))
