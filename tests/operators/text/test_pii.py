"""Personal data: precision and recall on a labelled set, credentials, and that nothing is found across rows."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import given, settings
from hypothesis import strategies as st

from operators.chain import Chain
from operators.text import candidates
from operators.text.analysis import text_buffers
from operators.text.pii import KINDS, RedactPii

LABELLED = Path(__file__).parent / "pii_labelled.jsonl"  # made up by a seeded script: valid check digits, hard negatives
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"


def found(texts: list[str], **options: object) -> list[Counter[tuple[str, str]]]:
    """What is replaced in each text, as (kind, what was there)."""
    marks = {kind: f"\ue000{kind}\ue001" for kind in KINDS}
    redacted = RedactPii(placeholders=marks, **options).process(pa.table({"text": texts})).table["text"].to_pylist()
    out = []
    for before, after in zip(texts, redacted, strict=True):
        pieces = re.split("\ue000([a-z_]+)\ue001", after)
        pattern = "(.+?)".join(map(re.escape, pieces[::2])) if len(pieces) > 1 else re.escape(after)
        match = re.fullmatch(pattern, before, re.DOTALL)
        assert match is not None, (before, after)
        out.append(Counter(zip(pieces[1::2], match.groups(), strict=True)))
    return out


def test_precision_and_recall_on_labelled_text() -> None:
    rows = [json.loads(line) for line in LABELLED.read_text("utf-8").splitlines()]
    right, wrong, missed = Counter[str](), Counter[str](), Counter[str]()
    for row, got in zip(rows, found([row["text"] for row in rows]), strict=True):
        wanted = Counter(tuple(item) for item in row["found"])
        for counts, difference in ((right, wanted & got), (wrong, got - wanted), (missed, wanted - got)):
            for (kind, _), times in difference.items():
                counts[kind] += times
    for kind in ("email", "phone", "resident_id", "card", "ip"):
        precision = right[kind] / (right[kind] + wrong[kind])
        recall = right[kind] / (right[kind] + missed[kind])
        assert (precision >= 0.98, recall >= 0.98) == (True, True), (kind, precision, recall)


def credentials(generator: random.Random) -> dict[str, str]:
    """One of each shape. Put together here, so that no file holds anything that looks like a live key."""

    def some(size: int, letters: str = LETTERS + "0123456789") -> str:
        return "".join(generator.choice(letters) for _ in range(size))

    return {
        "AKIA" + some(16, "ABCDEFGHIJKLMNOP234567"): "aws key {}",
        "ghp" + "_" + some(36): "export TOKEN={} # github",
        "xox" + "b-" + some(12, "0123456789") + "-" + some(24): "slack: {}",
        "AI" + "za" + some(35): "maps.js?key={}&x=1",
        "sk" + "_live_" + some(24): "stripe {}.",
        "sk" + "-proj-7" + some(47): "密钥是{}，不要泄露",
        "hf" + "_" + some(34, LETTERS): "login {}",
        "ey" + "J" + some(30) + ".ey" + "J" + some(60) + "." + some(43): "Authorization: Bearer {}",
        "-----BEGIN RSA PRIVATE" + " KEY-----\n" + some(64) + "\n-----END RSA PRIVATE" + " KEY-----": "key file:\n{}\n",
        "s3cret!" + some(8): "postgres://app:{}@db.example.com/x",
        "7a" + some(30): 'api_key = "{}"',
        "9Zq" + some(37): "aws_secret_access_key={}",
        "4f" + some(22): "密码：{}",
    }


def test_credentials_are_found_and_what_only_looks_like_one_is_not() -> None:
    generator = random.Random(3)
    for secret, sentence in credentials(generator).items():
        assert found([sentence.format(secret)]) == [Counter({("api_key", secret): 1})], sentence
    harmless = [
        "api_key = YOUR_API_KEY_GOES_HERE_1234567",
        "password: correct horse battery staple",
        "token = tokenizer.encode_plus_special_tokens(text)",
        "secret_key_base: <%= ENV['SECRET_KEY_BASE'] %>",
        "key: value_of_the_configuration_entry",
        "commit 9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
        "sk-learn and sk-image-processing-tools",
        "密码：请联系管理员",
        "see https://example.com:8080/path@v2",
        "AKIA is a prefix; eyJ too",
    ]
    assert found(harmless) == [Counter()] * len(harmless)


def test_nothing_is_put_together_across_rows() -> None:
    texts = ["138", "00138000", "x@", "example.com", "8.8.", "8.8", "4111 1111 1111", " 1111", "+", "8613800138000"]
    assert found(texts)[:9] == [Counter()] * 9
    assert found(["1", "13800138000", "2"])[1] == Counter({("phone", "13800138000"): 1})


def test_dropping_leaves_texts_alone_and_tells_what_was_found() -> None:
    table = pa.table({"id": ["a", "b"], "text": ["write to a@example.com or 13800138000", "无事"], "source": ["s", "s"]})
    result = Chain([{"redact_pii": {"action": "drop"}}]).run(table)
    assert result.kept["id"].to_pylist() == ["b"]
    (reject,) = result.rejects[0].to_pylist()
    assert (reject["reason"], reject["value"], reject["detail"]) == ("pii", 2.0, "email 1, phone 1")
    assert result.funnel["00:redact_pii"]["counts"] == {"email": 1, "phone": 1}
    assert (
        Chain([{"redact_pii": {"action": "drop", "max_count": 2}}]).run(table).kept["text"].to_pylist() == table["text"].to_pylist()
    )


def test_technical_documentation_keeps_its_numbers(data_pack: Path) -> None:
    texts = pq.read_table(data_pack / "corpus" / "zh.parquet", columns=["text"])["text"].slice(0, 1500)
    verdict = RedactPii().process(pa.table({"text": texts}))
    counts = verdict.counts or {}
    assert counts.get("card", 0) + counts.get("resident_id", 0) <= 2
    assert sum(counts.values()) < 500


@settings(max_examples=150, deadline=None)
@given(st.lists(st.text(st.sampled_from("0123456789.:@-+ ()aFz_中\u0301"), max_size=40), max_size=4))
def test_candidates_hold_whatever_a_plain_search_finds(texts: list[str]) -> None:
    data, offsets = text_buffers(pa.array(texts, pa.large_string()))
    rows, starts, ends, kinds = candidates.find(data, offsets)
    spans = [
        (row, start - offsets[row], end - offsets[row], kind)
        for row, start, end, kind in zip(rows, starts, ends, kinds, strict=True)
    ]
    patterns = {
        candidates.NUMBER: rb"\d(?:[ ().+-]?\d){6,}|\d+\.\d+\.\d+\.\d+",
        candidates.COLONS: rb"[0-9A-Fa-f]+:[0-9A-Fa-f]*:[0-9A-Fa-f]*",
        candidates.AT: rb"[A-Za-z0-9._%+-]+@[A-Za-z0-9.-]{3,}",
    }
    for row, text in enumerate(texts):
        for kind, pattern in patterns.items():
            for match in re.finditer(pattern, text.encode()):
                start, end = match.span()
                if kind == candidates.COLONS and not re.search(rb"\d", match.group()):
                    continue  # an address without one decimal digit is taken for words: `F::`, `dead:beef::`
                assert any(r == row and k == kind and s <= start and e >= end for r, s, e, k in spans), (text, match)
