"""Sizes of the shapes that come along, operations a token, and peaks by device name."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.modeling_utils import PreTrainedModel

from train import flops, models
from train.settings import ModelShape


def on_meta(name: str, vocab: int) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(models.configuration(models.read_shape(name), vocab, 2048, 0, 1))


@pytest.mark.parametrize(
    ("name", "vocab", "parameters", "active"),
    [
        ("0.1b", 32_000, 109_529_856, 109_529_856),
        ("0.6b", 151_936, 596_049_920, 596_049_920),
        ("1b", 128_256, 1_235_814_400, 1_235_814_400),
        ("7b", 32_000, 6_738_415_616, 6_607_343_616),
        ("8b", 128_256, 8_030_261_248, 7_504_924_672),
        ("70b", 128_256, 70_553_706_496, 69_503_033_344),
        ("30b-a3b", 151_936, 30_532_122_624, 3_041_867_776),
    ],
)
def test_shapes_have_the_published_number_of_parameters(name: str, vocab: int, parameters: int, active: int) -> None:
    model = on_meta(name, vocab)
    assert models.parameter_counts(model)[0] == parameters
    assert flops.active_parameters(model) == active


def test_operations_of_a_token_are_those_of_palm() -> None:
    shape = ModelShape(layers=3, hidden=64, heads=4, head_width=32, intermediate=128, tie_embeddings=False)
    model = models.create(models.configuration(shape, 100, 16, 0, 1), 0)
    matrices = 100 * 64 + 3 * (4 * 64 * 128 + 3 * 64 * 128) + 7 * 64
    assert flops.flops_per_token(model, 16) == 6 * matrices + 12 * 3 * 4 * 32 * 16


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H20", 148e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L20", 119.5e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200 NVL", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA H2000", None),
        ("AMD EPYC 9B14", None),
    ],
)
def test_the_peak_is_known_by_the_name_of_the_device_or_not_at_all(name: str, peak: float | None) -> None:
    assert flops.peak_flops(name) == peak


def test_utilisation_is_the_share_of_the_peak_of_all_devices() -> None:
    assert flops.mfu(20_000, 9.89e9, "NVIDIA H100 80GB HBM3", devices=2) == pytest.approx(0.1)
    assert flops.mfu(20_000, 9.89e9, "a CPU") is None
