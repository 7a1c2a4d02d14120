"""Estimates of the stages that work on rows: corpus, deduplication, choosing, tokens, export.

Numbers of units are those of the stages' own planners; what else a task costs comes from the rates and from the figures
that docs/scale.md measured.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from cluster import storage
from cluster.plan import Estimate, Phase
from operators import registry, shards
from operators.dedup.options import DedupOptions
from operators.dedup.plan import Plan, partitions_for
from operators.dedup.stage import phases_of
from operators.operator import Filter
from operators.sinks.export import ExportOptions
from operators.tokens.encode import TokenizerFiles
from pipelines.planning import models
from pipelines.planning.flow import Flow, Walk, together
from pipelines.planning.inputs import input_size, lines_and_bytes

_TASK_MEMORY = 0.7e9
"""Of a supervised child with the models of a filter chain; the examples' corpus stages peaked at 0.5 to 0.6 GB."""

_KEY_TASK_MEMORY = 0.5e9
_KEYS_IN_RUNS = 1 << 18  # operators.dedup.phases: documents whose keys are sorted together
_SORTING = 5  # a partition's memory over its keys (docs/scale.md, point 4)
_RESOLVED_ROW_BYTES = 110  # docs/scale.md, point 1
_RESOLVED_PAIR_S = 0.9e-6
_INDEX_BYTES = 24  # a part and partition (docs/scale.md: 100 kB a part at 4,096 partitions)
_PACKED_TOKEN_BYTES = 1.5  # in Parquet, zstd; the examples' packs took 1.37 and 1.41
_TWIN_TOKENS_S = 60e6
_PACK_UNITS = 4096  # operators.tokens.window


def names(value: Any) -> list[str]:
    """The stages that an `input` names."""
    return [value] if isinstance(value, str) else list(value)


def read_from(walk: Walk, value: Any) -> Flow:
    return together([walk.flows[name] for name in names(value)])


def no_input(name: str, stage: Any, flow: Flow, why: str = "input") -> tuple[Estimate, Flow]:
    """An estimate that says that nothing is known of what comes in."""
    unknown = Estimate(name, stage.kind, stage.resource, tuple(stage.input_names()), unknown=why, needs_ray=stage.needs_ray())
    return unknown, replace(flow, rows=None, text=None, tokens=None)


def base(name: str, stage: Any, flow: Flow | None = None, **more: Any) -> Estimate:
    rows_in = None if flow is None else flow.rows
    return Estimate(
        name, stage.kind, stage.resource, tuple(stage.input_names()), rows_in=rows_in, needs_ray=stage.needs_ray(), **more
    )


def corpus(name: str, stage: Any, walk: Walk) -> tuple[Estimate, Flow]:
    rates, assume = walk.rates, walk.assume
    try:
        size = input_size(stage.read, walk.base_directory, walk.limit)
    except FileNotFoundError as error:
        return no_input(name, stage, Flow(), f"files: {error}")
    if size.rows is None or size.text_bytes is None:
        return no_input(name, stage, Flow(parts=size.units), f"format: {', '.join(sorted(size.formats))}")
    cost = sum(bytes_ / rates.read_rate(kind) for kind, bytes_ in size.formats.items())
    rows, text, html = size.rows, size.text_bytes, size.html
    rejected, analysed = 0.0, False
    for entry in stage.operators:
        operator, _ = registry.split(entry)
        kind = registry.load(operator)
        if kind.uses_analysis and not analysed and not html:
            cost, analysed = cost + text / (rates.analysis_mb_s * 1e6), True
        cost += text / rates.operator_rate(operator)
        if operator == "extract_html" and html:
            text, html = text * walk.assumed("html_text_share", assume.html_text_share), False
        share = assume.share_kept(operator, issubclass(kind, Filter))
        if share < 1:
            walk.assumed(f"kept.{operator}", share)
        rejected += text * (1 - share)
        rows, text = rows * share, text * share
        analysed = analysed and not kind.changes_text
    past = walk.past(name, stage)
    if past is not None and past[1].ledger.rows_in:
        directory, manifest = past
        walk.notes.assumed.clear()
        rows = size.rows * walk.measured("kept", manifest.ledger.kept / manifest.ledger.rows_in)
        held = _text_of(directory)
        if held is not None:
            text = size.rows * walk.measured("text_bytes_a_row", held / manifest.ledger.rows_in)
    stored = text * walk.assumed("stored_text", assume.stored_text)
    cost += text / (rates.write_mb_s * 1e6)
    parts = size.units * max(1.0, math.ceil(stored / max(1, size.units) / shards.MAX_PART_BYTES))
    estimate = base(
        name, stage, None, phases=(Phase("units", size.units, cost, _TASK_MEMORY),), rows_out=rows,
        read_bytes=size.file_bytes, written_bytes=stored + rejected * assume.stored_text,
    )  # fmt: skip
    estimate = replace(estimate, rows_in=size.rows)
    return estimate, Flow(rows=rows, text=text, parts=parts, chinese=size.chinese, stored=stored)


