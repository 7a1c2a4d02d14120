"""A tokenizer takes on words of a domain, and what it knew stays."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pytest

from operators import shards
from operators.tokens import bpe, extend
from operators.tokens.encode import Encoder
from pipelines.stages.tokens import ExtendTokenizerStage
from tests.operators.tokens.build import bilingual, context, corpus

_DOMAIN = [
    f"恒温反应釜的温度是{n}度，反应釜用于炼丹。 The hydrocracking unit no. {n} feeds hydrocracking reactors." for n in range(80)
]


@pytest.fixture(scope="module")
def old() -> bytes:
    return bpe.train(iter([[row["text"] for row in bilingual(60)]]), 400).to_str().encode()


def test_learnt_tokens_shorten_the_domain_and_keep_every_old_id_and_text(old: bytes) -> None:
    before, parsed = Encoder(old), json.loads(old)
    merges = extend.learn(before, parsed, [pa.array(_DOMAIN, pa.large_string())], 60, min_frequency=2, max_token_bytes=24)
    new = extend.extended(parsed, merges)
    after = Encoder(json.dumps(new).encode())
    assert after.vocab_size == before.vocab_size + len(merges)
    assert {name: new["model"]["vocab"][name] for name in parsed["model"]["vocab"]} == parsed["model"]["vocab"]
    words = [extend.readable(left + right) for left, right in merges]
    assert "反应釜" in words and " hydrocracking" in words
    assert all(len((left + right).encode("utf-8")) and len(left) + len(right) <= 24 for left, right in merges)
    texts = pa.array([*_DOMAIN[:3], *(row["text"] for row in bilingual(30))], pa.large_string())
    (a, starts), (b, new_starts) = before.encode(texts), after.encode(texts)
    assert new_starts[3] < 0.7 * starts[3]
    for number, text in enumerate(texts.to_pylist()):
        mine, theirs = a[starts[number] : starts[number + 1]], b[new_starts[number] : new_starts[number + 1]]
        assert after.decode(mine) == after.decode(theirs) == text, "what the old tokenizer wrote, the new one reads"
        assert len(theirs) <= len(mine)


def test_words_of_a_list_become_one_token_each(old: bytes) -> None:
    before, parsed = Encoder(old), json.loads(old)
    merges = extend.spelled(before, parsed, ["反应釜", "hydrocracking", "两 词", "a"], 100)
    after = Encoder(json.dumps(extend.extended(parsed, merges)).encode())
    texts = pa.array(["反应釜", "hydrocracking", " hydrocracking"], pa.large_string())
    assert after.encode(texts)[1].tolist() == [0, 1, 2, 3]
    assert len(extend.spelled(before, parsed, ["反应釜"], 2)) == 0, "a word that would exceed the number is left out"


def test_a_tokenizer_of_another_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="only a byte-level BPE tokenizer can be extended, this one is Unigram"):
        extend.check({"model": {"type": "Unigram"}, "pre_tokenizer": {"type": "Metaspace"}})


def test_the_stage_writes_the_tokenizer_and_states_what_it_gained(old: bytes, tmp_path: Path, ray_cluster: None) -> None:
    base = tmp_path / "base"
    base.mkdir()
    (base / "tokenizer.json").write_bytes(old)
    (base / "tokenizer_config.json").write_text(json.dumps(bpe.settings()))
    rows = [{"id": f"d{n}", "text": text, "source": "s", "lang": "zh"} for n, text in enumerate(_DOMAIN)]
    inputs = {"domain": corpus(tmp_path, "domain", rows, [30]), "web": corpus(tmp_path, "web", bilingual(40), [40])}
    stage = ExtendTokenizerStage(input="domain", general="web", tokenizer_path=str(base), tokens=40, min_frequency=2)
    here = context(tmp_path, "wider", inputs)
    stage.run(here)
    manifest = shards.load_manifest(here.directory)
    stats = manifest.stats
    assert stats["vocab_size"] == stats["vocab_size_before"] + stats["tokens_added"]
    assert stats["tokens_per_byte"]["domain"]["after"] < 0.7 * stats["tokens_per_byte"]["domain"]["before"]
    assert stats["tokens_per_byte"]["general"]["after"] <= stats["tokens_per_byte"]["general"]["before"]
    assert Encoder(Path(here.directory, manifest.files["tokenizer"]).read_bytes()).vocab_size == stats["vocab_size"]
