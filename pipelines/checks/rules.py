"""The rules: each reads the evidence and yields findings. Thresholds carry the reason for their value."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from operators.synthesis.curate.refusals import refuses
from operators.synthesis.curate.turns import REPLIES, Turns
from pipelines.checks.evidence import ALIGNED, TUNED, Evidence, general_inputs, inputs
from pipelines.checks.finding import Finding
from pipelines.stages.training import ComparedStage, is_external
from train.settings import PretrainSettings, is_shape

_LEAST_REHEARSAL = 0.05
_MOST_REFUSALS = 0.05  # a set of general instructions has 1 to 2%
_MOST_ONE_OPENING = 0.2
_LEAST_POINTS = 5  # steps after which a reward that never moved tells something
_LEAST_ROWS = 50  # shares of fewer rows say little
_SMALL = 1e8  # parameters; smaller models take higher rates (Kaplan et al. 2020, appendix D.6)
_RATES = {  # (full, LoRA), and where the bound is from
    "sft": (5e-5, 1e-3, "Biderman et al. 2024; Luo et al. 2023"),
    "dpo": (5e-6, 5e-5, "Tunstall et al. 2023 (Zephyr)"),
    "kto": (5e-6, 5e-5, "Ethayarajh et al. 2024"),
    "grpo": (5e-6, 5e-5, "Shao et al. 2024"),
    "pretrain": (3e-4, 1e-3, "Ibrahim et al. 2024"),
}
_EPOCHS = {"pretrain": 4.0, "sft": 5.0, "dpo": 3.0, "kto": 3.0}
_RECURRENT = ("mamba", "rwkv", "jamba", "bamba", "zamba", "falcon_h1", "recurrent", "hybrid", "nemotron_h", "lfm2", "qwen3_next")
_MARKS = {
    "chatml": "<|im_start|>",
    "llama3": "<|start_header_id|>",
    "gemma": "<start_of_turn>",
    "llama2": "[INST]",
    "mistral": "[INST]",
}


def general_data(seen: Evidence) -> Iterator[Finding]:
    for name, stage in seen.training("sft", "pretrain"):
        if not isinstance(stage.model, str) or is_shape(stage.model):
            continue  # from scratch there is nothing to forget
        given, marked = inputs(stage), general_inputs(stage)
        least = min(marked or given, key=lambda key: given[key])
        share = sum(given[key] for key in marked) if marked else given[least]
        if len(given) < 2 and not marked and not getattr(stage, "ewc", None):
            yield Finding("no_general_data", name, {"model": stage.model, "input": least})
        elif len(given) > 1 and share < _LEAST_REHEARSAL:
            yield Finding("little_general_data", name, {"input": least, "share": share})


def learning_rate(seen: Evidence) -> Iterator[Finding]:
    for name, stage in seen.training(*_RATES):
        rate: float = stage.learning_rate  # type: ignore[attr-defined]
        if not isinstance(stage.model, str) or is_shape(stage.model):
            continue
        full, low, source = _RATES[stage.kind]  # type: ignore[attr-defined]
        adapters = bool(getattr(stage, "lora", None))
        parameters = seen.parameters(name)
        bound = (low if adapters else full) * (10 if parameters < _SMALL else 1)
        if rate > bound:
            how = ("LoRA", "LoRA") if adapters else ("full training", "全参数训练")
            facts = {"rate": rate, "bound": bound, "how": how[0], "how_zh": how[1], "parameters": parameters, "source": source}
            yield Finding("learning_rate", name, facts)


def epochs(seen: Evidence) -> Iterator[Finding]:
    for name, stage in seen.training(*_EPOCHS):
        kind: str = stage.kind  # type: ignore[attr-defined]
        bound = _EPOCHS[kind] * (2 if getattr(stage, "lora", None) else 1)  # adapters have less room to memorise in
        batch = _batch(stage)
        steps: int | None = stage.steps  # type: ignore[attr-defined]
        for wanted, share in inputs(stage).items():
            found = seen.rows(wanted)
            if found is None or not found[0]:
                continue
            rows, basis = found
            passes: float | None = getattr(stage, "epochs", None)
            if passes is None and steps is not None:
                passes = steps * batch * share / rows
            if passes is not None and passes > bound:
                notes = (", estimated from the file", "，按文件行数估计") if basis else ("", "")
                facts = {"input": wanted, "epochs": passes, "samples": passes * rows, "rows": rows, "bound": bound}
                yield Finding("epochs", name, {**facts, "basis": notes[0], "basis_zh": notes[1]})


def warmup(seen: Evidence) -> Iterator[Finding]:
    for name, stage in seen.training():
        total = getattr(stage, "steps", None)
        if isinstance(stage, PretrainSettings) and total is None:
            total = 1000  # a budget in tokens: what matters is whether there is any warm-up
        if total is None or total < 20:
            continue
        steps = stage.schedule.warmup_steps(total)
        if steps == 0:
            yield Finding("no_warmup", name, {"steps": steps, "total": total})


def lora_targets(seen: Evidence) -> Iterator[Finding]:
    for name, stage in seen.training():
        lora: Any = getattr(stage, "lora", None)
        if lora is not None and lora.targets != "all-linear" and len(set(lora.targets)) < 4:
            yield Finding("lora_targets", name, {"targets": ", ".join(lora.targets)})


def packing(seen: Evidence) -> Iterator[Finding]:
    for name, stage in seen.training("sft"):
        kind = seen.model_file(seen.chain(name)[-1], "config.json").get("model_type", "")
        if getattr(stage, "packing", False) and any(part in kind for part in _RECURRENT):
            yield Finding("packing_not_isolated", name, {"type": kind})


def template(seen: Evidence) -> Iterator[Finding]:
    for name, stage in seen.training(*TUNED):
        wanted: str | None = getattr(stage, "chat_template", None)
        if wanted is None or "/" in wanted:
            continue
        for step in seen.chain(name)[1:]:
            before = getattr(seen.recipe.stages.get(step), "chat_template", None)
            if before is not None and before != wanted:
                yield Finding("template", name, {"found": f"{step} was trained with {before}", "wanted": wanted})
                break
        root = seen.chain(name)[-1]
        own = str(seen.model_file(root, "tokenizer_config.json").get("chat_template") or "")
        marks = [mark for mark in _MARKS.values() if mark in own]
        if marks and wanted in _MARKS and _MARKS[wanted] not in own:
            yield Finding("template", name, {"found": f"the template of {root} marks turns by {marks[0]}", "wanted": wanted})


def _batch(stage: Any) -> int:
    """Sequences or examples of a step."""
    return int(getattr(stage, "batch_sequences", 0) or stage.batch_examples)


def batch(seen: Evidence) -> Iterator[Finding]:
    if seen.workers is None:
        return
    for name, stage in seen.training():
        size = _batch(stage)
        groups = seen.workers // getattr(getattr(stage, "parallel", None), "tensor", 1)
        if groups and size % groups:
            divisors = ", ".join(str(n) for n in range(1, size + 1) if size % n == 0)
            yield Finding("batch", name, {"batch": size, "workers": groups, "divisors": divisors})


def aligned_without_sft(seen: Evidence) -> Iterator[Finding]:
    for name, stage in seen.training(*ALIGNED):
        chain = seen.chain(name)[1:]
        if any(getattr(seen.recipe.stages.get(step), "kind", "") == "sft" for step in chain):
            continue
        root = chain[-1] if chain else ""
        if is_external(root) and (root.startswith("packaged:") or _chats(seen, root)):
            continue
        if "sft" not in getattr(stage, "losses", {}) and getattr(stage, "loss", None) != "orpo":  # these learn the reply as well
            yield Finding("aligned_without_sft", name, {"model": chain[0] if chain else stage.model})


def _chats(seen: Evidence, model: str) -> bool:
    """True for a model at a path that has a chat template, or of which nothing can be read."""
    config = seen.model_file(model, "tokenizer_config.json")
    there = bool(seen.model_file(model, "config.json"))
    return bool(config.get("chat_template")) or not there


def _scores_itself(seen: Evidence, name: str) -> bool:
    """True for a stage that scores general ability before its first step and after its last: on a set that it names, on rows
    of an input marked general, or on the sets of a model before it in the recipe."""
    chain = [stage for stage in map(seen.recipe.stages.get, seen.chain(name)) if isinstance(stage, ComparedStage)]
    scored = [stage for stage in chain if stage.evaluate is not None and stage.goes_on()]
    if not scored or scored[0] is not chain[0]:
        return False
    return any(stage.evaluate.general or (stage.evaluate.general is None and general_inputs(stage)) for stage in scored)  # type: ignore[union-attr]


def measured(seen: Evidence) -> Iterator[Finding]:
    by_model: dict[str, str] = {}
    compared: dict[str, list[str]] = {}
    for name, stage in seen.recipe.stages.items():
        if stage.kind == "evaluate":  # type: ignore[attr-defined]
            compared[name] = list(getattr(stage, "models", []))
            by_model.update(dict.fromkeys(compared[name], name))
    for name, stage in seen.training(*TUNED):
        if _scores_itself(seen, name):
            continue
        if name not in by_model:
            yield Finding("unmeasured", name)
        elif isinstance(stage.model, str) and stage.model not in compared[by_model[name]]:
            yield Finding("before_unmeasured", name, {"evaluate": by_model[name], "model": stage.model})


def evaluated_on_training_data(seen: Evidence) -> Iterator[Finding]:
    """Stages and files that are both trained and measured on, with nothing held out on either side."""
    for name, stage in seen.recipe.stages.items():
        if stage.kind != "evaluate":  # type: ignore[attr-defined]
            continue
        for told, trained in seen.training(*TUNED, "reward"):
            shared = set(_measured_on(stage)) & set(_files_behind(seen, list(inputs(trained))))
            if shared and not getattr(trained, "held_out", 0.0):
                yield Finding(
                    "evaluated_on_training_data", name, {"evaluate": name, "shared": ", ".join(sorted(shared)), "stage": told}
                )


def _measured_on(stage: Any) -> list[str]:
    """Names of stages and paths of files that an evaluate stage scores as they are."""
    pairs = stage.pairs if isinstance(stage.pairs, list) else [stage.pairs] if stage.pairs else []
    found = list(pairs)
    sets = getattr(stage, "sets", None) or {}
    for entry in sets.values() if isinstance(sets, dict) else sets:
        told = entry.model_dump() if hasattr(entry, "model_dump") else dict(entry)
        if told.get("held_out"):
            continue
        for value in told.values():
            found += (
                [value]
                if isinstance(value, str)
                else [text for text in value if isinstance(text, str)]
                if isinstance(value, list)
                else []
            )
    return found


def _files_behind(seen: Evidence, names: list[str]) -> Iterator[str]:
    """These stages and the files they read, but not through stages that make other rows of them."""
    for name in names:
        yield name
        stage = seen.recipe.stages.get(name)
        if stage is not None and stage.kind in ("conversations", "corpus"):  # type: ignore[attr-defined]
            yield from stage.files()


def uncurated(seen: Evidence) -> Iterator[Finding]:
    for name, stage in seen.training("sft"):
        found = [wanted for wanted in inputs(stage) if _uncurated(seen, wanted)]
        if found:
            yield Finding("uncurated", name, {"input": ", ".join(found)})


def _uncurated(seen: Evidence, name: str) -> bool:
    """True when rows that a model wrote reach a stage with no `curate` stage between."""
    stage = seen.recipe.stages.get(name)
    if stage is None or stage.kind == "curate" or stage.resource == "train":  # type: ignore[attr-defined]
        return False
    models: list[str] = getattr(stage, "model_stages", list)()
    return stage.resource == "generate" or any(_uncurated(seen, wanted) for wanted in stage.input_names() if wanted not in models)


def replies(seen: Evidence) -> Iterator[Finding]:
    """Refusals and one opening among the replies that a fine-tune learns, looked for in rows of finished inputs."""
    for name, stage in seen.training("sft"):
        for wanted in inputs(stage):
            table = seen.sample(wanted, ["id", "messages", "tools"])
            if table is None or "messages" not in table.column_names:
                continue
            said = Turns(table.combine_chunks()).of(*REPLIES)
            if len(said) < _LEAST_ROWS:
                continue
            refusing, _ = refuses(said)
            share = float(refusing.mean())
            if share > _MOST_REFUSALS:
                examples = said.text.filter(pa.array(refusing)).to_pylist()
                quoted = "; ".join(f"“{text[:40]}”" for text in sorted(examples, key=len)[:2])
                yield Finding("refusals", name, {"input": wanted, "share": share, "rows": len(said), "examples": quoted})
            begin, count = _commonest_opening(said.text)
            if count / len(said) > _MOST_ONE_OPENING:
                yield Finding("openings", name, {"input": wanted, "share": count / len(said), "rows": len(said), "opening": begin})


def _commonest_opening(texts: pa.Array) -> tuple[str, int]:
    """The most frequent first three words (six characters of Chinese) of texts that go on after them, and how many have it."""
    begin = pc.utf8_trim_whitespace(pc.utf8_slice_codeunits(texts, 0, 80))
    pattern = r"^(?P<opening>[\p{Han}，、！!]{6}|[^\s\p{Han}]+\s+[^\s\p{Han}]+\s+[^\s\p{Han}]+)."
    found = pc.struct_field(pc.extract_regex(begin, pattern), "opening")
    counts = Counter(text.lower() for text in found.to_pylist() if text)
    return counts.most_common(1)[0] if counts else ("", 0)


def rewards(seen: Evidence) -> Iterator[Finding]:
    for name, stage in seen.training("grpo"):
        points = seen.stats(name).get("curve", [])
        for reward in stage.rewards:  # type: ignore[attr-defined]
            values = {point.get(f"reward_{reward}") for point in points} - {None}
            if len(points) >= _LEAST_POINTS and len(values) == 1:
                yield Finding("rewards_all_zero", name, {"reward": reward, "value": float(values.pop())})


def corpus(seen: Evidence) -> Iterator[Finding]:
    for name, stage in seen.recipe.stages.items():
        kind: str = stage.kind  # type: ignore[attr-defined]
        if kind == "corpus":
            names = [entry if isinstance(entry, str) else next(iter(entry)) for entry in getattr(stage, "operators", [])]
            filters = [item for item in names if item.startswith("gopher") or item == "score_quality"]
            if filters and "detect_language" not in names:
                where, where_zh = "no detect_language stands before it", "之前没有 detect_language"
            elif filters and names.index("detect_language") > names.index(filters[0]):
                where, where_zh = "detect_language stands after it", "detect_language 排在其后"
            else:
                continue
            yield Finding("language_after_filters", name, {"filter": filters[0], "where": where, "where_zh": where_zh})
        if kind == "pack" and not getattr(stage, "holdout", 0):
            yield Finding("nothing_held_out", name)
        if kind == "pack" and not any(other.kind == "dedup" for other in seen.recipe.stages.values()):  # type: ignore[attr-defined]
            yield Finding("repeats", name, {"input": ", ".join(stage.input_names())})
        endpoint: Any = getattr(getattr(stage, "generator", None), "endpoint", None)
        if stage.resource == "generate" and endpoint is not None and getattr(stage, "max_generated_tokens", None) is None:
            yield Finding("no_token_cap", name)


ALL: tuple[Callable[[Evidence], Iterator[Finding]], ...] = (
    corpus, uncurated, general_data, replies, evaluated_on_training_data, learning_rate, epochs, warmup, lora_targets,
    packing, template, batch, aligned_without_sft, rewards, measured,
)  # fmt: skip


def run(seen: Evidence) -> list[Finding]:
    """All findings, in the order of the recipe's stages."""
    order = {name: number for number, name in enumerate(seen.recipe.stages)}
    found = [finding for rule in ALL for finding in rule(seen)]
    return sorted(found, key=lambda finding: order.get(finding.stage, -1))
