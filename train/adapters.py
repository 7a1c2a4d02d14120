"""Models given as a base and a PEFT adapter: found on disk, loaded whole, merged exactly.

A path may name a plain model, the directory of an adapter (`adapter_config.json`, whose `base_model_name_or_path` names
the base: again any of the three), or a model's directory with an adapter in `adapter/` that is not merged yet. Whoever
loads such a path gets base and adapter as one plain model, so that what trains from there, and what it is compared with,
begins at base + adapter.
"""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from transformers import PreTrainedModel

from cluster import storage
from train import artifacts

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True)
class Adapted:
    """An adapter and the model it belongs on; `inside` when the adapter lies in the base's own directory."""

    base: str
    adapter: Path
    inside: bool


def find(path: str) -> Adapted | None:
    """The base and the adapter behind a path, None for a plain model (or nothing at all).

    Raises FileNotFoundError for an adapter whose weights or base are not there, ValueError for one without safetensors.
    """
    if storage.exists(storage.join(path, CONFIG)):
        adapter = checked(path)
        base = json.loads((adapter / CONFIG).read_text("utf-8")).get("base_model_name_or_path") or ""
        if not storage.is_remote(base) and base and not Path(base).is_absolute():
            base = str(adapter / base)
        if not base or not storage.exists(base):
            raise FileNotFoundError(
                f"the adapter at {path} belongs on the base {base or 'that it does not name'!r}, which is not there; merge it "
                "first, naming the base: {kind: merge, model: BASE, adapter: " + path + "}"
            )
        return Adapted(base, adapter, inside=False)
    if storage.exists(storage.join(path, "adapter", CONFIG)):
        return Adapted(path, checked(storage.join(path, "adapter")), inside=True)
    return None


def checked(path: str) -> Path:
    """The local directory of an adapter. Raises FileNotFoundError, ValueError when it is none in safetensors."""
    try:
        directory = artifacts.local_directory(path)
    except FileNotFoundError:
        raise FileNotFoundError(f"no adapter at {path}: the directory does not exist") from None
    if not (directory / CONFIG).is_file():
        raise FileNotFoundError(f"no adapter at {path}: it has no {CONFIG} (the layout of PEFT is expected)")
    if not (directory / WEIGHTS).is_file():
        found = sorted(entry.name for entry in directory.glob("adapter_model.*"))
        raise ValueError(f"the adapter at {path} has no {WEIGHTS} (found {found or 'none'}); other formats can run code")
    return directory


def directories(path: str) -> list[Path]:
    """The local directories that make up the model at `path`: its adapters, outermost first, then the base."""
    found = find(path)
    if found is None:
        return [artifacts.local_directory(path)]
    rest = [artifacts.local_directory(path)] if found.inside else directories(found.base)
    return [found.adapter, *rest]


def attach(base: PreTrainedModel, adapter: Path) -> PeftModel:
    """`base` with the adapter switched on, not trainable; embeddings grow first where the adapter was saved with more rows.

    Raises ValueError unless every tensor of the adapter has its place in the base, and every place its tensor.
    """
    ends = [module for module in (base.get_input_embeddings(), base.get_output_embeddings()) if module is not None]
    embeddings = {f"base_model.model.{name}.weight" for name, module in base.named_modules() if module in ends}
    with safe_open(str(adapter / WEIGHTS), framework="pt") as stored:
        keys = set(stored.keys())
        # A tokenizer that was extended before training leaves whole embeddings, longer than the base's, in the adapter.
        rows = {stored.get_slice(key).get_shape()[0] for key in keys & embeddings}
    whole: Any = base
    if rows and max(rows) != whole.get_input_embeddings().weight.shape[0]:
        whole.resize_token_embeddings(max(rows), mean_resizing=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*missing adapter keys.*")  # an error below
        adapted = PeftModel.from_pretrained(whole, str(adapter), is_trainable=False, local_files_only=True)
    places = set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
    wrong = sorted(places ^ (keys - (embeddings - places)))
    if wrong:
        raise ValueError(
            f"the adapter at {adapter} does not fit this base: {len(wrong)} of its tensors have no place, or places no tensor, "
            f"{wrong[0]!r} first"
        )
    return adapted


def merge(adapted: PeftModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The plain model that says what base + adapter say: sums in float32, cast once to `dtype` (default: as the base is).

    Layer after layer, so that a base in bfloat16 never lies in memory as float32 as a whole. Tied embeddings of which the
    adapter changed one side become two matrices. Raises ValueError for a quantised base and for an adapter that cannot be
    merged (prompt tuning).
    """
    whole: Any = adapted.get_base_model()
    if getattr(whole, "quantization_method", None) is not None or getattr(whole, "is_quantized", False):
        raise ValueError("an adapter is merged into the unquantised base, but this one is quantised: load it in bf16 or fp32")
    if not hasattr(adapted.base_model, "merge_and_unload"):
        raise ValueError(f"an adapter of type {adapted.peft_type} cannot be merged into a model's weights")
    tied = bool(getattr(whole.config.get_text_config(), "tie_word_embeddings", False))
    if tied:
        _untie(whole)
    for module in list(adapted.modules()):
        if isinstance(module, BaseTunerLayer) and not module.merged:
            layer: Any = module.get_base_layer()
            stored = layer.weight.dtype
            layer.to(torch.float32)
            module.merge(safe_merge=True)
            layer.to(dtype or stored)
    with warnings.catch_warnings():
        # Every layer is merged above; PEFT says so for each, and tells of embeddings that it finds untied.
        warnings.filterwarnings("ignore", message=".*(lready merged|lready following adapters|no longer tied).*")
        merged: Any = adapted.merge_and_unload(safe_merge=True)
    if tied:
        _retie(merged)
    if dtype is not None:
        for parameter in merged.parameters():
            parameter.data = parameter.data.to(dtype)
    merged.config.dtype = next(merged.parameters()).dtype
    return merged.requires_grad_(True)  # PEFT froze the base


def _untie(whole: Any) -> None:
    """Give the output head a matrix of its own where it shares the input embedding's, lest both get the sum of one."""
    ends: list[Any] = [whole.get_input_embeddings(), whole.get_output_embeddings()]
    layers: list[Any] = [getattr(end, "base_layer", end) for end in ends]
    if any(isinstance(end, BaseTunerLayer) for end in ends) and layers[0].weight is layers[1].weight:
        layers[1].weight = torch.nn.Parameter(layers[1].weight.detach().clone(), requires_grad=False)


def _retie(merged: Any) -> None:
    """Say in the configuration what is so: tied where both matrices are equal, two matrices where they are not."""
    first, last = merged.get_input_embeddings(), merged.get_output_embeddings()
    same = last is None or first.weight is last.weight or torch.equal(first.weight, last.weight)
    merged.config.get_text_config().tie_word_embeddings = merged.config.tie_word_embeddings = same
    if same and last is not None:
        last.weight = first.weight
