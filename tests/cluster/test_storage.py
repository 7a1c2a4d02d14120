from __future__ import annotations

import hashlib
import multiprocessing
import os
from pathlib import Path

import pytest

from cluster import storage


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in (
        "a.parquet", "b.jsonl", "sub/a.parquet", "sub/deep/a.parquet", "sub/10.txt", "sub/9.txt", "中文/页面 1.warc.gz",
        ".hidden/a.parquet", "_tmp/a.parquet", "sub/.a.parquet", "a+(1).parquet",
    ):  # fmt: skip
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    return tmp_path


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("*.parquet", ["a+(1).parquet", "a.parquet"]),
        ("a.parquet", ["a.parquet"]),
        ("?.parquet", ["a.parquet"]),
        ("[ab].*", ["a.parquet", "b.jsonl"]),
        ("[!b].parquet", ["a.parquet"]),
        ("a+(*).parquet", ["a+(1).parquet"]),
        ("**/a.parquet", ["a.parquet", "sub/a.parquet", "sub/deep/a.parquet"]),
        ("*/a.parquet", ["sub/a.parquet"]),
        ("sub/**", ["sub/10.txt", "sub/9.txt", "sub/a.parquet", "sub/deep/a.parquet"]),
        ("中文/*.warc.gz", ["中文/页面 1.warc.gz"]),
    ],
)
def test_a_glob_finds_what_it_names_in_order_and_a_star_stops_at_a_slash(tree: Path, pattern: str, found: list[str]) -> None:
    entries = storage.list_files(f"{tree}/{pattern}")
    assert [os.path.relpath(entry.path, tree) for entry in entries] == found
    assert all(entry.size == os.path.getsize(entry.path) and entry.mtime_ns > 0 for entry in entries)


def test_a_directory_is_listed_whole_without_hidden_names_and_a_uri_behaves_as_the_path(tree: Path) -> None:
    names = [entry.relative for entry in storage.list_files(str(tree))]
    assert names == sorted(names)
    assert "sub/deep/a.parquet" in names
    assert not [name for name in names if name.startswith((".", "_")) or "/." in name]
    assert [entry.relative for entry in storage.list_files(f"file://{tree}")] == names


def test_a_pattern_that_matches_nothing_is_named(tree: Path) -> None:
    for pattern in ("*.zst", "nowhere", "nowhere/*.parquet"):
        with pytest.raises(FileNotFoundError, match=pattern.replace("*", r"\*")):
            storage.list_files(f"{tree}/{pattern}")


def test_an_unknown_scheme_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing://x"):
        storage.resolve("nothing://x/y")


def _create(path: str, number: int, start: multiprocessing.synchronize.Event, won: multiprocessing.Queue[int]) -> None:
    start.wait()
    if storage.create_if_absent(path, str(number).encode() * 10_000):
        won.put(number)


def test_of_many_processes_that_create_one_file_one_wins_and_its_content_is_whole(tmp_path: Path) -> None:
    spawn = multiprocessing.get_context("spawn")
    for turn in range(2):
        path = str(tmp_path / "units" / f"{turn}.json")
        start, won = spawn.Event(), spawn.Queue()
        processes = [spawn.Process(target=_create, args=(path, number, start, won)) for number in range(4)]
        for process in processes:
            process.start()
        start.set()
        for process in processes:
            process.join(60)
            assert process.exitcode == 0
        winner = won.get(timeout=5)
        assert won.empty()
        assert storage.read_bytes(path) == str(winner).encode() * 10_000
        assert os.listdir(tmp_path / "units") == [f"{number}.json" for number in range(turn + 1)] or turn


def test_a_file_is_created_once_and_written_again_whole(tmp_path: Path) -> None:
    path = str(tmp_path / "deep" / "record.json")
    assert storage.create_if_absent(path, b"first")
    assert not storage.create_if_absent(path, b"second")
    assert storage.read_bytes(path) == b"first"
    storage.write_bytes(path, b"third, which is longer")
    assert storage.read_bytes(path) == b"third, which is longer"
    assert os.listdir(tmp_path / "deep") == ["record.json"]
    assert storage.size(path) == 22
    assert storage.sha256_of(path) == hashlib.sha256(b"third, which is longer").hexdigest()


def test_a_scratch_file_takes_its_name_when_published(tmp_path: Path) -> None:
    scratch = storage.scratch_file(str(tmp_path))
    Path(scratch).write_bytes(b"\x00" * 10)
    assert not storage.exists(str(tmp_path / "parts" / "x.bin"))
    storage.publish(scratch, str(tmp_path / "parts" / "x.bin"))
    assert storage.read_bytes(str(tmp_path / "parts" / "x.bin")) == b"\x00" * 10
    assert not os.path.exists(scratch)


def test_delete_takes_files_trees_and_what_is_not_there(tree: Path) -> None:
    storage.delete(str(tree / "sub"))
    storage.delete(str(tree / "a.parquet"))
    storage.delete(str(tree / "never"))
    assert not (tree / "sub").exists()
    assert not storage.exists(str(tree / "a.parquet"))
    with pytest.raises(FileNotFoundError):
        storage.size(str(tree / "a.parquet"))


def test_paths_and_uris_join_alike() -> None:
    assert storage.join("s3://bucket/run/", "/stage", "x") == "s3://bucket/run/stage/x"
    assert storage.join("/", "x") == "//x" or storage.join("/", "x") == "/x"
    assert storage.absolute("s3://b/x", "/base") == "s3://b/x"
    assert storage.absolute("/x", "/base") == "/x"
    assert storage.absolute("x/y", "/base") == "/base/x/y"
    assert storage.is_remote("hdfs://n/x")
    assert not storage.is_remote("file:///x")
    assert storage.local_path("file:///x/y") == Path("/x/y")
    with pytest.raises(ValueError, match="s3://b/x"):
        storage.local_path("s3://b/x")