def _text_of(directory: str) -> float | None:
    from pipelines.planning.flow import flow_of_finished

    return flow_of_finished(directory, []).text


def dedup(name: str, stage: Any, walk: Walk) -> tuple[Estimate, Flow]:
    flow, reference = read_from(walk, stage.inputs()), [n for n in stage.references() if n not in stage.inputs()]
    compared = together([walk.flows[n] for n in [*stage.inputs(), *reference]])
    if compared.rows is None or compared.text is None or flow.rows is None:
        return no_input(name, stage, flow)
    options: DedupOptions = stage.options()
    rates, assume = walk.rates, walk.assume
    rows, parts = compared.rows, compared.parts
    partitions = partitions_for(math.ceil(rows), options)
    bands = options.shape[0] if options.finds_near else 0
    key = 16 * bands + 16 + (24 if options.finds_exact else 0)
    keys = rows * key
    bucketed = rows * walk.assumed("bucket_rows", assume.bucket_rows) if bands else rows * assume.duplicates
    reading = compared.text / (rates.scan_mb_s * 1e6)
    signing = compared.text / (rates.sign_mb_s * 1e6) if bands else reading / 4
    join = keys / (rates.join_keys_mb_s * 1e6)
    partition_memory = _KEY_TASK_MEMORY + _SORTING * keys / partitions
    map_memory = _KEY_TASK_MEMORY + min(rows / max(parts, 1), _KEYS_IN_RUNS) * key * 3
    again = (reading + signing) * assume.bucket_rows  # text of candidates, to verify
    pairs = bucketed * assume.bucket_pairs
    costs = {  # core seconds, memory of a task, small reads
        "map": (reading + signing, map_memory, 0.0),
        "index": (parts * partitions * 1e-7, _KEY_TASK_MEMORY + parts * partitions * _INDEX_BYTES, 0.0),
        "candidates": (join, partition_memory, parts * partitions),
        "shingles": (again, map_memory, 0.0),
        "pairs": (pairs * 1e-6, partition_memory, 0.0),
        "verify": (again, map_memory, 0.0),
        "join": (join, partition_memory, 2.0 * parts * partitions),
        "resolve": (pairs * _RESOLVED_PAIR_S, _KEY_TASK_MEMORY + bucketed * _RESOLVED_ROW_BYTES, 0.0),
        "cards": (rows * 1e-7, _KEY_TASK_MEMORY, 0.0),
        "remove": (rows * 2e-7, _KEY_TASK_MEMORY, 0.0),
    }
    phases = []
    for phase in phases_of(Plan("", [shards.Part("", 0, 0)] * math.ceil(parts), options, partitions)):
        if phase.units:
            cost, memory, reads = costs.get(phase.name, (0.0, _KEY_TASK_MEMORY, 0.0))
            phases.append(Phase(phase.name, phase.units, cost, memory, small_reads=reads))
    share = walk.kept_share(name, stage, 1 - assume.duplicates)
    removed = flow.rows * (1 - share)
    sketches = rows * options.permutations if bands and options.similarity else 0.0
    estimate = base(
        name, stage, flow, phases=tuple(phases), rows_out=flow.rows * share, read_bytes=compared.stored,
        written_bytes=removed * 80 + rows / 8, shuffled_bytes=keys + sketches,
    )  # fmt: skip
    return estimate, flow.kept(share)


