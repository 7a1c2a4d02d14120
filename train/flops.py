"""Floating-point operations of training a token, what a device can do, and the share of it that was used (MFU).

Model FLOPs utilisation as PaLM defines it (Chowdhery et al. 2022, arXiv 2204.02311, appendix B): the operations that the
model needs, forward and backward, with nothing that is computed a second time (activation checkpointing), over the
device's peak for dense bf16 products.
"""

from __future__ import annotations

from collections.abc import Mapping

from transformers.modeling_utils import PreTrainedModel

PEAKS: Mapping[str, float] = {
    "H100 PCIe": 756e12,  # [T] (the 1,513 of the data sheet count sparsity)
    "H100 NVL": 835e12,  # [T] (1,671 with sparsity)
    "H100": 989e12,  # [T] SXM (1,979 with sparsity)
    "H800": 989e12,  # [V] an H100 SXM with slower links
    "H200": 989e12,  # [T] SXM
    "H20": 148e12,  # [V]
    "B200": 2250e12,  # [T] (4,500 with sparsity)
    "A100": 312e12,  # [T]
    "A800": 312e12,  # [V] an A100 with slower links
    "L40S": 362e12,  # [T] (733 with sparsity)
    "L20": 119.5e12,  # [V]
    "L4": 121e12,  # NVIDIA's data sheet: 242 with sparsity
    "A10": 125e12,  # [L]
    "RTX 4090": 165.2e12,  # waredb.com, nvidia-geforce-rtx-4090: 165.15 dense, 330.3 with sparsity
}
"""Dense bf16 operations a second by a part of the device's name (as torch.cuda.get_device_name says it).

Each was looked up in what others calculate with, which name NVIDIA's data sheets: [T] github.com/pytorch/torchtitan,
torchtitan/tools/utils.py; [V] github.com/volcengine/verl, verl/utils/flops_counter.py; [L] github.com/Lightning-AI/
pytorch-lightning, src/lightning/fabric/utilities/throughput.py. A device that is not here has no MFU.
"""


_VARIANTS = {"NVL", "Laptop", "D"}
"""Words that make another device of a name: an H200 NVL has not the peak of an H200."""


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 operations a second of one device; None where it is not known (every CPU, for one)."""
    words = device_name.replace("-", " ").split()
    for name in sorted(PEAKS, key=len, reverse=True):
        wanted = name.split()
        if all(word in words for word in wanted) and _VARIANTS.isdisjoint(set(words) - set(wanted)):
            return PEAKS[name]
    return None


def active_parameters(model: PreTrainedModel) -> int:
    """Parameters that a token is multiplied with: without the table of input embeddings, experts by the share at work.

    A tied matrix counts once, as the head. Sharded parameters count whole.
    """
    config = model.config.get_text_config()
    experts = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None) or 0
    share = config.num_experts_per_tok / experts if experts else 1.0
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    skipped = {id(table.weight)} if head is not None and head.weight is not table.weight else set()
    total = 0.0
    for name, parameter in model.named_parameters():
        if id(parameter) not in skipped:
            total += parameter.numel() * (share if ".experts." in name else 1.0)
    return round(total)


def flops_per_token(model: PreTrainedModel, length: int) -> float:
    """Operations of training one token: 6 a parameter and 12 * layers * heads * width * length for attention.

    By the convention of published figures `length` is that of rows (and a causal mask halves nothing). Where packed
    documents are isolated that counts products which nobody computes: give the documents' mean length for an honest share.
    """
    config = model.config.get_text_config()
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 6.0 * active_parameters(model) + 12.0 * config.num_hidden_layers * config.num_attention_heads * width * length


def mfu(tokens_per_second: float, token_flops: float, device_name: str, devices: int = 1) -> float | None:
    """The share of all devices' peak that went into the model, 0 to 1; None where the peak is not known."""
    peak = peak_flops(device_name)
    return None if peak is None else tokens_per_second * token_flops / (peak * devices)
