"""WARC: whole, damaged, and with every coding that HTTP allows."""

from __future__ import annotations

import gzip
import random
import zlib
from pathlib import Path

import brotli
import pytest
import zstandard

from tests.operators.sources.reading import Reading, read_all

PAGE = "<html><body><p>第一段 first paragraph</p></body></html>".encode()


def record(
    number: int,
    body: bytes = PAGE,
    headers: bytes = b"",
    kind: bytes = b"response",
    content_type: bytes = b"application/http; msgtype=response",
    length_error: int = 0,
) -> bytes:
    http = b"HTTP/1.1 200 OK\r\nContent-Type: text/html; charset=GB2312\r\n" + headers + b"\r\n" + body
    block = http if content_type.startswith(b"application/http") else body
    return (
        b"WARC/1.1\r\nWARC-Type: %s\r\nWARC-Record-ID: <urn:uuid:r%d>\r\nWARC-Target-URI: http://example.org/%d\r\n"
        b"WARC-Date: 2024-01-01T00:00:00Z\r\nContent-Type: %s\r\nContent-Length: %d\r\n\r\n"
        % (kind, number, number, content_type, len(block) + length_error)
    ) + block + b"\r\n\r\n"  # fmt: skip


def read_records(folder: Path, records: list[bytes], packed: bool, **settings: object) -> Reading:
    name = "pages.warc.gz" if packed else "pages.warc"
    data = b"".join(gzip.compress(item, mtime=0) if not item.startswith(b"\x1f\x8b") and packed else item for item in records)
    (folder / name).write_bytes(data)
    return read_all(name, folder, **settings)


both = pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzip"])


@both
def test_pages_come_with_address_type_charset_and_the_records_own_id(tmp_path: Path, packed: bool) -> None:
    read = read_records(tmp_path, [record(0), record(1)], packed)
    assert read.ids == ["r0", "r1"]
    assert read.rows[1] == {
        "id": "r1", "content": PAGE, "content_type": "text/html", "charset": "gb2312", "source": "pages", "url": "http://example.org/1",
    }  # fmt: skip


def test_other_records_are_no_rows_and_resources_and_conversions_are(tmp_path: Path) -> None:
    records = [
        record(0, kind=b"warcinfo", content_type=b"application/warc-fields"),
        record(1, kind=b"request", content_type=b"application/http; msgtype=request"),
        record(2, kind=b"resource", content_type=b"text/html;charset=utf-8"),
        record(3, "纯文本".encode(), kind=b"conversion", content_type=b"text/plain"),
        record(4, b"", content_type=b"image/png", kind=b"resource"),
    ]
    read = read_records(tmp_path, records, True)
    assert [(row["id"], row["content_type"], row["charset"]) for row in read.rows] == [
        ("r2", "text/html", "utf-8"), ("r3", "text/plain", "utf-8"), ("r4", "image/png", None),
    ]  # fmt: skip


def test_wet_files_give_text(tmp_path: Path) -> None:
    records = [record(0, "纯文本".encode(), kind=b"conversion", content_type=b"text/plain"), record(1, b"\xff", kind=b"conversion")]
    (tmp_path / "a.warc.wet.gz").write_bytes(b"".join(map(gzip.compress, records)))
    read = read_all("a.warc.wet.gz", tmp_path)
    assert read.texts == ["纯文本"]
    assert read.reasons == ["invalid_utf8"]


def zstd_file(records: list[bytes], dictionary: str) -> bytes:
    """Each record a frame, after a frame with a dictionary that is `none`, `plain` or `packed`."""
    plain = zstandard.ZstdCompressor(write_checksum=True)
    if dictionary == "none":
        return b"".join(map(plain.compress, records))
    chance = random.Random(1)
    trained = zstandard.train_dictionary(2000, [record(i, f"<p>第 {i} 页 {chance.random()}</p>".encode()) for i in range(2000)])
    content = trained.as_bytes() if dictionary == "plain" else plain.compress(trained.as_bytes())
    packed = zstandard.ZstdCompressor(dict_data=trained, write_checksum=True)
    head = (0x184D2A5D).to_bytes(4, "little") + len(content).to_bytes(4, "little") + content
    return head + b"".join(map(packed.compress, records))


