"""The chunked loss equals the plain one: values, gradients, with weights, z-loss, experts, and in little memory."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.modeling_utils import PreTrainedModel

from train import models
from train.attention import Documents
from train.loader import IGNORE, Batch
from train.objective import PackedLoss, balancing_loss, expert_load, head_loss, prepare
from train.settings import ModelShape


def network(vocab: int = 97, seed: int = 0, **shape: Any) -> PreTrainedModel:
    given = {"layers": 2, "hidden": 32, "heads": 4, "kv_heads": 2, "initializer": 0.2, **shape}
    return models.create(models.configuration(ModelShape(**given), vocab, 48, 0, 1), seed)


def rows(count: int = 3, length: int = 48, vocab: int = 97, seed: int = 0) -> Batch:
    """Packed rows of documents of 1 to 20 tokens; the last piece of a row is padding without labels."""
    draw = np.random.default_rng(seed)
    ids = draw.integers(0, vocab, (count, length))
    positions, labels = np.zeros_like(ids), np.full_like(ids, IGNORE)
    for row in range(count):
        edges = [0]
        while edges[-1] < length:
            edges.append(min(length, edges[-1] + int(draw.integers(1, 20))))
        for start, end in itertools.pairwise(edges):
            positions[row, start:end] = np.arange(end - start)
            if end < length:
                labels[row, start : end - 1] = ids[row, start + 1 : end]
    return Batch(ids, positions, labels, int((labels != IGNORE).sum()))


def tensors(batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    ids, positions, labels = (torch.from_numpy(x) for x in (batch.input_ids, batch.position_ids, batch.labels))
    return ids, positions, labels


def plain(objective: PackedLoss, batch: Batch, weights: torch.Tensor | None = None, z_loss: float = 0.0) -> torch.Tensor:
    """All logits at once, in float32, masked attention of transformers' own."""
    ids, positions, labels = tensors(batch)
    logits = objective.logits(ids, positions, Documents.of(positions, "mask")).float().flatten(0, 1)
    each = F.cross_entropy(logits, labels.flatten(), ignore_index=IGNORE, reduction="none")
    each = each + z_loss * logits.logsumexp(-1).square() * (labels.flatten() != IGNORE)
    return (each if weights is None else each * weights.flatten()).sum()


def gradients(module: torch.nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    module.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("z_loss", "weighted", "chunk"), [(0.0, False, None), (1e-2, True, 7), (1e-2, False, 1), (0.0, True, 33)])
def test_loss_and_gradients_equal_the_plain_ones(tied: bool, z_loss: float, weighted: bool, chunk: int | None) -> None:
    objective = PackedLoss(network(tie_embeddings=tied), z_loss=z_loss, chunk_tokens=chunk)
    batch = rows()
    weights = torch.rand(batch.labels.shape, generator=torch.Generator().manual_seed(1)) if weighted else None
    expected = plain(objective, batch, weights, z_loss)
    wanted = gradients(objective, expected / 10)
    loss, parts = objective(*tensors(batch), weights)
    found = gradients(objective, loss / 10)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-4)
    torch.testing.assert_close(sum(parts.values()), loss.detach())
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


def test_under_bf16_autocast_it_is_as_close_to_float32_as_the_plain_loss() -> None:
    objective = PackedLoss(network(), chunk_tokens=16)
    batch = rows()
    exact = gradients(objective, plain(objective, batch))
    reference = float(plain(objective, batch).detach())
    with torch.autocast("cpu", torch.bfloat16):
        usual = plain(objective, batch)
    usual_gradients = gradients(objective, usual)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = objective(*tensors(batch))
    found = gradients(objective, loss)
    assert loss.dtype == torch.float32
    assert abs(float(loss) - reference) < 2 * abs(float(usual.detach()) - reference) + 1e-2 * reference
    for name, gradient in exact.items():
        error = (found[name] - gradient).norm() / gradient.norm()
        assert error < 1.3 * (usual_gradients[name] - gradient).norm() / gradient.norm() + 2e-3, name


def test_no_gradient_is_computed_for_what_is_frozen_or_only_evaluated() -> None:
    objective = PackedLoss(network(tie_embeddings=False))
    batch = rows()
    with torch.no_grad():
        still, _ = objective(*tensors(batch))
    assert not still.requires_grad
    objective.network.get_output_embeddings().weight.requires_grad_(False)
    loss, _ = objective(*tensors(batch))
    torch.testing.assert_close(loss.detach(), still)
    found = gradients(objective, loss)
    assert "network.lm_head.weight" not in found and found["network.model.embed_tokens.weight"].abs().sum() > 0


