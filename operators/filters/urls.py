"""Documents judged by their address: lists of domains, addresses and words, adult words, hosts without a name.

The rules are those of RefinedWeb and FineWeb (Penedo et al. 2023, appendix G.1; datatrove's URLFilter): a listed domain or
address; a word that is enough by itself; several words that are not; a string of letters in the address without its signs.
The packaged words (url_words.json) are our own and few: for a crawl bring lists of domains, for instance the UT1 lists that
FineWeb uses (CC BY-SA 4.0, Université Toulouse 1).

200,000 addresses a second on one core of a busy machine with a list of two million domains, which takes 3.5 s to read once.
"""

from __future__ import annotations

import functools
import json
import re
import urllib.parse
from importlib import resources
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from cluster import storage
from operators.config import Settings
from operators.filters import blocklist
from operators.operator import Filter, Verdict
from operators.text.analysis import Analysis, text_buffers
from operators.text.words import hash_text

_PACKAGED = str(resources.files(__package__).joinpath("url_words.json"))
_HOST = r"^\s*(?:[A-Za-z][A-Za-z0-9+.\-]*:)?//(?:[^/?#@]*@)?(?P<host>\[[0-9A-Fa-f:.]*\]|[^/?#:\\]*)"
_IP_HOST = r"^(?:\d{1,3}(?:\.\d{1,3}){3}|\[.*\]|0x[0-9a-f]{8}|\d{8,10})$"
_TRIMMED = r"^\s*(?:[A-Za-z][A-Za-z0-9+.\-]*:)?//|#.*$|/+\s*$"


class FilterUrlsSettings(Settings):
    """Lists are files of one entry a line (gz, zst, xz, bz2 too); several are read as one."""

    domains: list[str] = Field(default=[], description="files of domains; hosts files and ad blockers' lists are understood")
    extra_domains: list[str] = Field(default=[], description="domains given here; each blocks all hosts below it")
    addresses: list[str] = Field(default=[], description="files of whole addresses; scheme, fragment and last slash do not count")
    substrings: list[str] = Field(default=[], description="strings that no address may hold, as they stand, in any case")
    words: str = Field(
        default="packaged", description="JSON file {hard, soft, joined, chinese: [...]} of adult words; `packaged` or `none`"
    )
    soft_words: int = Field(default=2, ge=1, description="so many different soft words in an address reject it")
    ip_hosts: Literal["keep", "drop"] = Field(default="keep", description="addresses whose host is a number")
    missing: Literal["keep", "drop"] = Field(default="keep", description="documents without an address")


class FilterUrls(Filter):
    """Reject documents by their `url`: reasons missing, domain, address, ip_host, substring, hard_word, soft_words, joined_word.

    The value is the number of words for soft_words, else 1; the detail names the rule that matched and the address.
    """

    name: ClassVar[str] = "filter_urls"
    settings = FilterUrlsSettings
    needs = ("url",)
    uses_analysis = False
    reads = ()
    decide_options = frozenset({"soft_words", "ip_hosts", "missing"})

    def files(self) -> list[str]:
        words = {"packaged": [_PACKAGED], "none": []}.get(self.config.words, [self.config.words])
        return [*self.config.domains, *self.config.addresses, *words]

    def measure(self, table: pa.Table, analysis: Analysis | None = None) -> dict[str, pa.Array]:
        """int32 columns by reason: 1 where the rule holds; `soft_words` counts."""
        urls = _text(table["url"])
        lowered, hosts = _readable(urls), _hosts(urls)
        lists = self._lists()
        pattern = _alternatives(tuple(self.config.substrings))
        found = {
            "missing": pc.equal(pc.binary_length(pc.utf8_trim_whitespace(urls)), 0),
            "domain": pa.array(blocklist.listed_suffix(*text_buffers(hosts), lists["domains"]) >= 0),
            "address": pa.array(blocklist.listed(*text_buffers(_trimmed(urls)), lists["addresses"])),
            "ip_host": pc.match_substring_regex(hosts, _IP_HOST),
            "substring": pc.match_substring_regex(lowered, pattern) if pattern else pa.array(np.zeros(len(urls), bool)),
            "hard_word": pa.array(blocklist.count_words(*text_buffers(lowered), lists["hard"]) > 0),
            "soft_words": pa.array(blocklist.count_words(*text_buffers(lowered), lists["soft"])),
            "joined_word": self._joined(lowered),
        }
        return {name: column.cast(pa.int32()) for name, column in found.items()}

    def decide(self, table: pa.Table, scores: dict[str, pa.Array]) -> tuple[pa.Array, pa.Array]:
        names = ["missing", "domain", "address", "ip_host", "substring", "hard_word", "soft_words", "joined_word"]
        limits = {"soft_words": self.config.soft_words}
        off = {name for name in ("missing", "ip_hosts") if getattr(self.config, name) == "keep"}
        reason: Any = pa.nulls(len(scores["domain"]), pa.string())
        value: Any = pa.nulls(len(reason), pa.float64())
        for name in reversed(names):  # the first that holds is the reason
            if name in off or name + "s" in off:
                continue
            holds = pc.fill_null(pc.greater_equal(scores[name], limits.get(name, 1)), False)
            reason = pc.if_else(holds, name, reason)
            value = pc.if_else(holds, scores[name].cast(pa.float64()), value)
        return reason, value

    def process(self, table: pa.Table, analysis: Analysis | None = None) -> Verdict:
        verdict = super().process(table, analysis)
        assert verdict.reason is not None
        detail: list[str | None] = [None] * table.num_rows
        reasons = verdict.reason.to_pylist()
        for row in np.flatnonzero(pc.is_valid(verdict.reason).to_numpy(zero_copy_only=False)).tolist():  # sparse: the rejected
            detail[row] = self._matched(reasons[row], table["url"][row].as_py() or "")
        return Verdict(verdict.table, verdict.reason, verdict.value, verdict.scores, pa.array(detail, pa.string()))

    def _lists(self) -> dict[str, np.ndarray]:
        words = _words(self.config.words)
        return {
            "domains": blocklist.hashes(self.config.domains, self.config.extra_domains, True),
            "addresses": blocklist.hashes(self.config.addresses, (), False),
            **{kind: np.array(sorted(hash_text(word) for word in words[kind]), np.uint64) for kind in ("hard", "soft")},
        }

    def _joined(self, lowered: pa.Array) -> pa.Array:
        words = _words(self.config.words)
        found = pa.array(np.zeros(len(lowered), bool))
        if pattern := _alternatives(words["joined"]):
            found = pc.match_substring_regex(pc.replace_substring_regex(lowered, "[^a-z0-9]+", ""), pattern)
        if pattern := _alternatives(words["chinese"]):
            found = pc.or_(found, pc.match_substring_regex(lowered, pattern))
        return found

    def _matched(self, reason: str, url: str) -> str:
        """What of the lists an address matched, and the address."""
        one = pa.array([url], pa.large_string())
        lowered, words = _readable(one)[0].as_py(), _words(self.config.words)
        found: list[str] = []
        if reason in ("domain", "ip_host"):
            host = _hosts(one)[0].as_py()
            start = blocklist.listed_suffix(*text_buffers(pa.array([host], pa.large_string())), self._lists()["domains"])[0]
            found = [host[max(start, 0) :]]
        elif reason == "substring":
            found = [item for item in self.config.substrings if item.lower() in lowered][:1]
        elif reason in ("hard_word", "soft_words"):
            kind = reason.split("_")[0]
            found = sorted(set(re.findall(r"[a-z0-9]+", lowered)) & set(words[kind]))
        elif reason == "joined_word":
            together = re.sub("[^a-z0-9]+", "", lowered)
            found = [word for word in words["joined"] if word in together] + [
                word for word in words["chinese"] if word.lower() in lowered
            ]
        return f"{', '.join(found)} in {url}" if found else url


