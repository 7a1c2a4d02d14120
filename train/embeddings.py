"""A model learns the ids of an extended tokenizer: new rows of the embedding and the head start as means of the old pieces' rows.

The mean of what a token was written with before keeps its logit among those the model knows, where a random row would take
probability from every other token at the first step (Hewitt 2021, "Initializing New Word
Embeddings for Pretrained Language Models").
"""

from __future__ import annotations

import json
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers.modeling_utils import PreTrainedModel


def pieces(old: bytes, new: bytes) -> dict[int, list[int]]:
    """new id -> the old ids of its text, for two tokenizer.json files of which the second extends the first.

    Empty where the second has no new token; it may lack old ones then (a chat's marks, say). Raises ValueError when an id means
    another token in the new file, so that nothing could be carried over.
    """
    if old == new:
        return {}
    before, after = Tokenizer.from_buffer(old), Tokenizer.from_buffer(new)
    known, found = before.get_vocab(with_added_tokens=True), after.get_vocab(with_added_tokens=True)
    if all(known.get(name) == token for name, token in found.items()):
        return {}
    for name, token in known.items():
        if found.get(name) != token:
            raise ValueError(
                f"the packed corpus' tokenizer is no extension of the model's own: id {token} is {name!r} in the model, "
                f"{after.id_to_token(token)!r} in the corpus; pack with the model's tokenizer or an `extend_tokenizer` stage of it"
            )
    made = {"".join(parts): parts for parts in _merges(json.loads(new))}
    result = {}
    for name, token in sorted(found.items(), key=lambda item: item[1]):
        if name not in known:
            result[token] = _spelled(name, made, known) or before.encode(name, add_special_tokens=False).ids
    return result


def rows(old: bytes, new: bytes) -> int:
    """Rows of the embedding that `extend` needs at least; 0 where the second tokenizer has no new token. Raises as `pieces`."""
    return max(pieces(old, new), default=-1) + 1


def _merges(tokenizer: dict[str, Any]) -> list[tuple[str, str]]:
    merges = tokenizer.get("model", {}).get("merges", [])
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
    return [(str(left), str(right)) for left, right in pairs]


def _spelled(name: str, made: dict[str, tuple[str, str]], known: dict[str, int]) -> list[int]:
    """The old ids that the merges of a new token join; empty for a token that no merge makes."""
    ids, left = [], [name]
    while left:
        part = left.pop()
        if part in known:
            ids.append(known[part])
        elif part in made:
            left += reversed(made[part])
        else:
            return []
    return ids


def extend(model: PreTrainedModel, old: bytes, new: bytes) -> int:
    """Make room in the model for the tokens of `new` and set their rows; returns the tokens that were added.

    `old`, `new`: the contents of tokenizer.json. Logits of the old tokens stay what they were. Rows that a model has beyond
    its tokenizer (embeddings padded to a multiple) are used before any are added. Raises ValueError as `pieces` does.
    """
    added = pieces(old, new)
    if not added:
        return 0
    size = max(added) + 1
    embedding: Any = model.get_input_embeddings()
    if size > embedding.weight.shape[0]:
        model.resize_token_embeddings(size, mean_resizing=False)
    ends: list[Any] = [model.get_input_embeddings(), model.get_output_embeddings()]
    weights: dict[int, torch.Tensor] = {id(end.weight): end.weight for end in ends if end is not None}
    with torch.no_grad():
        for weight in weights.values():
            for token, parts in added.items():
                if parts:
                    weight[token] = weight[parts].float().mean(0).to(weight.dtype)
    return len(added)
