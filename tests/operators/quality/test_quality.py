"""The quality classifier: trained, deterministic, sound in both languages, and used by its stage and its scorer."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path

import pyarrow as pa
import pytest

from operators import shards
from operators.quality.classifier import ClassifierSettings, normalise, train_classifier
from operators.quality.scorer import ScoreQuality
from operators.stage import StageContext
from pipelines.stages.quality import QualityClassifierStage

_ENGLISH = [
    "the",
    "committee",
    "discussed",
    "a",
    "plan",
    "for",
    "the",
    "library",
    "and",
    "agreed",
    "that",
    "work",
    "should",
    "begin",
    "in",
    "spring",
    "because",
    "many",
    "people",
    "want",
    "to",
    "read",
]
_SPAM = [
    "buy",
    "cheap",
    "now",
    "click",
    "here",
    "free",
    "offer",
    "best",
    "price",
    "win",
    "money",
    "casino",
    "bonus",
    "deal",
    "sale",
    "discount",
    "limited",
    "order",
]
_CHINESE = [
    "委员会讨论了图书馆的计划",
    "大家同意明年春天开始建设",
    "因为很多人希望有地方读书",
    "建筑师修改了入口的设计",
    "市长感谢居民的建议",
]
_CHINESE_SPAM = ["点击这里领取优惠", "全场包邮低价促销", "加微信了解详情", "真人娱乐注册送彩金", "限时秒杀手慢无"]


def documents(words: list[str], chinese: list[str], seed: int, count: int = 150) -> list[str]:
    draw = random.Random(seed)
    english = [" ".join(draw.choices(words, k=30)) + "." for _ in range(count)]
    return english + ["，".join(draw.choices(chinese, k=6)) + "。" for _ in range(count)]


GOOD, BAD = documents(_ENGLISH, _CHINESE, 1), documents(_SPAM, _CHINESE_SPAM, 2)
SMALL = ClassifierSettings(buckets=2000, epochs=10)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "model.bin"
    stats = train_classifier(GOOD, BAD, str(path), 7, SMALL)
    assert stats["documents"] == {"good": 300, "bad": 300}
    assert stats["accuracy_by_language"]["en"] >= 0.9
    assert stats["accuracy_by_language"]["zh"] >= 0.9
    assert stats["held_out"] == sum(stats["held_out_by_language"].values()) > 20
    return path


def test_training_again_gives_the_same_bytes_and_another_seed_others(model: Path, tmp_path: Path) -> None:
    digests = []
    for seed in (7, 8):
        train_classifier(iter(GOOD), iter(BAD), str(tmp_path / "again.bin"), seed, SMALL)
        digests.append(hashlib.sha256((tmp_path / "again.bin").read_bytes()).hexdigest())
    assert digests[0] == hashlib.sha256(model.read_bytes()).hexdigest()
    assert digests[1] != digests[0]


def test_scores_tell_good_from_bad_in_both_languages(model: Path) -> None:
    fresh_good, fresh_bad = documents(_ENGLISH, _CHINESE, 3, 10), documents(_SPAM, _CHINESE_SPAM, 4, 10)
    table = pa.table({"text": [*fresh_good, *fresh_bad, "", "\n"]})
    verdict = ScoreQuality(model=str(model), minimum=0.5).process(table)
    assert verdict.reason is not None
    assert verdict.reason.to_pylist() == [None] * 20 + ["low_quality"] * 22
    assert verdict.table.schema.field("quality").type == pa.float32()
    for score in verdict.table["quality"].to_pylist():
        assert score == pytest.approx(round(score, 4), abs=1e-7)
    lenient = ScoreQuality(model=str(model), minimum={"zh": 0.5, "*": 0.0}).process(table)
    assert lenient.reason is not None
    assert [reason is None for reason in lenient.reason.to_pylist()] == [True] * 30 + [False] * 10 + [True] * 2


def test_normalised_lines_hold_words_and_no_line_feed() -> None:
    texts = pa.array(["Hello, World 42!\nNext\tline", "我来到北京大学。", "", "a\x00b\x0bc"])
    assert normalise(texts, "words", 100).to_pylist() == ["hello , world 00 ! next line", "我 来到 北京大学 。", "", "a b c"]
    assert normalise(texts, "characters", 100).to_pylist()[1] == "我 来 到 北 京 大 学 。"
    assert normalise(texts, "words", 5).to_pylist()[0] == "hello"


def test_a_side_without_documents_and_a_wrong_label_are_clear_errors(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no bad document"):
        train_classifier(GOOD, [], str(tmp_path / "m.bin"), 1, SMALL)
    with pytest.raises(ValueError, match="no label 'fine'; it has"):
        ScoreQuality(model=str(model), label="fine").process(pa.table({"text": ["x"]}))
    with pytest.raises(FileNotFoundError, match="no fastText model"):
        ScoreQuality(model=str(tmp_path / "none.bin")).process(pa.table({"text": ["x"]}))


def test_the_stage_trains_on_files_and_accounts_for_every_row(model: Path, tmp_path: Path) -> None:
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in GOOD]
    (tmp_path / "good.jsonl").write_text("\n".join([*lines, "not json", json.dumps({"text": " "})]), encoding="utf-8")
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"text": BAD}), tmp_path / "bad.parquet")
    stage = QualityClassifierStage(kind="quality_classifier", good=["good.jsonl"], bad=["*.parquet"], classifier=SMALL.model_dump())
    assert stage.files() == ["good.jsonl", "*.parquet"]
    directory = str(tmp_path / "runs" / "test" / "quality" / "abc")
    context = StageContext(
        "quality", stage.kind, directory, "abc", stage.model_dump(), {}, seed=7, base_directory=str(tmp_path)
    )  # fmt: skip
    stage.run(context)
    manifest = shards.load_manifest(directory)
    assert manifest.ledger.to_json() == {
        "in": 602, "created": 0, "kept": 600, "rejected": {"quality_classifier:empty": 1}, "quarantined": 1,
    }  # fmt: skip
    assert manifest.stats["accuracy"] >= 0.9
    assert (Path(directory) / manifest.files["model"]).read_bytes() == model.read_bytes()
