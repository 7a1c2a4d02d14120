"""Perplexity by KenLM equals KenLM's own sums, by a causal model transformers' own loss; limits and buckets by language."""

from __future__ import annotations

import importlib.util
import math
import unicodedata
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

from operators.chain import Chain
from operators.config import SettingsError
from operators.filters.perplexity import FilterPerplexity
from operators.quality import causal_model
from operators.text import ngram_model
from pipelines.stages.corpus import CorpusStage
from tests.operators.filters.arpa import ARPA

ENGLISH, CHINESE = "The cat sat\nthe cat", "炉火炉火"


@pytest.fixture(scope="module")
def arpa(tmp_path_factory: pytest.TempPathFactory) -> str:
    pytest.importorskip("kenlm")
    path = tmp_path_factory.mktemp("kenlm") / "tiny.arpa"
    path.write_text(ARPA, encoding="utf-8")
    return str(path)


def expected(arpa: str, lines: list[str]) -> float:
    """CCNet's formula over KenLM's own scores of tokens that are split already."""
    import kenlm

    model = kenlm.Model(arpa)
    length = sum(len(line.split()) + 1 for line in lines)
    return round(10.0 ** (-sum(model.score(line) for line in lines) / length), 3)


def test_kenlm_perplexity_is_ccnets_in_both_languages(arpa: str) -> None:
    table = pa.table({"text": [ENGLISH, CHINESE, "", " \n ", "Thé CAT １2"], "lang": ["en", "zh-Hans", "en", "en", "fr"]})
    found = FilterPerplexity(kenlm=arpa).measure(table)["perplexity"].to_pylist()
    assert found[0] == expected(arpa, ["the cat sat", "the cat"])
    assert found[1] == expected(arpa, ["炉 火 炉 火"])
    assert found[2] is None and found[3] is None
    assert found[4] == expected(arpa, ["the cat 00"])
    whole = FilterPerplexity(kenlm=arpa, unit="document", tokens="spaces").measure(table)["perplexity"].to_pylist()
    assert whole[0] == expected(arpa, ["the cat satthe cat"])  # CCNet's form deletes line feeds
    plain = FilterPerplexity(kenlm=arpa, normalise=False).measure(table)["perplexity"].to_pylist()
    assert plain[0] == expected(arpa, ["The cat sat", "the cat"]) != found[0]


def test_each_language_has_its_model_its_limits_and_its_buckets(arpa: str) -> None:
    table = pa.table({"text": [ENGLISH, CHINESE, CHINESE, "dog " * 9], "lang": ["en", "zh", "fr", "en"]})
    low, high = expected(arpa, ["the cat sat", "the cat"]), expected(arpa, ["dog " * 9])
    operator = FilterPerplexity(
        kenlm={"en": arpa, "zh": arpa}, max_perplexity=1e9, thresholds={"zh": {"max_perplexity": 1.5}},
        cutoffs={"en": (low + 1, low + 2)}, keep=["head"],
    )  # fmt: skip
    verdict = operator.process(table)
    assert verdict.reason is not None and verdict.value is not None
    assert verdict.reason.to_pylist() == [None, "high_perplexity", None, "tail"]
    assert verdict.value.to_pylist() == [None, expected(arpa, ["炉 火 炉 火"]), None, high]
    assert verdict.table["perplexity"].to_pylist()[2] is None
    assert verdict.table["perplexity_bucket"].to_pylist() == ["head", None, None, "tail"]
    result = Chain([{"filter_perplexity": {"kenlm": arpa, "min_perplexity": low + 1}}]).run(
        table.append_column("id", pa.array(list("abcd"))).append_column("source", pa.array(["s"] * 4))
    )
    assert "a" not in result.kept["id"].to_pylist()
    assert result.rejected["filter_perplexity:low_perplexity"] >= 1


