"""Documents judged by their address: lists, suffixes of hosts, words, other scripts."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from operators.chain import Chain
from operators.filters import blocklist
from operators.filters.urls import FilterUrls


def judge(urls: list[str | None], **options: object) -> list[str | None]:
    verdict = FilterUrls(**options).process(pa.table({"url": pa.array(urls, pa.string())}))
    assert verdict.reason is not None
    return list(verdict.reason.to_pylist())


def test_a_listed_domain_blocks_its_subdomains_and_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "domains.txt.gz"
    path.write_bytes(
        gzip.compress("# adult\n0.0.0.0 Bad.example\n||worse.example^\n*.cn.example.\nüble.example\n坏网站.中国\n".encode())
    )
    urls = [
        "http://bad.example/x", "https://user:pw@a.b.BAD.example:8080/?q=1", "//worse.example", "http://x.cn.example",
        "http://notbad.example/", "http://bad.example.org/bad.example", "http://example/", "http://xn--ble-goa.example/",
        "http://www.坏网站.中国/新闻",
        f"http://www.{blocklist.punycode('坏网站.中国')}/", "http://坏网站。中国/",
        "mailto:a@bad.example", "not a url", "",
    ]  # fmt: skip
    found = judge(urls, domains=[str(path)], words="none")
    assert [reason == "domain" for reason in found] == [
        True, True, True, True, False, False, False, True, True, True, True, False, False, False,
    ]  # fmt: skip
    assert judge(["http://a.shop.example/"], extra_domains=["shop.example"]) == ["domain"]


def test_a_large_list_is_eight_bytes_a_line(tmp_path: Path) -> None:
    path = tmp_path / "many.txt"
    path.write_text("".join(f"site{i}.example.com\n" for i in range(300_000)))
    table = blocklist.hashes([str(path)], (), True)
    assert (table.nbytes, bool(np.all(table[1:] > table[:-1]))) == (300_000 * 8, True)
    assert judge(["http://site299999.example.com/a", "http://site300000.example.com/a"], domains=[str(path)]) == ["domain", None]
    path.write_text("example.com\n")
    assert judge(["http://site300000.example.com/a"], domains=[str(path)]) == ["domain"], "a changed list is read again"
    path.write_text("x" * (3 << 20))
    with pytest.raises(ValueError, match="one entry a line"):
        judge(["http://a.example"], domains=[str(path)])


def test_whole_addresses_and_substrings(tmp_path: Path) -> None:
    path = tmp_path / "urls.txt"
    path.write_text("example.com/spam/page\n")
    urls = ["https://example.com/spam/page/", "http://example.com/spam/page#top", "http://example.com/spam/page2", None]
    assert judge(urls, addresses=[str(path)]) == ["address", "address", None, None]
    assert judge(["http://x.example/a/TAG/b", "http://x.example/标签/"], substrings=["/tag/", "标签"]) == ["substring"] * 2
    assert judge(["http://8.8.8.8/x", "http://[2001:db8::1]/", None, "http://a.example"], ip_hosts="drop", missing="drop") == [
        "ip_host", "ip_host", "missing", None,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("http://www.free-porn.example/", "hard_word"),
        ("http://x.example/nude/sexy-photos", "soft_words"),
        ("http://x.example/sex-education", None),
        ("http://www.essex.gov.uk/sussex/middlesex", None),
        ("http://x.example/cockpit/assessment/analysis", None),
        ("http://x.example/f-r-e-e.p-o-r-n", "joined_word"),
        ("http://x.example/成人视频/1", "joined_word"),
        ("http://x.example/%E6%88%90%E4%BA%BA%E8%A7%86%E9%A2%91/1", "joined_word"),
        ("http://x.example/成人高考/2024", None),
        ("http://news.example.cn/2024/0102/c1001-1.html", None),
        ("https://zh.wikipedia.org/wiki/%E4%B8%AD%E5%9B%BD", None),
    ],
)
def test_packaged_words(url: str, reason: str | None) -> None:
    assert judge([url]) == [reason]
    assert judge([url], words="none") == [None]


def test_a_reject_names_the_rule_and_replays_with_another_threshold() -> None:
    table = pa.table(
        {"id": ["1", "2"], "text": ["a", "b"], "source": ["s"] * 2, "url": ["http://x.example/nude/sexy", "http://y.example/"]}
    )
    result = Chain([{"filter_urls": {}}], measure="all").run(table)
    (reject,) = result.rejects[0].to_pylist()
    assert (reject["reason"], reject["value"], reject["detail"]) == ("soft_words", 2.0, "nude, sexy in http://x.example/nude/sexy")
    strict, loose = FilterUrls(soft_words=1), FilterUrls(soft_words=3)
    scores = strict.measure(table)
    assert strict.measured_as() == loose.measured_as()
    assert loose.decide(table, scores)[0].to_pylist() == [None, None]
    domain = FilterUrls(extra_domains=["y.example"]).process(table)
    assert domain.detail is not None and domain.detail.to_pylist()[1] == "y.example in http://y.example/"


def test_any_text_is_an_address_that_is_judged() -> None:
    odd = [
        "http://",
        "://",
        "http://[",
        "http://a b/",
        "http://%zz/",
        "http://xn--/",
        "\x00",
        "http://" + "a." * 2000,
        "h" * 100_000,
        "http://..。./",
    ]
    assert judge(odd, extra_domains=["z.example"], ip_hosts="drop")[1] is None
