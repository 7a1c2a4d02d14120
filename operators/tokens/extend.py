"""New tokens for a domain: a byte-level BPE tokenizer learns further merges on a corpus, or the words of a list.

Byte-pair encoding (Sennrich et al. 2016, section 3.2) goes on where the old tokenizer stopped: the corpus is encoded with it,
and the most frequent pairs of its tokens inside a word become tokens, one after the other. The new merges come after all old
ones. So a text's new ids are its old ids with runs of them replaced: ids 0..V-1 keep their meaning, everything written with the
old tokenizer decodes as before, no text gets longer, and every new token is a known run of old ones, from which its
embedding begins (`train.embeddings`). A run of Han characters is one word to the pre-tokenizer, so Chinese terms are found as
pairs like any other, without a segmenter.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

from operators.tokens.byte_pairs import byte_characters
from operators.tokens.encode import Encoder

_FIRST = 0x10000  # a character for each id of up to 2**20
_SEPARATOR = "\n"
_SURPLUS = 1.25  # of the tokens asked for, as some are longer than allowed


def check(tokenizer: dict[str, Any]) -> None:
    """Raises ValueError unless the parsed tokenizer.json is byte-level BPE, whose tokens are runs of bytes."""
    model = tokenizer.get("model", {})
    steps = tokenizer.get("pre_tokenizer") or {}
    kinds = {steps.get("type"), *(step.get("type") for step in steps.get("pretokenizers", []))}
    if model.get("type") != "BPE" or "ByteLevel" not in kinds:
        raise ValueError(
            f"only a byte-level BPE tokenizer can be extended, this one is {model.get('type')} with pre-tokenizer "
            f"{sorted(map(str, kinds))}"
        )


def learn(
    encoder: Encoder, tokenizer: dict[str, Any], texts: Iterable[pa.Array], count: int, *, min_frequency: int, max_token_bytes: int
) -> list[tuple[str, str]]:
    """Up to `count` further merges, the most frequent pair first; ties break by the old ids.

    `texts`: batches of strings, one held at a time; memory grows with the distinct words. Deterministic.
    """
    names = {token: name for name, token in tokenizer["model"]["vocab"].items()}
    known = set(names.values())
    trainer = trainers.BpeTrainer(
        vocab_size=len(names) + int(count * _SURPLUS) + 64,
        min_frequency=min_frequency,
        special_tokens=[],
        initial_alphabet=[chr(_FIRST + token) for token in names],
        max_token_length=max_token_bytes,
        show_progress=False,
    )
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Split(Regex(_SEPARATOR), "removed")
    learner.train_from_iterator(_as_characters(encoder, texts, np.array(sorted(names))), trainer)
    merges: list[tuple[str, str]] = []
    for pair in json.loads(learner.to_str())["model"]["merges"]:
        left, right = ("".join(names[ord(char) - _FIRST] for char in side) for side in pair)
        # A byte is a character in these names. A merge whose part was left out as too long is left out with it.
        if len(left) + len(right) <= max_token_bytes and {left, right} <= known and left + right not in known:
            merges.append((left, right))
            known.add(left + right)
        if len(merges) == count:
            break
    return merges


def _as_characters(encoder: Encoder, texts: Iterable[pa.Array], used: np.ndarray) -> Iterator[str]:
    """Each text with a character for each old token and a separator between words, also in place of added tokens."""
    place = np.full(int(used[-1]) + 2, ord(_SEPARATOR), np.int64)
    place[used] = used + _FIRST
    for batch in texts:
        for ids, first in encoder.words(batch):
            codes = place[np.minimum(ids, len(place) - 1)].astype("<u4")
            yield np.insert(codes, np.flatnonzero(first), ord(_SEPARATOR)).tobytes().decode("utf-32-le")


def spelled(encoder: Encoder, tokenizer: dict[str, Any], words: Sequence[str], count: int) -> list[tuple[str, str]]:
    """Merges that make each word of a list one token, its old pieces joined from the left; words in order, `count` merges at most.

    A word of letters is added with the space before it as well. A word that the pre-tokenizer cuts is left out, as is one
    that would exceed `count`. What stands beside a word in a text without spaces may still draw its first or last piece away.
    """
    names = {token: name for name, token in tokenizer["model"]["vocab"].items()}
    known = set(tokenizer["model"]["vocab"])
    merges: list[tuple[str, str]] = []
    for word in words:
        spaced = [f" {word}"] if word[:1].isascii() and word[:1].isalpha() else []
        for form in [word, *spaced]:
            pieces = [(ids, first) for ids, first in encoder.words(pa.array([form], pa.large_string()))]
            ids = pieces[0][0] if pieces else np.zeros(0, np.uint32)
            if len(ids) < 2 or int(pieces[0][1].sum()) != 1:
                continue
            parts, made = _merged([names[int(token)] for token in ids], merges), []
            whole = parts[0]
            for part in parts[1:]:
                if whole + part not in known:
                    made.append((whole, part))
                whole += part
            if len(merges) + len(made) <= count:
                merges += made
                known |= {left + right for left, right in made}
    return merges


def _merged(parts: list[str], merges: Sequence[tuple[str, str]]) -> list[str]:
    """Old pieces as these merges leave them, the earliest merge first."""
    ranks = {merge: rank for rank, merge in enumerate(merges)}
    while found := [(ranks[pair], place) for place, pair in enumerate(pairwise(parts)) if pair in ranks]:
        place = min(found)[1]
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    return parts


def extended(tokenizer: dict[str, Any], merges: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """The tokenizer.json with these merges after its own, the new tokens behind all ids it has, added ones included."""
    model = tokenizer["model"]
    vocabulary = dict(model["vocab"])
    last = max([*vocabulary.values(), *(token["id"] for token in tokenizer.get("added_tokens", []))])
    for left, right in merges:
        last += 1
        vocabulary[left + right] = last
    lists = not model["merges"] or not isinstance(model["merges"][0], str)
    added = [[left, right] if lists else f"{left} {right}" for left, right in merges]
    return {**tokenizer, "model": {**model, "vocab": vocabulary, "merges": [*model["merges"], *added]}}


def readable(name: str) -> str:
    """The text of a token's name, with a mark where its bytes are no whole characters."""
    byte_of = {character: byte for byte, character in enumerate(byte_characters())}
    return bytes(byte_of[character] for character in name).decode("utf-8", "replace")