def cutting(name: str, stage: Any, walk: Walk) -> tuple[Estimate, Flow]:
    """line_dedup and substring_dedup: text is read twice, hashes of its pieces are exchanged, the text left is written."""
    flow = read_from(walk, stage.input)
    if flow.rows is None or flow.text is None:
        return no_input(name, stage, flow)
    rates, assume = walk.rates, walk.assume
    tokens = stage.kind == "substring_dedup"
    exchanged = flow.text * (0.5 if tokens else 0.3)
    share = walk.kept_share(name, stage, 0.99)
    text = flow.text * (1 - walk.assumed("repeated_text", assume.repeated_text))
    scan = flow.text / (rates.scan_mb_s * 1e6)
    partitions = max(1.0, math.ceil(exchanged / (64 << 20)))
    phases = (
        Phase("map", flow.parts, scan + flow.text / (rates.sign_mb_s * 1e6) * (2 if tokens else 1), _TASK_MEMORY),
        Phase("join", partitions, exchanged / (rates.join_keys_mb_s * 1e6), _KEY_TASK_MEMORY + _SORTING * (64 << 20),
              small_reads=flow.parts * partitions),
        Phase("cut", flow.parts, scan + text / (rates.write_mb_s * 1e6), _TASK_MEMORY),
    )  # fmt: skip
    stored = text * assume.stored_text
    estimate = base(
        name, stage, flow, phases=phases, rows_out=flow.rows * share, read_bytes=2 * flow.stored, written_bytes=stored,
        shuffled_bytes=exchanged,
    )  # fmt: skip
    return estimate, replace(flow.kept(share), text=text, stored=stored)


def encoder(name: str, stage: Any, walk: Walk) -> tuple[Estimate, Flow]:
    """semantic_dedup and score: a model of Hugging Face reads the beginning of every text."""
    flow = read_from(walk, stage.input)
    if flow.rows is None or flow.text is None:
        return no_input(name, stage, flow)
    parameters = models.encoder_parameters(stage.model, walk.base_directory)
    if parameters is None:
        return no_input(name, stage, flow, f"model: {stage.model}")
    rates, assume = walk.rates, walk.assume
    tokens = min(flow.text * flow.tokens_per_byte(assume), flow.rows * stage.max_tokens)
    flops = 2 * parameters * tokens
    on_gpu = stage.device == "cuda"
    gpu_flops = 100e12 * walk.assumed("mfu", assume.mfu)
    cost = flops / (gpu_flops if on_gpu else rates.train_flops["fp32"])
    memory = 2e9 + parameters * 4
    phases = [Phase("encode", flow.parts, cost, memory, gpus=1.0 if on_gpu else 0.0)]
    scores = stage.kind == "score"
    if not scores:
        clusters = stage.clusters or max(1, flow.rows / 5000)
        phases.append(Phase("clusters", flow.parts, flow.rows * clusters * 768e-9 / 10, memory))
    otherwise = 0.9 if not scores else assume.share_kept("score") if stage.minimum is not None else 1.0
    share = walk.kept_share(name, stage, otherwise)
    written = flow.text * assume.stored_text if scores else flow.rows / 8
    estimate = base(
        name, stage, flow, phases=tuple(phases), rows_out=flow.rows * share, read_bytes=flow.stored, written_bytes=written,
        tokens=tokens, shuffled_bytes=0.0 if scores else flow.rows * 768 * 4,
    )  # fmt: skip
    return estimate, flow.kept(share)


