"""Merging adapters into a base: the same logits, tied weights, dtypes, shards, and clear refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GenerationConfig

from operators import shards
from operators.stage import StageContext
from pipelines.stages.alignment import MergeStage
from train import adapters, export, models
from train.parallel import Workers
from train.settings_finetune import MergeJob

IDS = torch.arange(5, 90)[None]

KINDS: dict[str, dict[str, Any]] = {
    "lora": {"target_modules": "all-linear", "init_lora_weights": False},
    "rslora": {"target_modules": ["q_proj", "down_proj"], "use_rslora": True, "init_lora_weights": False},
    "dora": {"target_modules": "all-linear", "use_dora": True, "init_lora_weights": False},
    "saved embeddings": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "saved head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "both saved, tied": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "adapted embeddings": {"target_modules": ["q_proj", "embed_tokens"], "init_lora_weights": False},
    "new tokens": {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [7, 8]}},
}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS, use_cache=False).logits.float()


def adapter(base: str, directory: Path, seed: int = 0, **settings: Any) -> tuple[str, PeftModel]:
    """An adapter that changes what the base says, saved, and the adapted model."""
    torch.manual_seed(seed)
    adapted = get_peft_model(models.load(base), LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **settings))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn_like(parameter))
    adapted.save_pretrained(str(directory), save_embedding_layers=False)
    return str(directory), adapted


def merged(base: str, paths: list[str], directory: Path, **settings: Any) -> tuple[Any, dict[str, Any]]:
    result = export.run(MergeJob(model=base, adapters=paths, **settings), str(directory), Workers())
    return AutoModelForCausalLM.from_pretrained(directory / "model", dtype="auto"), result


@pytest.mark.parametrize("kind", list(KINDS))
def test_the_merged_model_says_what_base_and_adapter_say(small_model: str, tmp_path: Path, kind: str) -> None:
    path, adapted = adapter(small_model, tmp_path / "adapter", **KINDS[kind])
    expected = logits(adapted)
    assert (expected - logits(models.load(small_model))).abs().max() > 0.01
    model, result = merged(small_model, [path], tmp_path / "merged")
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-5)
    assert result["largest_logit_difference"] < 1e-5 * max(1.0, result["largest_logit"])
    tied = kind not in ("saved embeddings", "saved head", "adapted embeddings", "new tokens")
    tied = tied or (kind == "new tokens" and model.config.tie_word_embeddings)
    assert model.config.tie_word_embeddings is tied
    names = {name for file in (tmp_path / "merged" / "model").glob("*.safetensors") for name in load_file(file)}
    assert ("lm_head.weight" in names) is not tied
    assert not any("lora" in name for name in names)
    torch.testing.assert_close(logits(models.load(path)), expected, atol=1e-5, rtol=1e-5)


def test_several_adapters_are_merged_one_after_another(small_model: str, tmp_path: Path) -> None:
    first, _ = adapter(small_model, tmp_path / "first", 1, **KINDS["lora"])
    export.run(MergeJob(model=small_model, adapters=[first]), str(tmp_path / "one"), Workers())
    second, adapted = adapter(str(tmp_path / "one" / "model"), tmp_path / "second", 2, **KINDS["dora"])
    model, result = merged(small_model, [first, second], tmp_path / "both")
    torch.testing.assert_close(logits(model), logits(adapted), atol=1e-5, rtol=1e-5)
    assert result["adapters"] == 2


def test_a_base_in_bf16_is_summed_in_fp32_and_rounded_once(small_model: str, tmp_path: Path) -> None:
    half = tmp_path / "half"
    models.export(models.load(small_model).to(torch.bfloat16), models.load_tokenizer(small_model), str(half))
    path, adapted = adapter(str(half), tmp_path / "adapter", **KINDS["lora"])
    exact = {name: tensor for name, tensor in adapters.merge(adapted).state_dict().items() if "proj" in name}
    for dtype, kept in ((None, torch.bfloat16), ("bf16", torch.bfloat16), ("fp32", torch.float32)):
        model, result = merged(str(half), [path], tmp_path / f"merged-{dtype}", dtype=dtype)
        assert result["dtype"] == str(kept).removeprefix("torch.")
        for name, tensor in exact.items():
            assert torch.equal(model.state_dict()[name], tensor.to(kept)), name


def test_weights_beyond_a_shards_size_go_to_further_files(small_model: str, tmp_path: Path) -> None:
    path, adapted = adapter(small_model, tmp_path / "adapter", **KINDS["lora"])
    model, result = merged(small_model, [path], tmp_path / "merged", max_shard_size="100KB")
    assert result["files"] > 2
    index = json.loads((tmp_path / "merged" / "model" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) == result["files"]
    assert models.exists(str(tmp_path / "merged" / "model"))
    torch.testing.assert_close(logits(model), logits(adapted), atol=1e-5, rtol=1e-5)
    again = export.run(MergeJob(model="/nowhere", adapters=["/nowhere"]), str(tmp_path / "merged"), Workers())
    assert again == result, "a finished merge is not done again"


def test_template_stop_tokens_and_a_longer_vocabulary_come_along(small_model: str, tmp_path: Path) -> None:
    base, tokenizer, model = tmp_path / "base", models.load_tokenizer(small_model), models.load(small_model)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}。{% endfor %}"
    model.generation_config = GenerationConfig(eos_token_id=[0, 2], pad_token_id=3, temperature=0.3, do_sample=True)
    models.export(model, tokenizer, str(base))
    tokenizer.add_tokens(["炼丹炉", "alembic"])
    grown = models.load(str(base))
    grown.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    torch.manual_seed(0)
    adapted = get_peft_model(grown, LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM"))
    adapted.save_pretrained(str(tmp_path / "adapter"), save_embedding_layers=True)
    tokenizer.save_pretrained(str(tmp_path / "adapter"))
    model, _ = merged(str(base), [str(tmp_path / "adapter")], tmp_path / "merged")
    torch.testing.assert_close(logits(model), logits(adapted), atol=1e-5, rtol=1e-5)
    found = models.load_tokenizer(str(tmp_path / "merged" / "model"))
    assert found.chat_template == tokenizer.chat_template
    assert model.get_input_embeddings().weight.shape[0] == len(tokenizer)
    assert len(found("炼丹炉", add_special_tokens=False)["input_ids"]) == 1
    assert model.generation_config.eos_token_id == [0, 2]
    assert model.generation_config.temperature == 0.3


def test_what_cannot_be_merged_is_refused_with_the_reason(small_model: str, tmp_path: Path) -> None:
    path, _ = adapter(small_model, tmp_path / "adapter", **KINDS["lora"])

    def refused(base: str, adapter_path: str, kind: type[Exception], said: str) -> None:
        with pytest.raises(kind, match=said):
            export.run(MergeJob(model=base, adapters=[adapter_path]), str(tmp_path / "refused"), Workers())
        assert not (tmp_path / "refused" / "model").exists()

    refused(small_model, small_model, FileNotFoundError, "it has no adapter_config.json")
    refused(small_model, str(tmp_path / "nowhere"), FileNotFoundError, "no adapter at .*nowhere")
    pickled = tmp_path / "pickled"
    shutil.copytree(path, pickled)
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    refused(small_model, str(pickled), ValueError, r"no adapter_model.safetensors \(found \['adapter_model.bin'\]\)")
    config = models.load(small_model).config
    config.num_hidden_layers = 1
    models.export(AutoModelForCausalLM.from_config(config), models.load_tokenizer(small_model), str(tmp_path / "shallow"))
    refused(str(tmp_path / "shallow"), path, ValueError, "the adapter at .* does not fit the base .*shallow")
    written = json.loads((Path(path) / "adapter_config.json").read_text())
    (Path(path) / "adapter_config.json").write_text(json.dumps({**written, "base_model_name_or_path": "org/name"}))
    with pytest.raises(FileNotFoundError, match=r"belongs on the base '.*org/name', which is not there; merge it first"):
        models.load(path)


def test_a_recipe_merges_a_path_into_a_path(small_model: str, tmp_path: Path) -> None:
    path, adapted = adapter(small_model, tmp_path / "adapter", **KINDS["lora"])
    stage = MergeStage(model=small_model, adapter=path)
    assert (stage.input_names(), stage.files()) == ([], [small_model, path])

    class Group:
        def run(self, job: dict[str, Any], *_: Any) -> dict[str, Any]:
            assert job["kind"] == "merge"
            return export.run(MergeJob(**job["config"]), job["directory"], Workers())

    directory = tmp_path / "run" / "whole" / "f0"
    context = StageContext(
        stage="whole", kind="merge", directory=str(directory), fingerprint="f0", config={}, inputs={}, seed=0,
        services={"train": Group},
    )  # fmt: skip
    stage.run(context)
    manifest = shards.load_manifest(str(directory))
    assert manifest.files["model"] == "model"
    torch.testing.assert_close(logits(models.load(str(directory / "model"))), logits(adapted), atol=1e-5, rtol=1e-5)
