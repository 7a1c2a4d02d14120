"""Copies of remote files on a node: fetched once, verified, never half there, never removed while in use."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from operators.tokens import twin
from tests.train.conftest import documents
from train import artifacts, node_cache
from train.loader import PackedTokens, TokenLoader

ROOT = Path(__file__).parents[2]

_PROCESS = """
import os, sys, time
from cluster import storage
from train import artifacts, node_cache
path, log, pause = sys.argv[1], sys.argv[2], float(sys.argv[3])
real = node_cache._download
def watched(file, target):
    with open(log, "a") as stream:
        print(file.name, file=stream)
    return real(file, target)
node_cache._download, node_cache._BLOCK = watched, 1 << 16
class Slow:
    def __init__(self, stream): self.stream = stream
    def __enter__(self): return self
    def __exit__(self, *_): self.stream.close()
    def read(self, size):
        time.sleep(pause)
        return self.stream.read(size)
opened = storage.open_input
storage.open_input = lambda path: Slow(opened(path))
print(artifacts.local_file(path), flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("DANLU_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("DANLU_CACHE_BYTES", raising=False)
    node_cache.release()
    yield tmp_path / "cache"
    node_cache.release()


def store(tmp_path: Path, name: str, size: int, seed: int = 0) -> tuple[str, bytes]:
    """A file of a store that is no local disk to the code under test: (URI, content)."""
    data = np.random.default_rng(seed).bytes(size)
    (tmp_path / "store").mkdir(exist_ok=True)
    (tmp_path / "store" / name).write_bytes(data)
    return f"fsspec+file://{tmp_path}/store/{name}", data


def process(path: str, log: Path, pause: float = 0.0) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", _PROCESS, path, str(log), str(pause)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=dict(os.environ),
    )  # fmt: skip


def test_processes_of_a_node_fetch_once_and_a_killed_download_leaves_no_trace(tmp_path: Path, cache: Path) -> None:
    path, data = store(tmp_path, "tokens.bin", 3 << 20)
    log = tmp_path / "log"
    doomed = process(path, log, 0.05)
    deadline = time.monotonic() + 60
    while not (partial := [file for file in cache.glob("fetched/*/tokens.bin") if file.stat().st_size]):
        assert time.monotonic() < deadline and doomed.poll() is None
        time.sleep(0.01)
    doomed.kill()
    doomed.communicate()
    assert 0 < partial[0].stat().st_size < len(data), "killed in the middle"
    several = [process(path, log, 0.002) for _ in range(3)]
    found = [one.stdout.readline().strip() for one in several if one.stdout]
    assert {Path(name).read_bytes() for name in found} == {data}
    assert log.read_text().split() == ["tokens.bin"] * 2, "the killed download and one more"
    for one in several:
        one.communicate()


@pytest.mark.parametrize("damage", ["truncated", "changed"])
def test_a_damaged_copy_is_fetched_again(tmp_path: Path, damage: str) -> None:
    path, data = store(tmp_path, "tokens.bin", 50_000)
    copy = artifacts.local_file(path)
    node_cache.release()
    copy.write_bytes(data[:-1] if damage == "truncated" else b"x" + data[1:])
    assert artifacts.local_file(path) == copy
    assert copy.read_bytes() == data


def test_damage_that_leaves_size_and_time_is_found_when_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, data = store(tmp_path, "tokens.bin", 50_000)
    copy = artifacts.local_file(path)
    node_cache.release()
    stat = copy.stat()
    copy.write_bytes(b"x" + data[1:])
    os.utime(copy, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    monkeypatch.setenv("DANLU_CACHE_VERIFY", "1")
    assert artifacts.local_file(path).read_bytes() == data


def test_bytes_that_are_not_those_recorded_are_refused_and_not_kept(tmp_path: Path, cache: Path) -> None:
    path, _ = store(tmp_path, "tokens.bin", 1000)
    with pytest.raises(node_cache.CacheError, match=r"tokens\.bin: the bytes that arrived have SHA-256"):
        artifacts.local_file(path, "0" * 64)
    assert not list(cache.glob("fetched/*/*"))


def test_the_least_recently_used_copy_goes_first_and_one_in_use_never(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DANLU_CACHE_BYTES", "35KB")
    paths = [store(tmp_path, f"{name}.bin", 10_000, seed)[0] for seed, name in enumerate("abcd")]
    copies = [artifacts.local_file(path) for path in paths[:3]]
    node_cache.release()
    user = process(paths[0], tmp_path / "log")
    assert user.stdout is not None and user.stdout.readline().strip() == str(copies[0])
    lock = node_cache._lock_file(copies[0].parent)
    os.utime(lock, ns=(1, 1))  # the oldest of all, were it not in use
    artifacts.local_file(paths[1])
    node_cache.release()
    artifacts.local_file(paths[3])
    assert [copy.exists() for copy in copies] == [True, True, False]
    large, _ = store(tmp_path, "large.bin", 20_000)
    with pytest.raises(
        node_cache.CacheError, match=r"20000 bytes do not fit .* it may take 35000, 20\d\d\d are in use.*DANLU_CACHE_BYTES"
    ):
        artifacts.local_file(large)
    user.communicate()


def test_a_bound_that_is_no_size_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for told, size in (("12", 12), ("1.5 GB", 1_500_000_000), ("2GiB", 2 << 30)):
        monkeypatch.setenv("DANLU_CACHE_BYTES", told)
        assert node_cache.bound() == size
    monkeypatch.setenv("DANLU_CACHE_BYTES", "many")
    with pytest.raises(ValueError, match="DANLU_CACHE_BYTES is 'many'"):
        node_cache.bound()


def test_a_remote_model_directory_is_held_to_the_checksums_of_its_marker(tmp_path: Path) -> None:
    local = tmp_path / "model"
    with artifacts.building(str(local)) as building:
        (building / "sub").mkdir()
        (building / "sub" / "weights.safetensors").write_bytes(b"weights")
    remote = f"fsspec+file://{local}"
    assert (artifacts.local_directory(remote) / "sub" / "weights.safetensors").read_bytes() == b"weights"
    (local / "sub" / "weights.safetensors").write_bytes(b"weighty")
    with pytest.raises(node_cache.CacheError, match=r"weights\.safetensors: the bytes that arrived"):
        artifacts.local_directory(remote)


def test_a_remote_pack_is_read_as_a_local_one_and_held_to_its_index(tmp_path: Path, make_pack: Callable[..., str]) -> None:
    directory = Path(make_pack(tmp_path / "tokens" / "f", documents(40), 32))
    index = json.loads((directory / twin.INDEX).read_text())
    names = (twin.TOKENS, twin.BOUNDARIES, twin.BOUNDARY_OFFSETS)
    index["sha256"] = {name: node_cache.storage.sha256_of(str(directory / name)) for name in names}
    (directory / twin.INDEX).write_text(json.dumps(index))
    loaders = [TokenLoader([PackedTokens(place)], [1.0], 0, ["tokens"]) for place in (str(directory), f"fsspec+file://{directory}")]
    batches = [loader.batch(np.arange(8)) for loader in loaders]
    assert np.array_equal(batches[0].labels, batches[1].labels) and loaders[0].fingerprint == loaders[1].fingerprint
    node_cache.release()
    data = bytearray((directory / twin.TOKENS).read_bytes())
    data[5] ^= 1
    (directory / twin.TOKENS).write_bytes(data)
    for copy in node_cache.cache_directory().glob("fetched/*/tokens.bin"):
        copy.write_bytes(b"")
    with pytest.raises(node_cache.CacheError, match=r"tokens\.bin: the bytes that arrived have SHA-256"):
        PackedTokens(f"fsspec+file://{directory}")