def _text(column: pa.ChunkedArray) -> pa.Array:
    array: Any = column.cast(pa.large_string()).combine_chunks()
    array = array if isinstance(array, pa.Array) else pa.concat_arrays([*array.chunks, pa.array([], pa.large_string())])
    return array.fill_null("")


def _readable(urls: pa.Array) -> pa.Array:
    """Lower case, with %-escapes and punycode as the characters that they stand for."""
    lowered = pc.utf8_lower(urls)
    escaped = pc.match_substring_regex(lowered, "%[0-9a-f]{2}|xn--").to_numpy(zero_copy_only=False)
    if not escaped.any():
        return lowered
    plain = lowered.to_pylist()
    for row in np.flatnonzero(escaped).tolist():  # sparse: those with escapes
        plain[row] = _XN.sub(_unicode, urllib.parse.unquote(plain[row], errors="replace")).lower()
    return pa.array(plain, pa.large_string())


_XN = re.compile(r"xn--[a-z0-9\-]+")


def _unicode(label: re.Match[str]) -> str:
    try:
        return label[0].encode("ascii").decode("idna")
    except UnicodeError:  # no punycode: as it stands
        return label[0]


def _hosts(urls: pa.Array) -> pa.Array:
    """The host of each address as `blocklist.punycode` writes it; empty where there is none."""
    found = pc.struct_field(pc.extract_regex(urls, _HOST), "host").fill_null("")
    hosts = pc.utf8_lower(pc.ascii_trim(found, " ."))
    other = pc.invert(pc.string_is_ascii(hosts)).to_numpy(zero_copy_only=False)
    if not other.any():
        return hosts
    plain = hosts.to_pylist()
    for row in np.flatnonzero(other).tolist():  # sparse: names in other scripts
        plain[row] = blocklist.punycode(plain[row])
    return pa.array(plain, pa.large_string())


def _trimmed(urls: pa.Array) -> pa.Array:
    return pc.replace_substring_regex(urls, _TRIMMED, "")


def _alternatives(strings: tuple[str, ...]) -> str | None:
    return "|".join(re.escape(item.lower()) for item in strings) or None


@functools.lru_cache(maxsize=8)
def _words(path: str) -> dict[str, tuple[str, ...]]:
    """The words by kind. Raises ValueError for another shape of JSON."""
    kinds = ("hard", "soft", "joined", "chinese")
    if path == "none":
        return dict.fromkeys(kinds, ())
    where = _PACKAGED if path == "packaged" else path
    try:
        data = json.loads(storage.read_bytes(where))
        return {kind: tuple(str(word).lower() for word in data.get(kind, [])) for kind in kinds}
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{where} must be a JSON object of lists {', '.join(kinds)}: {error}") from error
