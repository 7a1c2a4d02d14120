"""Symptoms of a model made worse, measured on what a run's model says: each with number, bound, verdict and remedy.

Replies are greedy, so the same model gives the same; they are kept under the run (`.diagnose/`), and a diagnosis that was
broken off goes on where it stopped. The base is what the stage trained from: symptoms that it has too are no work of the stage.
"""

from __future__ import annotations

import json
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
from pipelines.report.view import RunView, StageView, load_run
from pipelines.stages.training import is_external
from pipelines.symptom_texts import TEXTS
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


@dataclass(frozen=True)
class Symptom:
    """One measure. `verdict`: ok, bad, or unmeasured (with `note` saying why); `before` is the base's number."""

    code: str
    verdict: Literal["ok", "bad", "unmeasured"]
    value: float | None = None
    bound: float | None = None
    direction: Literal["above", "below"] = "above"  # on which side of the bound it is bad
    before: float | None = None
    note: str = ""

    def as_json(self, language: Language) -> dict[str, Any]:
        """Everything, with name and remedy in a language."""
        words = {key: TEXTS[self.code][key][0 if language == "en" else 1] for key in ("name", "remedy")}
        return {**self.__dict__, **words}

    def line(self, language: Language) -> str:
        """One line for the terminal; the remedy follows where the verdict is bad."""
        name, remedy = (TEXTS[self.code][key][0 if language == "en" else 1] for key in ("name", "remedy"))
        words = {"ok": ("ok", "正常"), "bad": ("BAD", "异常"), "unmeasured": ("not measured", "未测量")}
        verdict = words[self.verdict][0 if language == "en" else 1]
        if self.value is None:
            return f"{verdict:<12} {name}: {self.note}"
        sign = "<=" if self.direction == "above" else ">="
        word = ", before" if language == "en" else "，训练前"
        before = "" if self.before is None else f"{word} {self.before:.3g}"
        note = f" ({self.note})" if self.note else ""
        told = f"{verdict:<12} {name}: {self.value:.3g} ({sign} {self.bound:.3g}{before}){note}"
        return told if self.verdict != "bad" else f"{told}\n             -> {remedy}"


def judged(code: str, value: float, bound: float, direction: Literal["above", "below"] = "above", **extra: Any) -> Symptom:
    """A symptom with its verdict; values are rounded before they are compared."""
    value = round(value, 6)
    bad = value > bound if direction == "above" else value < bound
    return Symptom(code, "bad" if bad else "ok", value, bound, direction, **extra)


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

    Returns {"stage", "base", "symptoms": [Symptom]}. Raises FileNotFoundError for no run, SettingsError for a stage that
    made no model.
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
    text = {**result, "symptoms": [{"en": s.as_json("en"), "zh": s.as_json("zh")} for s in found], "replies": replies.by_group}
    storage.write_bytes(
        storage.join(run.directory, "diagnosis.json"), json.dumps(text, ensure_ascii=False, indent=1, sort_keys=True).encode()
    )
    return result


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
        found.append(Symptom("strangeness", "unmeasured", note="the model was not trained from another"))
    vocabulary = symptoms.Vocabulary(training)
    if len(vocabulary.known) >= _LEAST_WORDS and old is not None:
        own = round(vocabulary.unknown(old), 6)
        found.append(judged("invalid_words", vocabulary.unknown(texts) - own, 0.1, before=own))
    else:
        why = f"{len(vocabulary.known)} words are known, {_LEAST_WORDS} are needed" if old is not None else "there is no base"
        found.append(Symptom("invalid_words", "unmeasured", note=why))

    def compared(measure: Callable[[Sequence[str]], float]) -> float | None:
        return None if old is None else round(measure(old), 6)

    found.append(judged("broken_characters", symptoms.broken(texts), 0.02, before=compared(symptoms.broken)))
    found.append(judged("repetition", symptoms.repetition(texts), 0.3, before=compared(symptoms.repetition)))
    found.append(judged("diversity", symptoms.distinct(texts), 0.35, "below", before=compared(symptoms.distinct)))
    share, opening = symptoms.common_opening(texts)
    earlier = None if old is None else round(symptoms.common_opening(old)[0], 6)
    found.append(judged("rigid_opening", share, 0.25, before=earlier, note=opening))
    found.append(judged("copied", symptoms.copied(texts, training), 0.25))
    if not chat:
        why = "the model has no chat template"
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
    """The largest loss that an evaluate stage found for this model, on sets other than those it gained on."""
    rows = [
        row
        for stage in run.of_kind("evaluate")
        for row in stage.stats.get("changes", [])
        if row["after"] == view.name and row["lost"] is not None
    ]
    if not rows:
        return Symptom(
            "general_ability", "unmeasured", note="no evaluate stage compares it on `sets` with one before (docs/evaluation.md)"
        )
    worst = max(rows, key=lambda row: row["lost"])
    note = f"{worst['set']}: {worst['before_value']:.4g} -> {worst['after_value']:.4g} {worst['measure']}"
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
        return [Symptom("adapter_capacity", "unmeasured", note="the stage left no curve")]
    last = _tail(own)
    for other in full:
        curve = [float(point["loss"]) for point in other.stats.get("curve", []) if "loss" in point]
        if curve:
            note = f"rank {rank}: loss {last:.3f}, {other.name} with all weights {_tail(curve):.3f}"
            return [judged("adapter_capacity", last / _tail(curve) - 1.0, 0.1, note=note)]
    shape = f"; {symptoms.plateau(own):.0%} of the fall of the loss in its last third" if len(own) >= 9 else ""
    note = f"rank {rank}, last loss {last:.3f}{shape}; the run has no full fine-tuning of the same inputs to compare with"
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