@pytest.mark.parametrize("dictionary", ["none", "plain", "packed"])
def test_zstd_files_are_read_and_read_on_after_damage(tmp_path: Path, dictionary: str) -> None:
    bodies = [random.Random(number).randbytes(400).hex().encode() for number in range(6)]
    data = bytearray(zstd_file([record(number, body) for number, body in enumerate(bodies)], dictionary))
    (tmp_path / "a.warc.zst").write_bytes(data)
    whole = read_all("a.warc.zst", tmp_path)
    assert [row["content"] for row in whole.rows] == bodies
    wound = len(data) - 1300  # every record compresses to about half of 800 characters
    data[wound : wound + 20] = bytes(20)
    (tmp_path / "a.warc.zst").write_bytes(data)
    read = read_all("a.warc.zst", tmp_path)
    assert read.ids == ["r0", "r1", "r2", "r3", "r5"]
    assert set(read.reasons) == {"broken_record"}


CODINGS = {
    b"Content-Encoding: gzip\r\n": gzip.compress(PAGE),
    b"content-encoding: X-GZIP\r\n": gzip.compress(PAGE),
    b"Content-Encoding: deflate\r\n": zlib.compress(PAGE),
    b"Content-Encoding: br\r\n": brotli.compress(PAGE),
    b"Content-Encoding: gzip, br\r\n": brotli.compress(gzip.compress(PAGE)),
    b"Transfer-Encoding: chunked\r\n": b"5;x=y\r\n%s\r\n%x\r\n%s\r\n0\r\n\r\n" % (PAGE[:5], len(PAGE) - 5, PAGE[5:]),
    b"Transfer-Encoding: chunked\r\nContent-Encoding: identity\r\n": PAGE,  # stored unchunked, header kept
    b"Content-Encoding: gzip\r\nX: stored decoded\r\n": PAGE,
}


@pytest.mark.parametrize("header", CODINGS)
def test_transfer_and_content_coding_are_removed(tmp_path: Path, header: bytes) -> None:
    read = read_records(tmp_path, [record(0, CODINGS[header], header)], True)
    assert [row["content"] for row in read.rows] == [PAGE]


BROKEN_CODINGS = {
    b"Content-Encoding: gzip\r\n": gzip.compress(PAGE)[:-12],
    b"Content-Encoding: deflate\r\n": b"\x78\x9cnonsense",
    b"Content-Encoding: br\r\n": brotli.compress(PAGE * 50)[:-4],
    b"Content-Encoding: zstd-of-tomorrow\r\n": PAGE,
    b"Transfer-Encoding: chunked\r\n": b"40\r\ntoo short",
}


@pytest.mark.parametrize("header", BROKEN_CODINGS)
def test_a_body_that_cannot_be_decoded_is_set_aside_alone(tmp_path: Path, header: bytes) -> None:
    read = read_records(tmp_path, [record(0), record(1, BROKEN_CODINGS[header], header), record(2)], True)
    assert (read.ids, read.reasons, read.bad[0].id) == (["r0", "r2"], ["bad_encoding"], "r1")


@pytest.mark.parametrize("coding", ["gzip", "deflate", "br"])
def test_a_decompression_bomb_is_stopped_at_the_limit(tmp_path: Path, coding: str) -> None:
    bomb = {"gzip": gzip.compress, "deflate": zlib.compress, "br": lambda data: brotli.compress(data, quality=1)}[coding](
        bytes(30_000_000)
    )
    read = read_records(
        tmp_path, [record(0, bomb, b"Content-Encoding: %s\r\n" % coding.encode()), record(1)], True, max_text_bytes=100_000
    )
    assert (read.ids, read.reasons) == (["r1"], ["too_long"])


def test_a_page_over_the_limit_is_set_aside(tmp_path: Path) -> None:
    read = read_records(
        tmp_path, [record(0, b"x" * 2001), record(1, b"x" * 2000), record(2, b"x" * 3_000_000)], True, max_text_bytes=2000
    )
    assert (read.ids, read.reasons) == (["r1"], ["too_long", "too_long"])


def holed(packed: bool) -> bytes:
    data = bytearray(gzip.compress(record(2), mtime=0) if packed else record(2))
    start = len(data) // 2 if packed else 0
    data[start : start + 20] = bytes(20)
    return bytes(data)