def choosing(name: str, stage: Any, walk: Walk) -> tuple[Estimate, Flow]:
    """select and mix: keys of rows are counted and bitmaps written; no text is copied."""
    inputs = stage.input_names() if isinstance(stage.input, dict) else names(stage.input)
    flow = together([walk.flows[each] for each in inputs if each in walk.flows])
    if flow.rows is None or flow.text is None:
        return no_input(name, stage, flow)
    fraction = getattr(stage, "fraction", None)
    past = walk.past(name, stage)
    if fraction is not None:
        share = float(fraction)
    elif past is not None and past[1].ledger.rows_in:
        share = walk.measured("kept", min(1.0, past[1].ledger.kept / past[1].ledger.rows_in))
    elif getattr(stage, "total", None) and stage.unit == "documents":
        share = min(1.0, stage.total / max(1.0, flow.rows))
    elif getattr(stage, "amount", None) and stage.unit == "documents" and not stage.within:
        share = min(1.0, stage.amount / max(1.0, flow.rows))
    else:
        share = walk.assumed("kept", 0.8)
    rates = walk.rates
    cost = flow.text / (rates.scan_mb_s * 1e6) if stage.unit != "documents" else flow.rows * 1e-6
    if stage.unit == "tokens":
        cost += flow.text / (rates.encode_mb_s * 1e6)
    estimate = base(
        name, stage, flow, phases=(Phase("keys", flow.parts, cost, _KEY_TASK_MEMORY),), rows_out=flow.rows * share,
        read_bytes=flow.stored, written_bytes=flow.rows / 8, shuffled_bytes=flow.rows * 16,
    )  # fmt: skip
    return estimate, flow.kept(share)


def export(name: str, stage: Any, walk: Walk) -> tuple[Estimate, Flow]:
    flow = read_from(walk, stage.input)
    if flow.rows is None or flow.text is None:
        return no_input(name, stage, flow)
    target = stage.target_bytes if isinstance(stage, ExportOptions) else 256 << 20
    stored = flow.text * walk.assumed("stored_text", walk.assume.stored_text)
    files = max(1.0, math.floor(stored / target + 0.5))
    rates = walk.rates
    cost = flow.text / (rates.scan_mb_s * 1e6) + flow.text / (rates.write_mb_s * 1e6)
    phases = (Phase("files", files, cost, _TASK_MEMORY),)
    return base(name, stage, flow, phases=phases, rows_out=flow.rows, read_bytes=flow.stored, written_bytes=stored), flow


def tokenizer(name: str, stage: Any, walk: Walk) -> tuple[Estimate, Flow]:
    """tokenizer and extend_tokenizer: a sample is drawn from all rows, one task learns from it."""
    flow = read_from(walk, stage.input)
    if flow.rows is None or flow.text is None:
        return no_input(name, stage, flow)
    rates = walk.rates
    sample = min(float(stage.sample_bytes), flow.text)
    extends = stage.kind == "extend_tokenizer"
    learn = sample / (rates.learn_mb_s * 1e6) + (sample / (rates.encode_mb_s * 1e6) if extends else 0.0)
    phases = (
        Phase("sample", flow.parts, 2 * flow.text / (rates.scan_mb_s * 1e6), _KEY_TASK_MEMORY),
        Phase("learn", 1, learn, _TASK_MEMORY + 4 * sample),
    )
    vocab = stage.vocab_size if not extends else (_vocabulary(walk, stage) or 32_000) + stage.tokens
    estimate = base(name, stage, flow, phases=phases, rows_out=None, read_bytes=flow.stored, written_bytes=vocab * 80.0)
    return estimate, Flow(vocab=vocab, native=True)


def _vocabulary(walk: Walk, stage: Any) -> int | None:
    """Tokens of the tokenizer that a stage names by `tokenizer` or `tokenizer_path`."""
    if stage.tokenizer:
        return walk.flows[stage.tokenizer].vocab
    packaged = models.vocabulary(stage.tokenizer_path)
    if packaged is not None:
        return packaged
    path = storage.absolute(stage.tokenizer_path, walk.base_directory)
    try:
        return TokenizerFiles.load(path).vocab_size
    except FileNotFoundError:
        return None


