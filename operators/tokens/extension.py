"""The stage that extends a tokenizer: a sample of the domain to learn from, a part of it held out to measure on."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray

from cluster import storage
from cluster.placement import placement
from operators import shards
from operators.ledger import Equation
from operators.stage import StageContext
from operators.tokens import extend
from operators.tokens.encode import Encoder, TokenizerFiles, single_threaded
from operators.tokens.sample import draw

_HELD_OUT = 16  # one bin of the hash in so many


def extend_stage(
    context: StageContext,
    directories: Sequence[str],
    base: TokenizerFiles,
    *,
    general: Sequence[str],
    words: Sequence[str] | None,
    tokens: int,
    sample_bytes: int,
    document_characters: int,
    min_frequency: int,
    max_token_bytes: int,
) -> None:
    """Sample, learn (or take `words`), and finish the stage with the extended tokenizer and what it gained.

    Raises ValueError when the base is no byte-level BPE tokenizer or nothing could be added.
    """
    extend.check(json.loads(base.model))
    sample = draw(context, shards.parts(directories), sample_bytes, document_characters)
    aside = replace(context, directory=storage.join(context.directory, ".scratch", "general"), progress=lambda *_: None)
    other = draw(aside, shards.parts(general), min(sample_bytes, 8 << 20), document_characters).paths if general else []
    context.check_cancelled()
    reference = _extend.options(resources=placement("cpu")).remote(
        sample.paths, other, context.directory, base, words, tokens, min_frequency, max_token_bytes
    )
    while not ray.wait([reference], timeout=0.5)[0]:
        try:
            context.check_cancelled()
        except BaseException:
            ray.cancel(reference, force=True)
            raise
    stats = ray.get(reference)
    if stats["tokens_added"] < tokens:
        context.log(f"{stats['tokens_added']} tokens were worth adding, fewer than the {tokens} asked for")
    context.finish(
        stats={**stats, "documents": sample.documents, "bytes": sample.bytes, "corpus_documents": sample.corpus_documents},
        equations=[
            Equation(
                "documents in = documents sampled + documents left out",
                {"documents": sum(part.kept_rows for part in shards.parts(directories))},
                {"sampled": sample.documents, "left_out": sample.corpus_documents - sample.documents},
            ),
            Equation("tokens = tokens before + tokens added", {"tokens": stats["vocab_size"]},
                     {"before": stats["vocab_size_before"], "added": stats["tokens_added"]}),
        ],
        files={"tokenizer": "tokenizer.json", "tokenizer_config": "tokenizer_config.json"},
    )  # fmt: skip


@ray.remote(num_cpus=1)
def _extend(
    paths: list[str], general: list[str], directory: str, base: TokenizerFiles, words: Sequence[str] | None, tokens: int,
    min_frequency: int, max_token_bytes: int,
) -> dict[str, Any]:  # fmt: skip
    single_threaded()
    before, old = Encoder(base.model), json.loads(base.model)
    if words is None:
        learnt = _texts(paths, held_out=False)
        merges = extend.learn(before, old, learnt, tokens, min_frequency=min_frequency, max_token_bytes=max_token_bytes)
    else:
        merges = extend.spelled(before, old, words, tokens)
    if not merges:
        raise ValueError("no token was worth adding: the sample holds no pair that often, or the words are single tokens already")
    model = json.dumps(extend.extended(old, merges), ensure_ascii=False, indent=1).encode()
    after = Encoder(model)
    storage.write_bytes(storage.join(directory, "tokenizer.json"), model)
    config = json.dumps(base.settings, indent=1, ensure_ascii=False, sort_keys=True).encode()
    storage.write_bytes(storage.join(directory, "tokenizer_config.json"), config)
    found: dict[str, Any] = {}
    for name, measured in (("domain", _texts(paths, held_out=True)), ("general", _texts(general, held_out=None))):
        found[name] = _compression(before, after, measured)
    return {
        "vocab_size_before": before.vocab_size,
        "vocab_size": after.vocab_size,
        "tokens_added": len(merges),
        "first_tokens": [extend.readable(left + right) for left, right in merges[:50]],
        "tokens_per_byte": {name: value for name, value in found.items() if value},
    }


def _texts(paths: Sequence[str], held_out: bool | None) -> Iterator[pa.Array]:
    """The sampled texts to learn from (False), to measure on (True), or all (None)."""
    for path in paths:
        with storage.open_input(path) as stream:
            for batch in pq.ParquetFile(stream).iter_batches(batch_size=256, columns=["text", "bin"]):
                aside = batch["bin"].to_numpy() % _HELD_OUT == 0
                mask = np.ones(len(aside), bool) if held_out is None else aside if held_out else ~aside
                yield batch["text"].filter(pa.array(mask))


def _compression(before: Encoder, after: Encoder, texts: Iterator[pa.Array]) -> dict[str, float] | None:
    """Tokens a byte with both tokenizers, None where there is no text."""
    size, old, new = 0, 0, 0
    for batch in texts:
        size += pc.sum(pc.binary_length(batch)).as_py() or 0
        old += len(before.encode(batch)[0])
        new += len(after.encode(batch)[0])
    return {"before": round(old / size, 4), "after": round(new / size, 4), "bytes": size} if size else None