@both
@pytest.mark.parametrize("damage", ["hole", "cut", "garbage", "no length"])
def test_reading_goes_on_at_the_next_record_after_damage(tmp_path: Path, packed: bool, damage: str) -> None:
    broken = {
        "hole": holed(packed),
        "cut": gzip.compress(record(2))[:60] if packed else record(2)[:150],
        "garbage": b"\x1f\x8b but no gzip" if packed else b"something else\r\n\r\n",
        "no length": record(2).replace(b"Content-Length", b"Content-Langth"),
    }[damage]
    read = read_records(tmp_path, [record(0), record(1), broken, record(3), record(4)], packed)
    assert read.ids == ["r0", "r1", "r3", "r4"]
    assert read.reasons[-1] == "broken_record"
    assert "bytes" in read.bad[-1].where
    assert len(read.bad) <= 2  # the cut record itself, and the stretch in which none can be read


@both
@pytest.mark.parametrize("error", [-5, 10])
def test_a_wrong_length_costs_no_other_record(tmp_path: Path, packed: bool, error: int) -> None:
    read = read_records(tmp_path, [record(0), record(1, length_error=error), record(2)], packed)
    assert [name for name in read.ids if name != "r1"] == ["r0", "r2"]
    assert read.reasons == ["broken_record"]


@both
def test_a_file_that_ends_inside_a_record_keeps_the_records_before(tmp_path: Path, packed: bool) -> None:
    last = gzip.compress(record(2))[:-25] if packed else record(2)[:-30]
    read = read_records(tmp_path, [record(0), record(1), last], packed)
    assert (read.ids, read.reasons) == (["r0", "r1"], ["truncated"])
    assert "promises" in read.bad[0].detail


def test_a_file_without_any_record_is_one_bad_row(tmp_path: Path) -> None:
    (tmp_path / "a.warc").write_bytes(b"no web archive\n" * 50)
    assert read_all("a.warc", tmp_path).reasons == ["broken_record"]


@both
def test_whatever_bytes_are_damaged_few_records_are_lost_and_reading_ends(tmp_path: Path, packed: bool) -> None:
    chance = random.Random(17)
    whole = [record(number, chance.randbytes(chance.randrange(1000, 4000)).hex().encode()) for number in range(30)]
    data = b"".join(map(gzip.compress, whole)) if packed else b"".join(whole)
    path = tmp_path / ("pages.warc.gz" if packed else "pages.warc")
    for _ in range(40):
        damaged = bytearray(data)
        for _ in range(chance.choice([1, 3])):
            place = chance.randrange(len(damaged))
            damaged[place : place + chance.choice([1, 50, 900])] = chance.randbytes(chance.choice([0, 1, 60]))
        path.write_bytes(damaged)
        read = read_all(path)  # checks that row numbers are dense
        # Each of at most three wounds reaches into two records; more only if it makes a length longer.
        assert len(set(read.ids)) >= 22
        assert len(read.bad) <= 6


def test_files_of_several_crawlers(data_pack: Path) -> None:
    counts = {
        "chatnoir-resiliparse-warcfile.warc.gz": 16,
        "chatnoir-resiliparse-warcfile.warc.lz4": 16,
        "dolma-sample-0000.warc.gz": 24,
        "warcio-example.warc.gz": 1,
    }
    for name, count in counts.items():
        read = read_all(data_pack / "warc" / name, format="warc")
        assert (len(read.rows), read.bad) == (count, [])


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_a_real_crawl_cut_short_gives_what_came_before(data_pack: Path, tmp_path: Path, share: float) -> None:
    data = (data_pack / "warc" / "dolma-sample-0000.warc.gz").read_bytes()
    whole = read_all(data_pack / "warc" / "dolma-sample-0000.warc.gz")
    (tmp_path / "dolma-sample-0000.warc.gz").write_bytes(data[: int(len(data) * share)])
    cut = read_all(tmp_path / "dolma-sample-0000.warc.gz")
    assert cut.rows == whole.rows[: len(cut.rows)]
    assert len(cut.rows) > 0
    assert len(cut.bad) <= 1


def test_a_real_crawl_with_a_hole_loses_only_the_records_it_touches(data_pack: Path, tmp_path: Path) -> None:
    data = bytearray((data_pack / "warc" / "dolma-sample-0000.warc.gz").read_bytes())
    data[len(data) // 2 : len(data) // 2 + 100] = bytes(100)
    (tmp_path / "dolma-sample-0000.warc.gz").write_bytes(data)
    whole, read = read_all(data_pack / "warc" / "dolma-sample-0000.warc.gz"), read_all(tmp_path / "dolma-sample-0000.warc.gz")
    assert len(set(whole.ids) - set(read.ids)) == 1
    assert read.reasons in (["broken_record"], ["broken_record", "broken_record"])
