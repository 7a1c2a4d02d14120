"""The data that ships is what its README says, and has in it what the operators are there for."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
from collections import Counter
from pathlib import Path

import pytest

from operators.sources import ReadSettings, plan_units
from tests.conftest import ROOT
from tests.operators.sources.reading import Reading, read_all

FILES = [
    "documents.parquet", "help_chats.jsonl", "help_pairs.jsonl", "help_quiz.jsonl", "notes.jsonl", "pages.warc.gz",
    "quality_bad.jsonl", "quality_good.jsonl", "seed_tasks_en.jsonl", "seed_tasks_zh.jsonl",
]  # fmt: skip


@pytest.fixture(scope="module")
def pages(example_data: Path) -> Reading:
    return read_all("pages.warc.gz", example_data)


@pytest.fixture(scope="module")
def notes(example_data: Path) -> Reading:
    return read_all("notes.jsonl", example_data, columns=["license", "language"])


@pytest.fixture(scope="module")
def documents(example_data: Path) -> Reading:
    return read_all("documents.parquet", example_data, columns=["license", "language", "attribution"])


def test_the_readme_lists_every_file_with_its_checksum_and_all_fit_in_12_megabytes(example_data: Path) -> None:
    readme = (example_data / "README.md").read_text("utf-8")
    listed = dict(re.findall(r"^\| ([\w.]+) \|.*`([0-9a-f]{64})` \|$", readme, re.MULTILINE))
    present = sorted(path.name for path in example_data.iterdir() if path.is_file() and path.name != "README.md")
    assert sorted(listed) == present == FILES
    assert {name: hashlib.sha256((example_data / name).read_bytes()).hexdigest() for name in FILES} == listed
    assert sum(path.stat().st_size for path in example_data.rglob("*") if path.is_file()) <= 12_000_000
    for name in re.findall(r"`licenses/([\w.-]+)`", readme):
        assert (example_data / "licenses" / name).is_file(), name


def test_the_help_files_are_what_their_script_makes_of_the_pages_and_the_quiz_was_not_taught(example_data: Path) -> None:
    spec = importlib.util.spec_from_file_location("build_help", example_data.parent / "build_help.py")
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    made = script.build(example_data / "pages.warc.gz")
    for name, rows in made.items():
        lines = (example_data / f"{name}.jsonl").read_text("utf-8").splitlines()
        assert [json.loads(line) for line in lines] == rows
    taught = {message["content"] for row in made["help_chats"] for message in row["messages"]}
    assert all(row["question"] not in taught and row["choices"][row["answer"]] not in taught for row in made["help_quiz"])
    assert all(len(set(row["choices"])) == 4 for row in made["help_quiz"])
    assert {row["lang"] for row in made["help_quiz"]} == {"en", "zh"}


def test_every_document_has_a_licence_that_allows_redistribution(documents: Reading, notes: Reading) -> None:
    found = Counter(row["license"] for row in [*documents.rows, *notes.rows])
    free = ("PSF-2.0", "Apache-2.0", "MIT", "CC BY 4.0", "CC BY-SA", "public domain", "Public domain", "GPL-2", "CC0-1.0")
    assert [name for name in found if not name.startswith(free)] == []
    assert not any(re.search(r"\bNC\b|\bND\b", name) for name in found)
    assert all(row["attribution"] for row in documents.rows)


def test_pages_hold_two_languages_in_many_encodings_and_one_broken_record(pages: Reading) -> None:
    assert len(pages.rows) == 783
    assert pages.reasons == ["broken_record"]
    assert len(set(pages.ids)) == 783
    charsets = Counter(row["charset"] for row in pages.rows)
    assert {"utf-8", "gbk", "big5", "cp1252", None} == set(charsets)
    assert sum(b"charset=gb18030" in row["content"] for row in pages.rows) > 5
    assert sum(row["content"] == b"" for row in pages.rows) == 1
    assert sum(row["content"].startswith(b"\x89PNG") for row in pages.rows) == 1
    languages = Counter(re.findall(r"(en-US|zh-CN|zh-TW|/de/|/ja/|/fr/|ru-RU)", " ".join(row["url"] for row in pages.rows)))
    assert languages["en-US"] > 150 and languages["zh-CN"] > 200 and languages["zh-TW"] > 70
    assert all(languages[name] > 10 for name in ("/de/", "/ja/", "/fr/", "ru-RU"))
    texts = [row["content"].decode("utf-8", "replace") for row in pages.rows]
    assert sum("Ã" in text or "ç\x9a\x84" in text for text in texts) > 5  # é and 的 after a wrong turn through Latin-1


def test_pages_hold_copies_and_earlier_versions(pages: Reading) -> None:
    contents = {row["url"]: row["content"] for row in pages.rows}
    copies = [url for url in contents if url.endswith("?print=1")]
    assert len(copies) == 45
    assert sum(contents[url] == contents.get(url.removesuffix("?print=1")) for url in copies) > 30  # the others are re-encoded
    assert sum(url.endswith("?previous=1") for url in contents) == 47


def test_documents_are_english_and_chinese_with_versions_of_one_file(documents: Reading) -> None:
    languages = Counter(row["language"][:2] for row in documents.rows)
    assert languages["en"] > 400 and languages["zh"] > 400
    assert documents.bad == []
    assert len({row["source"] for row in documents.rows}) >= 10
    files = Counter(
        row["attribution"].partition("@")[0] for row in documents.rows if row["source"] in ("peps", "javaguide", "d2l-zh")
    )
    assert sum(count > 1 for count in files.values()) > 40
    assert 6_000_000 > sum(len(row["text"].encode()) for row in documents.rows) > 4_000_000


def test_notes_hold_each_kind_of_bad_line_and_a_duplicate_id(notes: Reading) -> None:
    assert notes.reasons == ["invalid_utf8", "bad_json", "bad_json", "missing_text", "not_text", "missing_text"]
    assert [count for count in Counter(notes.ids).values() if count > 1] == [2]
    assert sum(row["text"].startswith("\x00") for row in notes.rows) == 1
    assert Counter(row["source"] for row in notes.rows)["made"] == 8


def test_quality_examples_are_balanced_and_apart_from_the_corpus(example_data: Path, documents: Reading, notes: Reading) -> None:
    corpus = "\n".join("".join(row["text"].split()) for row in [*documents.rows, *notes.rows])
    good, bad = (read_all(f"quality_{kind}.jsonl", example_data, columns=["language"]) for kind in ("good", "bad"))
    for examples in (good, bad):
        assert Counter(row["language"] for row in examples.rows) == {"en": 160, "zh": 160}
        assert len(set(examples.ids)) == 320
    assert [row["id"] for row in [*good.rows, *bad.rows] if "".join(row["text"].split()) in corpus] == []
    assert not set(good.texts) & set(bad.texts)


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_seed_tasks_are_175_with_instances(example_data: Path, lang: str) -> None:
    tasks = [json.loads(line) for line in (example_data / f"seed_tasks_{lang}.jsonl").read_text("utf-8").splitlines()]
    assert len(tasks) == 175
    assert all({"id", "name", "instruction", "instances", "is_classification"} <= set(task) for task in tasks)
    assert all(task["instances"][0]["output"] for task in tasks)


def test_small_units_of_the_shipped_files_give_the_same_rows(example_data: Path) -> None:
    for name in ("notes.jsonl", "documents.parquet"):
        whole, cut = read_all(name, example_data), read_all(name, example_data, max_unit_bytes=100_000)
        assert len(cut.units) > 3
        assert cut.rows == whole.rows
        assert [(row.id, row.where) for row in cut.bad] == [(row.id, row.where) for row in whole.bad]


def test_a_trial_reads_as_many_rows_as_asked(example_data: Path) -> None:
    read = ReadSettings(path=["notes.jsonl", "documents.parquet"])
    assert [unit.limit for unit in plan_units(read, str(example_data), 400)] == [None, 39]


def test_the_script_that_builds_the_data_names_no_machine() -> None:
    script = (ROOT / "examples" / "build_data.py").read_text("utf-8")
    assert not re.search(r"[\"'](?:/home|/root|/work|/tmp|/Users)", script)
