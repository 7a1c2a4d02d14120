"""Models: small typed shapes, checkpoints in Hugging Face layout, and the tokenizer that goes with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3MoeConfig,
)
from transformers.modeling_utils import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from cluster import storage
from operators.synthesis import packaged
from train import adapters, artifacts, templates
from train.model_shapes import read_shape as read_shape
from train.settings import ModelShape

END_OF_TEXT, PADDING = "<|endoftext|>", "<|pad|>"
"""The special tokens that Danlu's tokenizers have. `<|endoftext|>` ends a document, `<|im_end|>` a turn."""

CHAT_TEMPLATE = templates.CHATML
"""What Danlu's own models speak."""


Configuration = LlamaConfig | Qwen3Config | Qwen3MoeConfig


def configuration(shape: ModelShape, vocab: int, context: int, eos: int | None, pad: int | None) -> Configuration:
    """The transformers configuration of a shape.

    Raises ValueError when heads do not divide or the embedding is smaller than the tokenizer.
    """
    kv_heads = shape.kv_heads or shape.heads
    if (shape.head_width is None and shape.hidden % shape.heads) or shape.heads % kv_heads:
        raise ValueError(
            f"model: heads ({shape.heads}) must divide hidden ({shape.hidden}), unless head_width is given, and kv_heads "
            f"({kv_heads}) must divide heads"
        )
    if shape.vocab is not None and shape.vocab < vocab:
        raise ValueError(f"model.vocab is {shape.vocab}, but the tokenizer has {vocab} tokens")
    if shape.context is not None and shape.context < context:
        raise ValueError(f"model.context is {shape.context}, but packed sequences are {context} tokens long")
    common: dict[str, Any] = {
        "vocab_size": shape.vocab or vocab,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate or -(-shape.hidden * 8 // (3 * 64)) * 64,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": kv_heads,
        "head_dim": shape.head_width or shape.hidden // shape.heads,
        "max_position_embeddings": shape.context or context,
        "initializer_range": shape.initializer,
        "rms_norm_eps": shape.norm_eps,
        "tie_word_embeddings": shape.tie_embeddings,
        "rope_parameters": {"rope_type": "default", "rope_theta": shape.rope_theta},
        "bos_token_id": None,
        "eos_token_id": eos,
        "pad_token_id": pad,
    }
    if shape.architecture == "llama":
        return LlamaConfig(**common)
    if shape.architecture == "qwen3":
        return Qwen3Config(**common, use_sliding_window=False)
    assert shape.experts and shape.experts_per_token and shape.expert_intermediate, "ModelShape asks for them"
    return Qwen3MoeConfig(
        **common,
        use_sliding_window=False,
        num_experts=shape.experts,
        num_experts_per_tok=shape.experts_per_token,
        moe_intermediate_size=shape.expert_intermediate,
        norm_topk_prob=True,
        router_aux_loss_coef=shape.balance_loss,
    )


def create(config: Configuration, seed: int) -> PreTrainedModel:
    """A model with fresh float32 weights, the same for one seed on every worker."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.float32)


def load(path: str) -> PreTrainedModel:
    """A checkpoint in Hugging Face layout from a local directory or URI, float32, without remote code or network.

    An adapter that is not merged yet (`train.adapters` says where one may lie) is merged here, so that what trains from
    this model begins at base + adapter. Raises FileNotFoundError naming what is absent.
    """
    found = adapters.find(path)
    if found is not None and not found.inside:
        model = load(found.base)
    else:
        model = AutoModelForCausalLM.from_pretrained(
            model_directory(path),
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            dtype=torch.float32,
            attn_implementation="sdpa",
        )
    if found is not None:
        model = adapters.merge(adapters.attach(model, found.adapter))
    # An adapter trained on this model names it as its base: with what was merged into it, and as it was asked for.
    model.name_or_path = model.config._name_or_path = path
    return model


def model_directory(path: str) -> Path:
    """The local directory of a checkpoint, which may be `packaged:NAME` (converted once on this machine).

    Raises FileNotFoundError when it is no model in Hugging Face layout, ModelError for an unknown packaged one.
    """
    if path.startswith(packaged.PREFIX):
        return Path(packaged.resolve_model(path, str(artifacts.cache_directory())))
    try:
        directory = artifacts.local_directory(path)
    except FileNotFoundError:
        raise FileNotFoundError(f"no model at {path}: the directory does not exist") from None
    if not (directory / "config.json").is_file():
        raise FileNotFoundError(f"no model at {path}: it has no config.json (Hugging Face layout is expected)")
    if not any(directory.glob("*.safetensors")):
        raise FileNotFoundError(f"no model at {path}: it has no *.safetensors file")
    return directory


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint directory; of an adapter's own, if it has one, else its base's."""
    found = adapters.find(path)
    if found is not None:
        if (found.adapter / "tokenizer_config.json").is_file():
            return AutoTokenizer.from_pretrained(found.adapter, local_files_only=True, trust_remote_code=False)
        if not found.inside:
            return load_tokenizer(found.base)
    return AutoTokenizer.from_pretrained(model_directory(path), local_files_only=True, trust_remote_code=False)


def tokenizer_json(path: str) -> bytes | None:
    """The contents of tokenizer.json of a checkpoint, of its adapter's own if it has one; None where there is no such file."""
    found = adapters.find(path)
    places = [found.adapter] if found is not None else []
    if found is not None and not found.inside:
        places.append(model_directory(found.base))
    else:
        places.append(model_directory(path))
    return next((file.read_bytes() for place in places if (file := place / "tokenizer.json").is_file()), None)


def wrap_tokenizer(file: Path) -> PreTrainedTokenizerBase:
    """A transformers tokenizer around a `tokenizer.json`. Raises ValueError when it has no `<|endoftext|>`."""
    known = {item["content"] for item in json.loads(file.read_text(encoding="utf-8"))["added_tokens"]}
    if END_OF_TEXT not in known:
        raise ValueError(f"{file}: the tokenizer has no special token {END_OF_TEXT}; it has {sorted(known)}")
    return PreTrainedTokenizerFast(
        tokenizer_file=str(file),
        eos_token=END_OF_TEXT,
        pad_token=PADDING if PADDING in known else END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )


def as_chat(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, chat_template: str | None = None) -> None:
    """Give tokenizer and model what a chat needs: a template with marks (`train.templates`) and its end of a turn as a stop token.

    Raises templates.TemplateRefused, a ValueError, when the tokenizer's own template cannot be used or there is none.
    """
    end = tokenizer.convert_tokens_to_ids(templates.prepare(tokenizer, chat_template))
    given = model.generation_config.eos_token_id if model.generation_config is not None else None
    known = set(given if isinstance(given, list) else [given])
    if end not in known:
        model.generation_config = GenerationConfig(
            eos_token_id=sorted(int(stop) for stop in {end, tokenizer.eos_token_id} - {None}),
            pad_token_id=tokenizer.pad_token_id,
            do_sample=False,
        )


def export(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, destination: str) -> None:
    """Write weights (safetensors), configuration and tokenizer in the layout that transformers and vLLM load."""
    with artifacts.building(destination) as directory:
        model.save_pretrained(directory)
        marked = tokenizer.chat_template
        if isinstance(marked, str):
            tokenizer.chat_template = templates.unmarked(marked)
        tokenizer.save_pretrained(directory)
        tokenizer.chat_template = marked


def parameter_counts(model: torch.nn.Module) -> tuple[int, int]:
    """(all parameters, those that are trained); tied ones count once."""
    parameters = list(model.parameters())
    return sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)


def exists(path: str) -> bool:
    """True when a finished export lies at `path`."""
    return artifacts.is_complete(path) and storage.exists(storage.join(path, "config.json"))
