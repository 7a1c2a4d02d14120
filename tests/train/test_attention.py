"""Documents of a packed row do not see each other: every form of attention against the plain block-diagonal mask."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from tests.train.test_objective import gradients, moe, network, rows, tensors
from train import attention
from train.attention import Documents
from train.objective import PackedLoss

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def positions(lengths: list[list[int]]) -> torch.Tensor:
    return torch.tensor([[t for length in row for t in range(length)] for row in lengths])


def attend(documents: Documents, tensors: list[torch.Tensor], grad: torch.Tensor) -> list[torch.Tensor]:
    """Output and gradients of packed attention."""
    inputs = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    output, _ = attention.packed_attention(torch.nn.Module(), *inputs, None, scaling=0.3, documents=documents)
    output.backward(grad)
    return [output.detach(), *(tensor.grad for tensor in inputs)]


ROWS = st.integers(1, 3).flatmap(
    lambda count: st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=6), min_size=count, max_size=count)
)


@settings(max_examples=40, deadline=None)
@given(lengths=ROWS, heads=st.sampled_from([(1, 1), (4, 2), (6, 2), (3, 3)]))
def test_slices_equal_the_mask_in_values_and_gradients(lengths: list[list[int]], heads: tuple[int, int]) -> None:
    longest = max(map(sum, lengths))
    lengths = [[*row, longest - sum(row)] if sum(row) < longest else row for row in lengths]
    where = positions(lengths)
    draw = torch.Generator().manual_seed(len(lengths))
    given = [torch.randn(len(lengths), count, longest, 16, generator=draw) for count in (heads[0], heads[1], heads[1])]
    grad = torch.randn(len(lengths), longest, heads[0], 16, generator=draw)
    expected = attend(Documents.of(where, "mask"), given, grad)
    for found, wanted in zip(attend(Documents.of(where, "slices"), given, grad), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("lengths", [[[1, 30, 9], [40]], [[130, 7], [1, 136]]])
def test_flex_equals_the_mask_in_values(lengths: list[list[int]]) -> None:
    """On CPU it has no gradients; those are compared where there is a GPU."""
    where = positions(lengths)
    query = torch.randn(2, 4, where.shape[1], 16, generator=torch.Generator().manual_seed(0))
    found, wanted = (
        attention.packed_attention(torch.nn.Module(), query, query[:, :2], query[:, 1:3], None, documents=Documents.of(where, form))
        for form in ("flex", "mask")
    )
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("make", [network, lambda: network(architecture="qwen3"), moe], ids=["llama", "qwen3", "qwen3_moe"])
def test_gradients_of_a_whole_model_equal_those_with_the_mask(make: Any) -> None:
    batch = rows()
    objective = PackedLoss(make())
    found = {}
    for form in ("mask", "slices"):
        objective.form = form
        loss, _ = objective(*tensors(batch))
        found[form] = {"loss": loss.detach(), **gradients(objective, loss / batch.valid_tokens)}
    for name, wanted in found["mask"].items():
        torch.testing.assert_close(found["slices"][name], wanted, rtol=1e-4, atol=1e-5)


def test_logits_of_a_packed_document_are_those_of_the_document_alone() -> None:
    ids, where, _ = tensors(rows())
    model = network()
    with torch.no_grad():
        alone = [
            model(input_ids=ids[row : row + 1, start:end], use_cache=False).logits[0]
            for row in range(len(ids))
            for start, end in itertools.pairwise([*torch.nonzero(where[row] == 0).flatten().tolist(), ids.shape[1]])
        ]
        leaking = model(input_ids=ids, position_ids=torch.arange(48)[None], use_cache=False).logits.flatten(0, 1)
        together = PackedLoss(model).logits(ids, where).flatten(0, 1)
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-4, rtol=1e-4)
    assert (leaking - together).abs().max() > 0.1


def test_a_compiled_block_gives_the_same_gradients_whatever_the_number_of_documents() -> None:
    objective = PackedLoss(network(layers=1))
    compiled = PackedLoss(network(layers=1))
    torch._dynamo.reset()
    for block in compiled.network.model.layers:
        block.compile(backend="aot_eager", fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=False, recompile_limit=4, fail_on_recompile_limit_hit=True):
        for seed in range(6):
            batch = rows(seed=seed)
            wanted = gradients(objective, objective(*tensors(batch))[0])
            found = gradients(compiled, compiled(*tensors(batch))[0])
            for name, gradient in wanted.items():
                torch.testing.assert_close(found[name.replace("_orig_mod.", "")], gradient, rtol=1e-4, atol=1e-4)


def test_what_packed_attention_cannot_compute_is_refused() -> None:
    where = positions([[5, 11]])
    query = torch.randn(1, 2, 16, 8)
    call = lambda **more: attention.packed_attention(torch.nn.Module(), query, query, query, None, **more)  # noqa: E731
    documents = Documents.of(where)
    assert documents.longest == 11
    torch.testing.assert_close(call(documents=documents, sliding_window=11), call(documents=documents))
    with pytest.raises(ValueError, match="called without documents"):
        call()
    with pytest.raises(ValueError, match="a document of 11 tokens is longer than the model's attention window of 10"):
        call(documents=documents, sliding_window=10)
    with pytest.raises(ValueError, match="does not compute softcap"):
        call(documents=documents, softcap=30.0)
    with pytest.raises(ValueError, match="does not compute attention dropout"):
        call(documents=documents, dropout=0.1)
    with pytest.raises(ValueError, match="must begin a document"):
        Documents.of(torch.tensor([[0, 1, 2], [3, 4, 0]]))


@pytest.mark.parametrize(
    ("family", "more", "text"),
    [
        ("gemma2", {}, "scales its logits .final_logit_softcapping"),
        ("phi", {}, "has a head that is not one matrix"),
        ("qwen3_next", {}, "does not let its attention be replaced"),
        ("llama4_text", {"intermediate_size_mlp": 32}, "blocks of kind .'chunked_attention'."),
    ],
)
def test_a_family_that_computes_something_else_is_refused(family: str, more: dict[str, Any], text: str) -> None:
    config = AutoConfig.for_model(family, vocab_size=64, hidden_size=32, num_hidden_layers=4, num_attention_heads=2, **more)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match=text):
        PackedLoss(model)


@pytest.mark.parametrize("family", ["mistral", "qwen2", "olmo2", "smollm3", "gemma3_text", "mixtral"])
def test_other_families_run_with_their_documents_apart(family: str) -> None:
    config = AutoConfig.for_model(
        family, vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=64, pad_token_id=0, attention_dropout=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    objective = PackedLoss(AutoModelForCausalLM.from_config(config))
    ids, where, _ = tensors(rows(2))
    with torch.no_grad():
        torch.testing.assert_close(
            objective.logits(ids, where), objective.logits(ids, where, Documents.of(where, "mask")), atol=1e-4, rtol=1e-4
        )
        changed = ids.clone()
        second = int(torch.nonzero(where[0] == 0)[1])
        changed[0, :second] = (changed[0, :second] + 1) % 97
        torch.testing.assert_close(objective.logits(changed, where)[0, second:], objective.logits(ids, where)[0, second:])


@CUDA
@pytest.mark.parametrize("form", ["varlen", "flex"])
def test_forms_of_the_gpu_equal_the_mask(form: Any) -> None:
    where = positions([[100, 28, 384], [512]]).cuda()
    draw = torch.Generator("cuda").manual_seed(0)
    given = [torch.randn(2, count, 512, 64, generator=draw, device="cuda", dtype=torch.bfloat16) for count in (8, 2, 2)]
    grad = torch.randn(2, 512, 8, 64, generator=draw, device="cuda", dtype=torch.bfloat16)
    exact = attend(Documents.of(where, "mask"), [x.float() for x in given], grad.float())
    usual = attend(Documents.of(where, "mask"), given, grad)
    for found, plain, wanted in zip(attend(Documents.of(where, form), given, grad), usual, exact, strict=True):
        assert (found - wanted).norm() <= 1.5 * (plain - wanted).norm() + 1e-3 * wanted.norm()
