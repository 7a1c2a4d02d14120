"""Low-rank adapters in training: LoRA, DoRA, rsLoRA and QLoRA by PEFT."""

from __future__ import annotations

import importlib.util

import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.modeling_utils import PreTrainedModel

from train import adapters, models
from train.settings_finetune import FinetuneSettings, LoraSettings


def adapter_config(lora: LoraSettings | None) -> LoraConfig | None:
    """What a TRL trainer is given to wrap the model with; the fresh adapter is no change at all.

    Handing over the configuration, not a wrapped model, makes DPO take the model without adapter as its reference.
    """
    if lora is None:
        return None
    return LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=lora.targets,
        use_dora=lora.dora, use_rslora=lora.rslora, bias="none", task_type="CAUSAL_LM",
    )  # fmt: skip


def check(job: FinetuneSettings) -> None:
    """Look, before anything is loaded, whether the adapter that is asked for can be had here. Raises ValueError."""
    if job.lora is None or job.lora.quantize == "none":
        return
    if not torch.cuda.is_available():
        raise ValueError("lora.quantize: nf4 needs a CUDA GPU, and this worker has none; leave it out, or train where there is one")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError("lora.quantize: nf4 needs the package bitsandbytes; install it, or leave `quantize` out")
    if job.sharding == "fsdp2":
        raise ValueError("lora.quantize: nf4 does not go with sharding: fsdp2, whose shards cannot hold 4-bit weights; use ddp")


def load_base(path: str, lora: LoraSettings | None, device: torch.device) -> PreTrainedModel:
    """The model to start from; its frozen matrices in 4 bits where that is asked for (`check` first).

    QLoRA (Dettmers et al. 2023, section 3): NormalFloat with double quantisation, products in bfloat16. Raises ValueError for
    an adapter that is not merged, which cannot be summed into 4 bits.
    """
    if lora is None or lora.quantize == "none":
        return models.load(path)
    if adapters.find(path) is not None:
        raise ValueError(
            f"lora.quantize: nf4 starts from a whole model, and at {path} lies an adapter on a base; merge it first with a stage "
            "of kind merge"
        )
    return AutoModelForCausalLM.from_pretrained(
        models.model_directory(path),
        local_files_only=True,
        trust_remote_code=False,
        use_safetensors=True,
        dtype=torch.float32,
        attn_implementation="sdpa",
        device_map={"": device},
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        ),
    )