def pack(name: str, stage: Any, walk: Walk) -> tuple[Estimate, Flow]:
    flow = read_from(walk, stage.input)
    vocab = _vocabulary(walk, stage)
    if flow.rows is None or flow.text is None:
        return no_input(name, stage, replace(flow, length=stage.length, vocab=vocab))
    rates, assume = walk.rates, walk.assume
    past = walk.past(name, stage)
    native = stage.tokenizer is not None
    tokens = 0.0
    if past is not None and past[1].stats.get("packed") and past[1].stats.get("documents"):
        stats = past[1].stats
        tokens = flow.rows * walk.measured("tokens_a_document", stats["tokens"] / stats["documents"])
    else:
        per_byte = walk.assumed("tokens_a_byte", flow.tokens_per_byte(assume, native, vocab))
        tokens = flow.text * per_byte * (1 - stage.holdout)
    windows = math.ceil(flow.rows / stage.window_documents)
    units = math.ceil(windows / max(1, math.ceil(windows / _PACK_UNITS)))
    width = 2 if (vocab or 0) < 65_536 else 4
    packing = flow.text / (rates.encode_mb_s * 1e6) + tokens / rates.pack_tokens_s + flow.text / (rates.scan_mb_s * 1e6)
    phases = (
        Phase("windows", units, packing, _TASK_MEMORY),
        Phase("twin", 1, tokens / _TWIN_TOKENS_S, _KEY_TASK_MEMORY),
    )
    written = tokens * (_PACKED_TOKEN_BYTES + width)
    sequences = tokens / stage.length
    estimate = base(
        name, stage, flow, phases=phases, rows_out=sequences, read_bytes=flow.stored, written_bytes=written, tokens=tokens
    )
    packed = Flow(sequences, tokens * 4.0, units, flow.chinese, tokens, stage.length, vocab, native, stored=tokens * width)
    return estimate, packed


def files(name: str, stage: Any, walk: Walk) -> tuple[Estimate, Flow]:
    """conversations, rankings and quality_classifier: small files that the driver, or one task, reads."""
    try:
        found = [
            entry.path for pattern in stage.files_at(walk.base_directory)
            for entry in storage.list_files(storage.absolute(pattern, walk.base_directory))
        ]  # fmt: skip
    except FileNotFoundError as error:
        return no_input(name, stage, Flow(), f"files: {error}")
    rows, size = lines_and_bytes(found)
    rates = walk.rates
    if walk.limit is not None and rows > walk.limit:
        rows, size = float(walk.limit), size * walk.limit / rows
    if stage.kind == "quality_classifier":
        phases = (Phase("learn", 1, size / 2e6, _TASK_MEMORY),)
        return base(name, stage, Flow(rows, size), phases=phases, read_bytes=size, written_bytes=20e6), Flow()
    phases = (Phase("read", 1, size / rates.read_rate("jsonl"), _KEY_TASK_MEMORY),)
    stored = size * walk.assume.stored_text
    estimate = base(name, stage, Flow(rows, size), phases=phases, rows_out=rows, read_bytes=size, written_bytes=stored)
    return estimate, Flow(rows, size, len(found), _chinese_of(found), stored=stored)


def _chinese_of(paths: list[str]) -> float:
    """The share of files that look Chinese, by their first kilobytes."""
    seen = chinese = 0.0
    for path in paths[:4]:
        with storage.open_input(path) as stream:
            text = bytes(stream.read(65_536)).decode("utf-8", "ignore")
        seen += len(text.encode())
        chinese += 3.0 * sum("\u4e00" <= character <= "\u9fff" for character in text)
    return chinese / seen if seen else 0.0


def curate(name: str, stage: Any, walk: Walk) -> tuple[Estimate, Flow]:
    """curate and reviewed: operators over conversations."""
    flow = read_from(walk, stage.input)
    if flow.rows is None or flow.text is None:
        return no_input(name, stage, flow)
    rates = walk.rates
    operators = [registry.split(entry)[0] for entry in stage.operators] if stage.kind == "curate" else []
    cost = flow.text / (rates.scan_mb_s * 1e6) + sum(flow.text / rates.operator_rate(each) for each in operators)
    share = walk.kept_share(name, stage, walk.assume.share_kept("curate") if operators else 1.0)
    stored = flow.text * share * walk.assume.stored_text if operators else 0.0
    phases = (Phase("units", flow.parts, cost, _TASK_MEMORY),)
    estimate = base(name, stage, flow, phases=phases, rows_out=flow.rows * share, read_bytes=flow.stored, written_bytes=stored)
    return estimate, replace(flow.kept(share), stored=stored)
