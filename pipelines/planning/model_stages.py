"""Estimates of the stages that ask, make or measure a model: tokens and operations from their settings."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from cluster import storage
from cluster.fit import Generation, Model, Training
from cluster.plan import Estimate
from operators.synthesis.packaged import PREFIX
from pipelines.planning import models
from pipelines.planning.data_stages import base, names, no_input, read_from
from pipelines.planning.flow import Flow, Walk, together
from pipelines.planning.inputs import lines_and_bytes
from pipelines.stages.training import is_external, shares
from train.model_shapes import read_shape
from train.settings import ModelShape, is_shape

_STATE_ON_DISK = 12  # bytes a trained weight in a checkpoint: itself and two moments
_EXPORTED = 4  # bytes a weight of a model that is written: float32
_PADDED = 1.2  # tokens computed over tokens with content, in batches of rows of unequal length
_CHOICES = 4  # of a question, each scored by a pass
_DECODED_AS = 3.0  # a token decoded by transformers costs as much as so many that are only read


def model_of(walk: Walk, reference: Any, vocab: int | None = None) -> Model | None:
    """The model behind a `model` setting; None where nothing tells its size."""
    if isinstance(reference, ModelShape):
        return models.of_shape(reference, vocab or 32_000)
    name = str(reference).removeprefix("@")
    if is_shape(name):
        return models.of_shape(read_shape(storage.absolute(name, walk.base_directory)), vocab or 32_000)
    if is_external(name) or name.startswith(PREFIX):
        return models.of_reference(name, walk.base_directory)
    flow = walk.flows.get(name)
    return flow.model if flow is not None else None


def trained(name: str, stage: Any, walk: Walk) -> tuple[Estimate, Flow]:
    """pretrain, sft, dpo, kto, reward and grpo."""
    inputs = {each: walk.flows[each] for each in shares(stage.input)}
    flow = together(list(inputs.values()))
    vocab = next((each.vocab for each in inputs.values() if each.vocab), None)
    model = model_of(walk, stage.model, vocab)
    if model is None:
        return no_input(name, stage, flow, f"model: {stage.model}")
    if stage.kind == "pretrain":
        return _pretrained(name, stage, walk, model, inputs)
    known = all(each.known for each in inputs.values())
    if not known and stage.steps is None:
        return no_input(name, stage, replace(flow, model=model))
    rows = max((each.rows or 0.0) for each in inputs.values())
    kept_out = 1 - float(getattr(stage, "held_out", 0.0))
    steps = float(stage.steps or max(1.0, stage.epochs * rows * kept_out / stage.batch_examples))
    if walk.limit is not None:
        steps = min(steps, walk.limit)
    per_row = (flow.text or 0.0) / flow.rows if flow.rows else walk.assumed("chat_bytes", walk.assume.chat_bytes)
    native = not (isinstance(stage.model, str) and stage.model.startswith(PREFIX))
    mean = min(float(stage.max_length), per_row * walk.assumed("tokens_a_byte", flow.tokens_per_byte(walk.assume, native)))
    examples = steps * stage.batch_examples
    pairs = 2.0 if stage.kind in ("dpo", "reward") else 1.0
    if stage.kind == "grpo":
        mean = min(float(stage.max_length), mean) + stage.max_new_tokens * walk.assume.reply_fill
    tokens = examples * pairs * mean
    lora = getattr(stage, "lora", None)
    passes = (2 / 3 if lora is not None else 1.0) + (1 / 3 if stage.kind in ("dpo", "kto") else 0.0)
    flops = models.train_flops(model, tokens * _PADDED, mean) * passes
    if stage.kind == "grpo":
        flops += 2 * model.active * examples * stage.max_new_tokens * walk.assume.reply_fill * _DECODED_AS
    adapters = None if lora is None else _adapter_parameters(model, lora.rank)
    nf4 = lora is not None and lora.quantize == "nf4"
    training = Training(
        model, flops, steps, stage.batch_examples, int(max(mean, 8) * pairs), stage.micro_batch_examples, adapters,
        0.6 if nf4 else 4.0, stage.sharding, 1, "full" if stage.activation_checkpointing else "none", stage.precision,
        needs_gpu=nf4 or getattr(stage, "vllm", None) is not None,
    )  # fmt: skip
    kept = (adapters if adapters is not None else model.parameters) * _STATE_ON_DISK * 2
    estimate = base(
        name, stage, flow, training=training, rows_out=examples, read_bytes=flow.stored, scratch_bytes=kept, tokens=tokens,
        written_bytes=model.parameters * _EXPORTED + (adapters or 0.0) * 4,
    )  # fmt: skip
    return estimate, Flow(rows=examples, text=0.0, model=model, vocab=vocab)


def _adapter_parameters(model: Model, rank: int) -> float:
    """Of adapters on all linear layers of the blocks: rank x (in + out) of seven matrices, about 17 widths a layer."""
    return float(model.layers * rank * 17 * model.hidden)


def _pretrained(name: str, stage: Any, walk: Walk, model: Model, inputs: dict[str, Flow]) -> tuple[Estimate, Flow]:
    length = next((flow.length for flow in inputs.values() if flow.length), None)
    flow = together(list(inputs.values()))
    vocab = next((each.vocab for each in inputs.values() if each.vocab), None)
    if length is None:
        return no_input(name, stage, replace(flow, model=model))
    steps = float(stage.planned_steps(length))
    if walk.limit is not None:
        steps = min(steps, walk.limit)
    tokens = steps * stage.batch_sequences * length
    training = Training(
        model, models.train_flops(model, tokens, length), steps, stage.batch_sequences, length, stage.micro_batch_sequences,
        sharding=stage.parallel.sharding, tensor=stage.parallel.tensor, checkpointing=stage.activation_checkpointing,
        precision=stage.precision, checkpoints=stage.keep_checkpoints,
    )  # fmt: skip
    available = sum(each.tokens or 0.0 for each in inputs.values())
    estimate = base(
        name, stage, flow, training=training, rows_out=tokens / length, read_bytes=sum(each.stored for each in inputs.values()),
        written_bytes=model.parameters * _EXPORTED, scratch_bytes=model.parameters * _STATE_ON_DISK * stage.keep_checkpoints,
        tokens=tokens, measured=(("epochs", tokens / available),) if available else (),
    )  # fmt: skip
    return estimate, Flow(rows=tokens / length, text=0.0, model=model, vocab=vocab)


def measured(name: str, stage: Any, walk: Walk) -> tuple[Estimate, Flow]:
    """evaluate, fisher and merge: passes over a model whose weights are not trained."""
    references = stage.models if stage.kind == "evaluate" else [stage.model]
    found = [model_of(walk, reference) for reference in references]
    if any(model is None for model in found):
        missing = next(reference for reference, model in zip(references, found, strict=True) if model is None)
        return no_input(name, stage, Flow(), f"model: {missing}")
    largest = max((model for model in found if model is not None), key=lambda model: model.parameters)
    if stage.kind == "evaluate":
        tokens, decoded = _scored_tokens(stage, walk)
        # a forward pass is a third of what training costs
        flops = sum(models.train_flops(model, tokens, stage.length) / 3 for model in found if model is not None)
        flops += sum(2 * model.active * decoded * _DECODED_AS for model in found if model is not None)
        training = Training(largest, flops, 1, 8, stage.length, trained=0.0, precision="fp32", spread=True)
        total = (tokens + decoded) * len(references)
        return base(name, stage, None, training=training, written_bytes=1e6, tokens=total), Flow()
    if stage.kind == "fisher":
        sequences = stage.sequences if walk.limit is None else min(stage.sequences, walk.limit)
        tokens = float(sequences * stage.max_length)
        flops = models.train_flops(largest, tokens, stage.max_length)
        training = Training(largest, flops, 1, 8, stage.max_length, 1, precision=stage.precision, spread=True)
        return base(name, stage, None, training=training, written_bytes=largest.parameters * 8, tokens=tokens), Flow()
    training = Training(largest, 0.0, 1, 1, 1, trained=0.0, spread=True)
    return base(name, stage, None, training=training, written_bytes=largest.parameters * 4), Flow(model=largest, rows=0.0, text=0.0)


def _scored_tokens(stage: Any, walk: Walk) -> tuple[float, float]:
    """(tokens that a model reads, tokens that it writes) in an evaluation."""
    read = 0.0
    cap = walk.limit or 10**9
    if stage.packed is not None:
        read += 2 * min(stage.max_documents, cap) * stage.max_tokens * 0.6  # two languages
    for each in names(stage.pairs or []):
        flow = walk.flows.get(each, Flow())
        read += min(flow.rows or stage.max_pairs, stage.max_pairs, cap) * 2 * 200
    for chosen in stage.sets.values():
        if chosen.choices is not None:
            paths = [storage.absolute(path, walk.base_directory) for path in names(chosen.choices)]
            rows, size = lines_and_bytes([path for path in paths if storage.exists(path)])
            rows = min(rows, chosen.max_rows, cap) or float(chosen.max_rows)
            read += rows * _CHOICES * min(stage.length, (size / rows / _CHOICES * 0.3 if size else 200))
        else:
            flow = together([walk.flows[each] for each in names(chosen.input)])
            rows = min((flow.rows or chosen.max_rows) * (chosen.held_out or 1), chosen.max_rows, cap)
            each_row = (flow.text or 0.0) / flow.rows * flow.tokens_per_byte(walk.assume) if flow.rows else 200
            read += rows * min(stage.length, each_row)
    return read, float(len(stage.prompts) * stage.max_new_tokens)


def promoted(name: str, stage: Any, walk: Walk) -> tuple[Estimate, Flow]:
    """promote: a comparison of scores in the driver."""
    return base(name, stage, None, written_bytes=1e4), walk.flows.get(stage.model, Flow())


def generated(name: str, stage: Any, walk: Walk) -> tuple[Estimate, Flow]:
    """All stages that ask a model: calls and tokens by their method, capped as the stage caps them."""
    if stage.kind == "self_instruct":
        flow = Flow(rows=float(stage.target), text=stage.target * walk.assume.chat_bytes)
    else:
        flow = read_from(walk, stage.input)
    if flow.rows is None or flow.text is None:
        return no_input(name, stage, flow)
    rows_in = min(flow.rows, walk.limit) if walk.limit is not None else flow.rows
    fill = walk.assumed("reply_fill", walk.assume.reply_fill)
    past = walk.past(name, stage)
    per_row = walk.assume.prompt_tokens
    if stage.kind == "self_instruct":
        shown = max(1, stage.tasks_per_call - stage.seed_examples - stage.machine_examples)
        wanted = rows_in / walk.assumed("yield", walk.assume.yield_)
        calls = wanted / shown + wanted
        completions = wanted * fill * (stage.instruction_sampling.max_tokens / shown + stage.answer_sampling.max_tokens)
        rows_out, text = rows_in, rows_in * walk.assume.chat_bytes
    elif stage.kind == "evol_instruct":
        each = stage.evolve_sampling.max_tokens * fill + stage.answer_sampling.max_tokens * fill + (8 if stage.judge else 0)
        calls, completions = rows_in * stage.rounds * (3 if stage.judge else 2), rows_in * stage.rounds * each
        made = rows_in * stage.rounds * walk.assumed("yield", walk.assume.yield_)
        rows_out, text = made, made * walk.assume.chat_bytes
    elif stage.kind == "document_instruct":
        calls, completions, rows_out = _from_documents(stage, walk, flow, rows_in, fill)
        text, per_row = rows_out * walk.assume.chat_bytes, stage.chunk.max_tokens + 200.0
    elif stage.kind in ("responses", "preferences"):
        calls = rows_in * stage.samples * (2 if stage.scorer == "judge" else 1)
        completions = rows_in * stage.samples * (stage.sampling.max_tokens * fill + (40 if stage.scorer == "judge" else 0))
        kept = stage.samples if getattr(stage, "keep", "") == "all" else 1
        rows_out = rows_in * kept * walk.assumed("yield", walk.assume.yield_)
        text, per_row = rows_out * walk.assume.chat_bytes, 150.0
    else:  # generate, and stages of one's own that have its settings
        calls = rows_in * stage.samples
        completions = calls * stage.sampling.max_tokens * fill
        per_row = flow.text / flow.rows * flow.tokens_per_byte(walk.assume) + 60 if flow.rows else per_row
        rows_out, text = calls, flow.text * stage.samples + completions * 4
    prompts = calls * per_row
    if past is not None and past[1].stats.get("calls"):
        stats, made = past[1].stats, float(past[1].ledger.kept if stage.kind == "self_instruct" else past[1].ledger.rows_in)
        base_rows = rows_in if stage.kind != "self_instruct" else rows_out
        if made:
            walk.notes.assumed.clear()
            completions = base_rows * walk.measured("completion_tokens_a_row", stats["completion_tokens"] / made)
            prompts = base_rows * walk.measured("prompt_tokens_a_row", stats["prompt_tokens"] / made)
    if stage.max_generated_tokens is not None and completions > stage.max_generated_tokens:
        share = stage.max_generated_tokens / completions
        prompts, completions, rows_out, text = prompts * share, float(stage.max_generated_tokens), rows_out * share, text * share
    out = Flow(rows_out, text, max(1.0, rows_in / 256), flow.chinese, vocab=flow.vocab, stored=text * walk.assume.stored_text)
    common: dict[str, Any] = {"rows_out": rows_out, "tokens": prompts + completions, "written_bytes": out.stored + completions * 6}
    if stage.generator.endpoint is not None:
        cost = (("cost", stage.price.cost(prompts, completions), stage.price.currency),) if stage.price is not None else ()
        facts = tuple((f"{key} ({currency})", round(value, 2)) for key, value, currency in cost)
        return base(name, stage, flow, unknown="endpoint", measured=facts, **common), out
    model = model_of(walk, stage.generator.model)
    if model is None:
        return no_input(name, stage, flow, f"model: {stage.generator.model}")[0], out
    engine = stage.generator
    generation = Generation(
        model, prompts, completions, engine.max_running, engine.max_model_len, 4.0 if engine.dtype == "float32" else 2.0,
        engine.tensor_parallel, engine.replicas, engine.gpu_memory, engine.kv_cache_gb, engine.device,
    )  # fmt: skip
    return base(name, stage, flow, generation=generation, **common), out


def _from_documents(stage: Any, walk: Walk, flow: Flow, rows: float, fill: float) -> tuple[float, float, float]:
    """(calls, completion tokens, rows made) of document_instruct."""
    tokens_each = (flow.text or 0.0) / flow.rows * flow.tokens_per_byte(walk.assume) if flow.rows else 0.0
    fresh = max(1, stage.chunk.max_tokens - stage.chunk.overlap_tokens)
    chunks = rows * max(1.0, min(stage.quota.per_document, tokens_each / fresh))
    asked = stage.pairs / stage.pairs_per_request if stage.form == "alpaca" else stage.dialogues
    again = stage.back_translation.samples + (stage.back_translation.without_document != "off")
    checked = (stage.pairs if stage.form == "alpaca" else stage.dialogues * stage.turns) * again
    calls = chunks * (1 + asked + checked)
    each = stage.key_point_sampling.max_tokens + asked * stage.sampling.max_tokens
    completions = chunks * fill * (each + checked * stage.back_translation.sampling.max_tokens)
    made = stage.pairs if stage.form == "alpaca" else stage.dialogues
    return calls, completions, chunks * made * walk.assumed("yield", walk.assume.yield_)
