"""What training benchmarks read: a finished pack stage of made-up tokens, so that no tokenizer or corpus is needed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers

from operators import shards
from operators.tokens import twin


def packed(directory: Path, *, sequences: int, length: int, vocab: int, seed: int, mean_document_tokens: int = 0) -> str:
    """Write a pack stage and return its directory.

    `sequences` rows of `length` tokens; every row is full, cut into documents of `mean_document_tokens` tokens in the
    mean (geometric lengths; 0: one document a row). Tokens follow a first-order chain with few successors each, so that
    a model has something to learn.
    """
    draw = np.random.default_rng(seed)
    successors = draw.integers(4, vocab, (vocab, 4))
    tokens = np.empty((sequences, length), twin.token_dtype(vocab))
    state = draw.integers(4, vocab, sequences)
    for column in range(length):
        tokens[:, column] = state
        state = successors[state, draw.integers(0, 4, sequences)]
    bounds, offsets = [], [0]
    for _ in range(sequences):
        row = [0]
        while row[-1] < length:
            step = int(draw.geometric(1 / mean_document_tokens)) if mean_document_tokens else length
            row.append(min(length, row[-1] + max(2, step)))
        bounds.append(np.array(row, "<i4"))
        offsets.append(offsets[-1] + len(row))
    directory.mkdir(parents=True)
    tokens.tofile(directory / twin.TOKENS)
    np.concatenate(bounds).tofile(directory / twin.BOUNDARIES)
    np.array(offsets, "<i8").tofile(directory / twin.BOUNDARY_OFFSETS)
    index = {
        "dtype": tokens.dtype.name, "length": length, "sequences": sequences, "vocab_size": vocab, "eos_token_id": 0,
        "padding_token_id": 3, "boundaries": twin.BOUNDARIES, "boundary_offsets": twin.BOUNDARY_OFFSETS,
    }  # fmt: skip
    (directory / twin.INDEX).write_text(json.dumps(index))
    words = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>", *(f"w{number}" for number in range(4, vocab))]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<|pad|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(words[:4])
    tokenizer.save(str(directory / "tokenizer.json"))
    files = {"tokens": twin.TOKENS, "index": twin.INDEX, "tokenizer": "tokenizer.json"}
    shards.finish(
        str(directory), stage=directory.parent.name, kind="pack", fingerprint=directory.name, config={}, inputs={}, files=files
    )
    return str(directory)
