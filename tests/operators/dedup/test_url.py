"""Addresses of one page get one spelling, those of two pages keep two; dedup by URL and by key."""

from __future__ import annotations

import re
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from operators.config import SettingsError, parse
from operators.dedup.keys import document_keys
from operators.dedup.options import DedupOptions
from operators.dedup.url import normalise_urls
from tests.operators.dedup.corpus import directory_of, kept_ids, removed_rows, run_stage, write_corpus
from tests.operators.dedup.corpus import without_ray as without_ray  # a fixture
from tests.operators.dedup.cut import documents

SAME = [
    ["http://Example.com", "https://www.example.com/", "example.com:80", "//example.com/#top", "http://u:p@example.com/index.html"],
    ["https://a.org/x?b=2&a=1", "http://a.org/x/?a=1&utm_source=n&b=2&fbclid=7", "a.org/x?&a=1&b=2#part"],
    ["https://zh.wikipedia.org/wiki/%E4%B8%AD%e6%96%87", "https://zh.wikipedia.org/wiki/中文"],
    ["http://例え.jp/a/./b/../c", "http://xn--r8jz45g.jp/a/c"],
    ["http://a.org/%7euser/%2fx", "http://a.org/~user/%2Fx"],
    ["http://shop.org/cart;jsessionid=1A2?id=3", "http://shop.org/cart?id=3&PHPSESSID=9"],
    ["ftp://a.org:80/x", "FTP://a.org:80/x/"],
]
APART = [
    "http://a.org/x",
    "http://a.org/X",
    "http://a.org/x?a=1",
    "http://b.a.org/x",
    "ftp://a.org/x",
    "http://a.org:8080/x",
    "http://a.org/#!/x",
]


def spell(*urls: str | None) -> list[str | None]:
    return list(normalise_urls(pa.array(urls, pa.string())).to_pylist())


def test_spellings_of_one_address_become_one_and_different_addresses_stay_apart() -> None:
    for group in SAME:
        assert len(set(spell(*group))) == 1, spell(*group)
    assert len(set(spell(*APART))) == len(APART)
    assert spell(None, "", "  ", " not a url ", "mailto:a@b.org") == [None, None, None, "not a url", "b.org"]
    assert normalise_urls(pa.chunked_array([], pa.string())).to_pylist() == []
    with pytest.raises(TypeError, match="must be strings"):
        normalise_urls(pa.array([1]))


@settings(max_examples=300, deadline=None)
@example(["0..", "www.www.x.org", "www.www.com", ".."])
@given(
    st.lists(st.one_of(st.text(max_size=30), st.text("ab/.?&=#%2Ff:@wW中é[]", max_size=40).map("http://x.org".__add__)), max_size=5)
)
def test_any_string_passes_and_a_spelling_is_spelled_as_itself(urls: list[str]) -> None:
    once = spell(*urls)
    for url, spelled in zip(urls, once, strict=True):
        assert (spelled is None) == (not url.strip())
        if spelled is not None and re.fullmatch(r"[\w./?&=-]*", url, re.ASCII):
            assert spell(spelled) == [spelled]


def test_a_row_without_an_address_has_no_key(tmp_path: Path) -> None:
    options = DedupOptions(method="exact", exact_on="url", column="url")
    table = documents(["a", "b", "c"], url=["http://a.org", None, ""])
    keys = document_keys(table, pa.array(range(3), pa.uint64()).to_numpy(), options, with_ids=False)
    assert keys.records["exact"][:, 2].tolist() == [0]
    for wrong in ({"exact_on": "url"}, {"exact_on": "value", "column": "key", "method": "minhash"}):
        with pytest.raises(SettingsError, match="needs `method: exact`"):
            parse(DedupOptions, wrong, "dedup")


@pytest.mark.usefixtures("without_ray")
def test_documents_of_one_address_or_of_one_key_leave_one(tmp_path: Path) -> None:
    table = documents(
        ["a", "b", "c", "d", "e"], url=["http://a.org", None, "https://www.a.org/", None, "http://b.org"], key=[1, 2, None, 2, None]
    )
    source = write_corpus(tmp_path, "web", table, 2)
    by_url = run_stage(tmp_path, "url", {"web": source}, method="exact", exact_on="url", column="url")
    assert kept_ids(directory_of(tmp_path, "url")) == ["d0", "d1", "d3", "d4"]
    assert by_url.ledger.rejected == {"exact:duplicate": 1}
    assert [(row["id"], row["kept_id"]) for row in removed_rows(directory_of(tmp_path, "url"))] == [("d2", "d0")]
    run_stage(tmp_path, "key", {"web": source}, method="exact", exact_on="value", column="key")
    assert kept_ids(directory_of(tmp_path, "key")) == ["d0", "d1", "d2", "d4"]