def test_rows_without_any_label_have_zero_loss_and_gradient() -> None:
    objective = PackedLoss(network())
    ids, positions, labels = tensors(rows())
    loss, _ = objective(ids, positions, torch.full_like(labels, IGNORE))
    found = gradients(objective, loss)
    assert float(loss.detach()) == 0 and all(not gradient.any() for gradient in found.values())


class _Largest(TorchDispatchMode):
    """The largest storage that any operator returned, in bytes."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for value in found if isinstance(found, tuple | list) else [found]:
            if isinstance(value, torch.Tensor):
                self.bytes = max(self.bytes, value.untyped_storage().nbytes())
        return found


def test_logits_of_all_tokens_are_never_alive() -> None:
    tokens, vocab, width, chunk = 1024, 20_000, 16, 64
    hidden, weight = torch.randn(tokens, width, requires_grad=True), torch.randn(vocab, width, requires_grad=True)
    with _Largest() as largest:
        head_loss(hidden, weight, torch.randint(vocab, (tokens,)), None, 0.0, chunk, torch.float32)[0].backward()
    assert largest.bytes == chunk * vocab * 4


def test_a_loss_cannot_be_differentiated_twice() -> None:
    hidden, weight = torch.randn(4, 8, requires_grad=True), torch.randn(9, 8, requires_grad=True)
    loss = head_loss(hidden, weight, torch.arange(4), None, 0.0, 2, torch.float32)[0]
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="differentiated twice"):
        loss.backward()


def test_what_is_prepared_on_the_host_gives_the_same_loss_for_any_cut_of_the_batch() -> None:
    batch = rows(4)
    objective = PackedLoss(network())
    whole, _ = objective(*tensors(batch))
    pieces = [objective(**prepare(batch, piece, torch.device("cpu"), torch.float32))[0] for piece in (slice(0, 1), slice(1, 4))]
    torch.testing.assert_close(sum(pieces), whole)


def moe(**more: Any) -> PreTrainedModel:
    shape = {"architecture": "qwen3_moe", "experts": 4, "experts_per_token": 2, "expert_intermediate": 24, **more}
    return network(**shape)


def test_the_balancing_loss_does_not_depend_on_how_the_batch_is_cut() -> None:
    batch = rows(4)
    objective = PackedLoss(moe(), balance_loss=0.3)
    whole, parts = objective(*tensors(batch))
    pieces = [objective(**prepare(batch, piece, torch.device("cpu"), torch.float32)) for piece in (slice(0, 1), slice(1, 4))]
    torch.testing.assert_close(sum(loss for loss, _ in pieces), whole)
    torch.testing.assert_close(sum(part["expert_tokens"] for _, part in pieces), parts["expert_tokens"])
    assert parts["expert_tokens"].sum(1).tolist() == [batch.valid_tokens * 2] * 2
    assert parts["balance_loss"] > 0.3 * batch.valid_tokens * 0.9
    torch.testing.assert_close(parts["balance_loss"] + parts["cross_entropy"], whole.detach())


def test_the_balancing_loss_is_one_a_token_when_balanced_and_the_number_of_experts_when_one_has_all() -> None:
    mask = torch.ones(2, 8)
    even = torch.eye(4).repeat(4, 1) * 50
    one = torch.zeros(16, 4)
    one[:, 2] = 50.0
    for logits, expected, top in ((even, 1.0, 1.0), (one, 4.0, 4.0)):
        total, counts = balancing_loss((logits,), mask, mask, 1)
        assert float(total) == pytest.approx(expected * 16, rel=1e-4)
        assert expert_load(counts)["max_over_mean"] == pytest.approx(top)
    assert expert_load(counts)["unused"] == 3


def test_training_on_the_balancing_loss_evens_out_the_experts() -> None:
    torch.manual_seed(0)
    objective = PackedLoss(moe(layers=1, balance_loss=0.0), balance_loss=10.0)
    batch = rows(6)
    optimizer = torch.optim.Adam(objective.parameters(), 3e-3)
    loads = []
    for _ in range(40):
        loss, parts = objective(*tensors(batch))
        optimizer.zero_grad()
        (loss / batch.valid_tokens).backward()
        optimizer.step()
        loads.append(expert_load(parts["expert_tokens"])["max_over_mean"])
    assert loads[-1] < 1.15 < loads[0]
