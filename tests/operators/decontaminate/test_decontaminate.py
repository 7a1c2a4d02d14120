"""Decontamination: every n-gram of a benchmark is found wherever it stands, and nothing else."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from operators.chain import Chain
from operators.config import SettingsError
from operators.decontaminate.index import Lengths, build_index, tokenise
from operators.decontaminate.operator import Decontaminate

QUESTION = "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May. How many clips in all?"
FRAGE = "下列哪一项不属于《中华人民共和国宪法》规定的公民基本权利？请从四个选项中选出正确的答案。"
SHORT = "What is nine times eight plus four minus two?"
KURZ = "牛的发情周期平均为多少天"
FILLER = "The harbour was quiet, and nobody spoke. "
FULLUNG = "海边的小镇今天很安静，没有人说话。"


def write(path: Path, items: list[dict[str, Any]]) -> dict[str, Any]:
    path.write_text("\n".join(json.dumps(item, ensure_ascii=False) for item in items) + "\n", "utf-8")
    return {"path": str(path), "fields": ["q"], "id_field": "id"}


@pytest.fixture
def bench(tmp_path: Path) -> list[dict[str, Any]]:
    return [
        write(tmp_path / "sums.jsonl", [{"id": "s1", "q": QUESTION}, {"id": "s2", "q": SHORT}]),
        write(tmp_path / "rechte.jsonl", [{"id": "r1", "q": FRAGE}, {"id": "r2", "q": KURZ}, {"id": "r3", "q": "谁？"}]),
    ]  # fmt: skip


def texts(*rows: str | None) -> pa.Table:
    return pa.table(
        {"id": [f"d{i}" for i in range(len(rows))], "text": pa.array(rows, pa.large_string()), "source": ["t"] * len(rows)}
    )


def matches(operator: Decontaminate, *rows: str | None) -> list[dict[str, Any] | None]:
    return [json.loads(item) if item else None for item in operator.measure(texts(*rows))["match"].to_pylist()]


def test_an_item_is_found_inside_other_text_in_another_case_punctuation_and_script_mix(bench: list[dict[str, Any]]) -> None:
    operator = Decontaminate(benchmarks=bench)
    shouted = FILLER * 3 + QUESTION.upper().replace(",", " --").replace(" ", "\n") + FULLUNG
    found = matches(
        operator, shouted, FULLUNG + FRAGE + FILLER, "words before" + FRAGE.replace("，", ""), FILLER, "", None, FULLUNG
    )
    assert [item and (item["benchmark"], item["item"]) for item in found] == [
        ("sums", "s1"), ("rechte", "r1"), ("rechte", "r1"), None, None, None, None,
    ]  # fmt: skip
    first = found[0]
    assert first is not None
    assert first["overlap"] == 1.0
    assert first["ngram"] == "natalia sold clips to 48 of her friends in april and then she"
    assert shouted[first["position"] :].startswith("NATALIA")


def test_one_changed_word_lowers_the_overlap_and_only_loses_the_ngrams_that_hold_it(bench: list[dict[str, Any]]) -> None:
    operator = Decontaminate(benchmarks=bench, min_overlap=0.5)
    words = tokenise(QUESTION)
    late, middle = (
        QUESTION.replace("How many clips", "How much clips"),
        QUESTION.replace("and then she", "but then he"),
    )
    scores = operator.measure(texts(late, middle))
    total = len(words) - 12
    assert scores["overlap"].to_pylist()[0] == round((total - 4) / total, 4)
    assert scores["overlap"].to_pylist()[1] < 0.5
    reason, value = operator.decide(texts(late, middle), scores)
    assert reason.to_pylist() == ["sums", None]
    assert value.to_pylist()[1] is None
    changed_digit = Decontaminate(benchmarks=bench).measure(texts(QUESTION.replace("48", "49")))["overlap"].to_pylist()[0]
    assert 0 < changed_digit < 1  # digits are part of the text


def test_a_short_item_counts_only_as_a_whole_and_the_shortest_not_at_all(bench: list[dict[str, Any]]) -> None:
    operator = Decontaminate(benchmarks=bench)
    found = matches(
        operator, f"问：{KURZ}？", f"问：{KURZ[:-1]}？", "谁？", "He asked: what is nine times eight, plus four, minus two?",
        SHORT[:-10],
    )  # fmt: skip
    assert [item and item["item"] for item in found] == ["r2", None, None, "s2", None]
    assert operator.index.skipped == {"rechte": 1}


def test_ngrams_that_many_items_share_are_a_template_and_match_nothing(tmp_path: Path) -> None:
    stem = "Choose the one answer that best completes the following sentence about the history of "
    items = [{"id": i, "q": stem + f"country number {i} and of its people in the old days"} for i in range(9)]
    bench = [write(tmp_path / "b.jsonl", items)]
    assert matches(Decontaminate(benchmarks=bench), stem + "music") == [None]
    assert matches(Decontaminate(benchmarks=bench, template_items=None), stem + "music")[0] is not None
    assert matches(Decontaminate(benchmarks=bench), items[4]["q"])[0]["item"] == "4"  # type: ignore[index]


def test_a_rejected_document_tells_what_it_matched_and_the_reason_names_the_benchmark(bench: list[dict[str, Any]]) -> None:
    result = Chain([{"decontaminate": {"benchmarks": bench}}]).run(texts(FILLER, FULLUNG + FRAGE, QUESTION))
    assert result.kept["id"].to_pylist() == ["d0"]
    assert result.rejected == {"decontaminate:rechte": 1, "decontaminate:sums": 1}
    rejects = pa.concat_tables(result.rejects).to_pylist()
    assert [json.loads(row["detail"])["item"] for row in rejects] == ["r1", "s1"]
    assert [row["value"] for row in rejects] == [1.0, 1.0]


def test_cutting_takes_the_match_with_its_window_and_leaves_the_rest(bench: list[dict[str, Any]]) -> None:
    cut = {"benchmarks": bench, "action": "cut", "window": 10, "min_piece": 40}
    before, after = FILLER * 5, FULLUNG * 10
    rows = texts(before + QUESTION + after, FILLER, "x " + FRAGE, (QUESTION + " " + "o" * 60) * 4)
    verdict = Decontaminate(**cut, max_pieces=2).process(rows)
    changed = verdict.table["text"].to_pylist()
    assert changed[0] == before[:-10].strip() + "\n\n" + after[9:]
    assert changed[1] == FILLER
    assert verdict.reason.to_pylist() == [None, None, "nothing_left", "many_pieces"]  # type: ignore[union-attr]
    assert json.loads(verdict.table["contaminated_by"].to_pylist()[0])["item"] == "s1"
    assert verdict.table["contamination"].to_pylist()[:2] == [1.0, 0.0]
    assert Decontaminate(**cut).measure(verdict.table)["overlap"].to_pylist()[:2] == [0.0, 0.0]
    marked = Decontaminate(**{**cut, "action": "mark"}).process(rows)
    assert marked.reason is None
    assert marked.table["text"].equals(rows["text"])


def test_files_are_checked_with_row_and_key_and_may_be_compressed(tmp_path: Path) -> None:
    path = tmp_path / "b.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps({"q": [QUESTION, None, 7]}).encode() + b"\n\n"))
    assert matches(Decontaminate(benchmarks=[{"path": str(path), "fields": ["q"]}]), QUESTION)[0]["item"] == "0"  # type: ignore[index]
    for line, message in (
        (b"{", "row 0: not JSON"),
        (b'{"a": 1}', "row 0: no key 'q'"),
        (b'{"q": {}}', "key 'q': a text"),
        (b"[]", "JSON object"),
    ):
        bad = tmp_path / "bad.jsonl"
        bad.write_bytes(line)
        with pytest.raises(SettingsError, match=message):
            _ = Decontaminate(benchmarks=[{"path": str(bad), "fields": ["q"]}], words=9).index
    with pytest.raises(FileNotFoundError, match="no benchmark file at"):
        _ = Decontaminate(benchmarks=[{"path": str(tmp_path / "none.jsonl"), "fields": ["q"]}]).index


ALPHABET = st.sampled_from(["a", "b", "B", "é", " ", " ", "1", "中", "文", "，", "가", "\u0301", "\u200d", "😀", "\n", "\x00", "ก"])
LENGTHS = Lengths(words=3, characters=4, short_words=2, short_characters=2)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.text(ALPHABET, max_size=24), max_size=4), st.lists(st.text(ALPHABET, max_size=60), max_size=4))
def test_any_text_gives_the_hits_of_a_plain_search(items: list[str], rows: list[str]) -> None:
    index = build_index((("b", str(i), "q", item) for i, item in enumerate(items)), LENGTHS, None)
    expected = []
    for row, text in enumerate(rows):
        tokens = tokenise(text)
        for entry in range(len(index.texts)):
            gram = index.ngram(entry).split(" ")
            hits = sum(tokens[i : i + len(gram)] == gram for i in range(len(tokens)))
            expected += [(row, entry)] * hits
    hits, data, offsets = index.find(pa.array(rows, pa.large_string()))
    assert sorted(zip(hits.rows.tolist(), hits.entries.tolist(), strict=True)) == sorted(expected)
    for row, entry, start, end in zip(hits.rows, hits.entries, hits.starts, hits.ends, strict=True):
        piece = data[offsets[row] + start : offsets[row] + end].tobytes().decode()
        assert tokenise(piece) == index.ngram(entry).split(" ")


FIELDS = {
    "gsm8k_train_1500.jsonl": ["question", "answer"],
    "mmlu_dev.jsonl": ["question"],
    "cmmlu_dev.jsonl": ["Question"],
    "humaneval_164.jsonl": ["prompt"],
}


def test_real_items_planted_in_real_text_are_found_and_real_text_alone_is_not(data_pack: Path) -> None:
    bench = [{"path": str(data_pack / "bench" / name), "fields": fields} for name, fields in FIELDS.items()]
    operator = Decontaminate(benchmarks=bench)
    rng = np.random.default_rng(3)
    hosts = {
        lang: pq.read_table(data_pack / "corpus" / f"{lang}.parquet", columns=["text"])["text"].slice(0, 800)
        for lang in ("en", "zh")
    }
    for lang, column in hosts.items():
        found = operator.measure(texts(*column.to_pylist()))["overlap"].to_numpy()
        assert (found > 0).sum() == 0, lang
    for name, fields in FIELDS.items():
        host = hosts["zh" if name.startswith("cmmlu") else "en"].to_pylist()
        lines = (data_pack / "bench" / name).read_text("utf-8").splitlines()[:100]
        planted, expected = [], []
        for number, line in enumerate(lines):
            text, at = host[number], int(rng.integers(0, len(host[number]) + 1))
            item = json.loads(line)[fields[0]]
            planted.append(text[:at] + "\n" + item + "\n" + text[at:])
            expected.append(len(tokenise(item)) >= (10 if name.startswith("cmmlu") else 8))
        overlap = operator.measure(texts(*planted))["overlap"].to_numpy()
        missed = [i for i, (share, long) in enumerate(zip(overlap, expected, strict=True)) if long and share == 0]
        assert len(missed) <= 2, (name, missed)  # an item that is nothing but its benchmark's template
        assert sum(expected) >= 60
