"""The size of a model from its shape or its config.json, without building it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from cluster import storage
from cluster.fit import Model
from operators.synthesis.packaged import PREFIX
from train.settings import ModelShape

_PACKAGED: dict[str, dict[str, Any]] = {
    "smollm2-135m-instruct": {
        "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "head_dim": 64, "vocab_size": 49152, "tie_word_embeddings": True,
    }
}  # fmt: skip
"""Configurations of models that come along: looking into their packages would mean to convert them."""

_SHARED_PRODUCTS = ("llama", "qwen3")
"""Model types that tensor parallelism knows (train.layout.TENSOR_PARALLEL; that module loads torch)."""


def of_shape(shape: ModelShape, vocab: int) -> Model:
    """The model of a shape with a tokenizer of `vocab` tokens."""
    return of_config(
        {
            "model_type": shape.architecture,
            "hidden_size": shape.hidden,
            "intermediate_size": shape.intermediate or -(-shape.hidden * 8 // (3 * 64)) * 64,
            "num_hidden_layers": shape.layers,
            "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.kv_heads or shape.heads,
            "head_dim": shape.head_width or shape.hidden // shape.heads,
            "vocab_size": max(shape.vocab or 0, vocab),
            "tie_word_embeddings": shape.tie_embeddings,
            **({"num_experts": shape.experts, "num_experts_per_tok": shape.experts_per_token} if shape.experts else {}),
            **({"moe_intermediate_size": shape.expert_intermediate} if shape.experts else {}),
        }
    )


def of_config(config: Mapping[str, Any]) -> Model:
    """The model of a Hugging Face configuration of a decoder with SwiGLU. Raises KeyError for one that lacks its sizes."""
    hidden, layers, heads = int(config["hidden_size"]), int(config["num_hidden_layers"]), int(config["num_attention_heads"])
    kv_heads = int(config.get("num_key_value_heads") or heads)
    width = int(config.get("head_dim") or hidden // heads)
    vocab = int(config["vocab_size"])
    attention = hidden * width * (2 * heads + 2 * kv_heads)
    experts = int(config.get("num_experts") or config.get("num_local_experts") or 0)
    if experts:
        one = 3 * hidden * int(config.get("moe_intermediate_size") or config["intermediate_size"])
        mlp, at_work = experts * one + hidden * experts, int(config["num_experts_per_tok"]) * one + hidden * experts
    else:
        mlp = at_work = 3 * hidden * int(config["intermediate_size"])
    norms = 2 * hidden + (2 * width if str(config.get("model_type", "")).startswith("qwen3") else 0)
    tables = vocab * hidden * (1 if config.get("tie_word_embeddings", True) else 2)
    parameters = layers * (attention + mlp + norms) + hidden + tables
    active = layers * (attention + at_work + norms) + hidden + vocab * hidden
    shared = str(config.get("model_type", "")) in _SHARED_PRODUCTS
    return Model(float(parameters), float(active), layers, hidden, kv_heads * width, heads, kv_heads, shared)


def vocabulary(reference: str) -> int | None:
    """Tokens of a packaged model's tokenizer."""
    known = _PACKAGED.get(reference.removeprefix(PREFIX))
    return int(known["vocab_size"]) if known else None


def of_reference(reference: str, base_directory: str) -> Model | None:
    """The model at a path or `packaged:NAME`; None where there is no configuration that tells its size."""
    if reference.startswith(PREFIX):
        known = _PACKAGED.get(reference.removeprefix(PREFIX))
        return of_config(known) if known else None
    path = storage.join(storage.absolute(reference, base_directory), "config.json")
    if not storage.exists(path):
        return None
    config = json.loads(storage.read_bytes(path))
    try:
        return of_config(config.get("text_config", config))
    except KeyError:
        return None


def train_flops(model: Model, tokens: float, length: float) -> float:
    """Operations to train on tokens: 6 a parameter at work and 12 a layer, width and position (see train.flops)."""
    return tokens * (6.0 * model.active + 12.0 * model.layers * model.hidden * length)


def encoder_parameters(model: str, base_directory: str) -> float | None:
    """Parameters of the blocks of an encoder at a path: 12 width^2 a layer. None where no configuration tells."""
    path = storage.join(storage.absolute(model, base_directory), "config.json")
    if not storage.exists(path):
        return None
    config = json.loads(storage.read_bytes(path))
    if "hidden_size" not in config or "num_hidden_layers" not in config:
        return None
    return 12.0 * config["num_hidden_layers"] * config["hidden_size"] ** 2
