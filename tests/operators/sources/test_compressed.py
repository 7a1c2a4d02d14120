"""Compressed JSONL: streamed, and read up to a break."""

from __future__ import annotations

import bz2
import gzip
import lzma
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
import zstandard

from tests.operators.sources.reading import read_all

ROWS = [b'{"id": "%d", "text": "row %d %s"}' % (number, number, bytes(str(number * 7919) * 20, "ascii")) for number in range(4000)]
DATA = b"\n".join(ROWS) + b"\n"


def zstd_frames(data: bytes) -> bytes:
    compressor = zstandard.ZstdCompressor(write_checksum=True)
    half = len(data) // 2
    return compressor.compress(data[:half]) + compressor.compress(data[half:])


def bzip2(data: bytes) -> bytes:
    return bz2.compress(data, 1)  # blocks of 100 kB: nothing of a block can be read before its end


def lz4_frame(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "lz4") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


CODECS: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress, "bz2": bzip2, "xz": lzma.compress, "zst": zstd_frames, "lz4": lz4_frame,
}  # fmt: skip


@pytest.mark.parametrize("suffix", CODECS)
def test_whole_files_read_like_plain_ones_with_the_same_ids(tmp_path: Path, suffix: str) -> None:
    no_ids = b'{"text": "one"}\n{"text": "\xe4\xba\x8c"}\n' * 3
    (tmp_path / "a.jsonl").write_bytes(no_ids)
    (tmp_path / f"a.jsonl.{suffix}").write_bytes(CODECS[suffix](no_ids))
    plain, packed = read_all("a.jsonl", tmp_path), read_all(f"a.jsonl.{suffix}", tmp_path)
    assert packed.texts == plain.texts
    assert len(set(packed.ids)) == 6
    (tmp_path / f"b.jsonl.{suffix}").write_bytes(CODECS[suffix](DATA))
    assert read_all(f"b.jsonl.{suffix}", tmp_path).ids == [str(number) for number in range(4000)]


@pytest.mark.parametrize("suffix", CODECS)
def test_a_truncated_file_gives_its_rows_up_to_the_break_and_one_bad_row(tmp_path: Path, suffix: str) -> None:
    packed = CODECS[suffix](DATA)
    (tmp_path / f"a.jsonl.{suffix}").write_bytes(packed[: len(packed) * 2 // 3])
    read = read_all(f"a.jsonl.{suffix}", tmp_path)
    assert read.ids == [str(number) for number in range(len(read.ids))]
    assert len(read.ids) > 1000
    assert read.reasons == ["truncated"]
    assert "decompressed bytes" in read.bad[0].detail
    assert read.bad[0].row == len(read.ids)


@pytest.mark.parametrize("suffix", ["gz", "bz2", "xz", "zst"])  # lz4 frames carry no checksum by default
def test_a_corrupt_file_gives_one_bad_row_and_no_invented_text(tmp_path: Path, suffix: str) -> None:
    packed = bytearray(CODECS[suffix](DATA))
    middle = len(packed) * 2 // 3
    packed[middle : middle + 40] = bytes(40)
    (tmp_path / f"a.jsonl.{suffix}").write_bytes(bytes(packed))
    read = read_all(f"a.jsonl.{suffix}", tmp_path)
    assert read.reasons[-1] in ("corrupt", "truncated")
    good = {row["id"]: row["text"] for row in read.rows[: int(len(read.rows) * 0.9)]}
    assert all(text == f"row {key} {str(int(key) * 7919) * 20}" for key, text in good.items())


def test_gzip_members_one_after_the_other_and_zero_padding_are_one_stream(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(DATA[:1000]) + gzip.compress(DATA[1000:]) + bytes(512))
    assert len(read_all("a.jsonl.gz", tmp_path).rows) == 4000


def test_rows_before_the_break_do_not_depend_on_where_the_damage_lies_in_a_block(tmp_path: Path) -> None:
    packed = gzip.compress(DATA)
    counts = []
    for cut in range(len(packed) // 2, len(packed) // 2 + 2000, 500):
        (tmp_path / "a.jsonl.gz").write_bytes(packed[:cut])
        counts.append(len(read_all("a.jsonl.gz", tmp_path).rows))
    assert counts == sorted(counts)
    assert counts[-1] > counts[0]


def test_something_that_is_no_gzip_at_all_is_one_bad_row_and_other_files_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(b"this is not gzip")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(DATA))
    read = read_all("*.gz", tmp_path)
    assert read.reasons == ["corrupt"]
    assert len(read.rows) == 4000