def test_tokens_may_be_those_of_a_tokenizer_or_sentencepiece_file(arpa: str, tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({"the": 0, "cat": 1, "sat": 2, "[UNK]": 3}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    table = pa.table({"text": [ENGLISH]})
    operator = FilterPerplexity(kenlm=arpa, tokens=str(tmp_path / "tokenizer.json"))
    assert operator.measure(table)["perplexity"].to_pylist() == [expected(arpa, ["the cat sat", "the cat"])]
    assert operator.files() == [arpa, str(tmp_path / "tokenizer.json")]
    sentencepiece = pytest.importorskip("sentencepiece")
    sentences = (tmp_path / "lines.txt").as_posix()
    Path(sentences).write_text("the cat sat\nthe dog sat\na cat ran\n炉火\n" * 20, encoding="utf-8")
    prefix = str(tmp_path / "sp")
    sentencepiece.SentencePieceTrainer.train(input=sentences, model_prefix=prefix, vocab_size=18, minloglevel=2, num_threads=1)
    pieces = sentencepiece.SentencePieceProcessor(model_file=f"{prefix}.model")
    lines = [" ".join(pieces.encode(line, out_type=str)) for line in ("the cat sat", "the cat")]
    found = FilterPerplexity(kenlm=arpa, tokens={"en": f"{prefix}.model"}).measure(table)
    assert found["perplexity"].to_pylist() == [expected(arpa, lines)]


def test_ccnets_form_equals_its_definition_on_any_text() -> None:
    text = "Ünïcode “Quotes” ，。１２٣ naïve…—x\x07\tend\u0301 中文　한국 ％ﬁ"
    accents = "".join(c for c in unicodedata.normalize("NFD", text.lower()) if unicodedata.category(c) != "Mn")
    digits = "".join("0" if c.isdecimal() else c for c in accents)
    marks = {"“": '"', "”": '"', "，": ",", "。": ".", "…": "...", "—": " - ", "％": "%"}
    wanted = "".join(marks.get(c, c) for c in digits if not (ord(c) < 32 or 127 <= ord(c) < 160))
    assert ngram_model.normalise(f" {text} ") == wanted


def test_a_missing_package_and_wrong_files_are_told_before_anything_starts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="give `kenlm`"):
        FilterPerplexity()
    with pytest.raises(SettingsError, match="is none of words, characters, spaces"):
        FilterPerplexity(kenlm="a.arpa", tokens="word")
    with pytest.raises(SettingsError, match="first must be positive"):
        FilterPerplexity(model="m", cutoffs={"en": (5, 3)})
    (tmp_path / "bad.arpa").write_text("no model", encoding="utf-8")
    with pytest.raises(FileNotFoundError, match="no model at"):
        FilterPerplexity(model=str(tmp_path)).measure(pa.table({"text": ["a"]}))
    if importlib.util.find_spec("kenlm"):
        with pytest.raises(ValueError, match=r"bad\.arpa is no KenLM model"):
            FilterPerplexity(kenlm=str(tmp_path / "bad.arpa")).measure(pa.table({"text": ["a"]}))
        with pytest.raises(FileNotFoundError, match="no KenLM model at"):
            FilterPerplexity(kenlm="absent.arpa").measure(pa.table({"text": ["a"]}))
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "kenlm" else find(name))
    with pytest.raises(SettingsError, match=r"pip install danlu\[kenlm\]"):
        FilterPerplexity(kenlm="a.arpa")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A real, tiny, untrained llama of 32 tokens of context, with a byte-level tokenizer."""
    directory = tmp_path_factory.mktemp("llama")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({"<|endoftext|>": 0, **{letter: n + 1 for n, letter in enumerate(alphabet)}}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=257, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, initializer_range=0.5,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(directory, safe_serialization=True)
    return str(directory)


def plain_loss(directory: str, text: str, context: int, stride: int) -> float:
    """Mean loss of the tokens of a text after the start token, by transformers' own loss, window by window."""
    model = LlamaForCausalLM.from_pretrained(directory).eval()
    ids = [0, *Tokenizer.from_file(f"{directory}/tokenizer.json").encode(text).ids]
    nats, count, done = 0.0, 0, 1
    for begin in range(0, len(ids), stride):
        end = min(begin + context, len(ids))
        window = torch.tensor([ids[begin:end]])
        labels = window.clone()
        labels[0, : done - begin] = -100
        wanted = end - done
        with torch.no_grad():
            loss = model(window, labels=labels, use_cache=False).loss
        nats, count, done = nats + float(loss) * wanted, count + wanted, end
        if end == len(ids):
            return nats / count
    raise AssertionError


@pytest.mark.parametrize(("context", "stride"), [(32, 16), (32, 31), (9, 4)])
def test_causal_perplexity_is_that_of_transformers_loss(llama: str, context: int, stride: int) -> None:
    texts = ["The furnace is heated slowly until the copper begins to glow.", "炉火慢慢升温，直到铜开始发光。", "ab", ""]
    operator = FilterPerplexity(model=llama, context=context, stride=stride, device="cpu", batch_tokens=70)
    found = operator.measure(pa.table({"text": texts}))["perplexity"].to_pylist()
    assert found[3] is None
    for text, value in zip(texts[:3], found[:3], strict=True):
        assert math.log(value) == pytest.approx(plain_loss(llama, text, context, stride), abs=2e-4)


def test_a_recipe_may_name_the_model_of_a_stage_or_files_that_enter_its_fingerprint(arpa: str) -> None:
    read = {"path": "x.jsonl"}
    stage = CorpusStage.model_validate({"kind": "corpus", "read": read, "operators": [{"filter_perplexity": {"model": "@base"}}]})
    stage.validate_deep()
    assert stage.input_names() == ["base"] and stage.files() == ["x.jsonl"]
    stage = CorpusStage.model_validate(
        {"kind": "corpus", "read": read, "operators": [{"filter_perplexity": {"kenlm": {"zh": arpa}}}]}
    )
    assert stage.input_names() == [] and stage.files() == ["x.jsonl", arpa]


def test_causal_perplexity_does_not_depend_on_the_batch_and_is_bounded(llama: str) -> None:
    texts = [f"{'炉火' if n % 2 else 'river '}{n} " * (1 + n % 9) for n in range(8)]
    together = FilterPerplexity(model=llama, device="cpu").measure(pa.table({"text": texts}))["perplexity"]
    small = FilterPerplexity(model=llama, device="cpu", batch_tokens=40)
    alone = [small.measure(pa.table({"text": [text]}))["perplexity"][0].as_py() for text in texts]
    assert together.to_pylist() == alone
    loaded = causal_model.load(llama, "cpu", "float32")
    _, tokens = causal_model.losses(loaded, pa.array(["x" * 1000, "xy"], pa.large_string()), max_tokens=50)
    assert tokens.tolist() == [50, 2]
    assert np.isfinite(together.to_numpy(zero_copy_only=False)).all()
