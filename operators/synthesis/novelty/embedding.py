"""How new a text is by its meaning: the highest cosine similarity of sentence embeddings against everything accepted so far.

Says that a paraphrase is not new, which shared words cannot show; and says little where the model does not know the
language: all-MiniLM-L6-v2, say, has English word pieces only, cuts Chinese into characters of which it knows few, and
finds most Chinese sentences alike. Take a multilingual model for Chinese, and a threshold found on texts of one's own.

The comparison is exact: a blocked matrix product with every pooled vector, which costs the product of candidates, pool
and dimensions. Nothing is approximated, so a pool of 100,000 is a sensible size here and a million is for ROUGE-L.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from pydantic import Field

from operators.config import Settings
from operators.dedup.embed import Embedder, Embedding
from operators.synthesis.novelty.pool import Admissions
from operators.synthesis.novelty.tokens import doubled

_CHUNK, _BLOCK = 1024, 8192  # candidates and pooled texts in one product
_DECIMALS = 4  # similarities are rounded, so that the order of a sum decides nothing


class EmbeddingSettings(Settings):
    """The model and what counts as new."""

    model: str = Field(description="folder of a sentence-embedding model in Hugging Face layout, with safetensors weights")
    threshold: float = Field(default=0.9, gt=0, le=1, description="a text is new while its highest cosine similarity is below")
    pooling: str = Field(
        default="mean", pattern="^(mean|first)$", description="`mean` of the last hidden states, or that of the `first` token"
    )
    prefix: str = Field(default="", description="put before each text; E5 models want `query: `")
    max_tokens: int = Field(default=256, ge=8, description="tokens of a text that are looked at")
    batch_tokens: int = Field(default=8192, ge=64, description="tokens in one batch of the model")
    device: str = Field(default="cpu", description="`cpu`, `cuda` or `cuda:N`")


class EmbeddingNovelty:
    """The interface of NoveltyPool with cosine similarity for ROUGE-L F. A blank text resembles nothing.

    Similarities are rounded to four decimals; of equal ones the first added counts. Embeddings are float16 and may differ
    in their last bit with the batch a text is in, so decisions are repeatable for the same calls in the same order.
    Memory: 2 bytes a dimension and text. Raises SettingsError where there is no such model in safetensors.
    """

    def __init__(self, settings: EmbeddingSettings) -> None:
        self.settings, self.threshold = settings, settings.threshold
        pooling = "mean" if settings.pooling == "mean" else "cls"
        self._embedder = Embedder(
            Embedding(settings.model, "text", pooling, settings.prefix, settings.max_tokens, settings.batch_tokens, settings.device)
        )
        self._vectors = np.zeros((64, self._embedder.dimensions), np.float16)
        self._count = 0

    def __len__(self) -> int:
        return self._count

    @property
    def nbytes(self) -> int:
        return self._vectors.nbytes

    def add(self, text: str) -> None:
        """Pool a text; its index is the number of texts before it."""
        self.extend([text])

    def extend(self, texts: Sequence[str]) -> None:
        """Pool texts without asking whether they are new."""
        for begin in range(0, len(texts), _CHUNK):
            self._append(self._embed(texts[begin : begin + _CHUNK]))

    def nearest(self, text: str) -> tuple[float, int]:
        """(highest similarity, index of the first text that has it); (0.0, -1) where none is above 0."""
        best, index = self._search(self._embed([text]).astype(np.float32))
        return float(best[0]), int(index[0])

    def scores(self, text: str) -> np.ndarray:
        """float64[len(pool)]: similarity with each pooled text, negative ones as they are."""
        vector = self._embed([text]).astype(np.float32)
        parts = [_products(vector, self._pooled(begin))[0] for begin in range(0, self._count, _BLOCK)]
        return np.concatenate([np.zeros(0), *parts])

    def matches(self, texts: Sequence[str]) -> Admissions:
        """What `admit` would say of each text alone; nothing joins the pool."""
        parts = [
            self._search(self._embed(texts[begin : begin + _CHUNK]).astype(np.float32)) for begin in range(0, len(texts), _CHUNK)
        ]
        return self._admissions(parts)

    def admit(self, texts: Sequence[str]) -> Admissions:
        """Decide on candidates in order; each one that is new joins the pool at once, so that later ones are held against it."""
        parts = []
        for begin in range(0, len(texts), _CHUNK):
            exact = self._embed(texts[begin : begin + _CHUNK])
            vectors = exact.astype(np.float32)
            best, index = self._search(vectors)
            among = _products(vectors, vectors)
            joined: list[int] = []  # rows of this chunk that are in the pool now, in order
            for row in range(len(vectors)):
                if joined:
                    similar = among[row, joined]
                    first = int(similar.argmax())
                    if similar[first] > best[row]:  # an equal one in the pool came before
                        best[row], index[row] = similar[first], self._count + first
                if best[row] < self.threshold:
                    joined.append(row)
            self._append(exact[joined])
            parts.append((best, index))
        return self._admissions(parts)

    def _admissions(self, parts: list[tuple[np.ndarray, np.ndarray]]) -> Admissions:
        best = np.concatenate([np.zeros(0), *(best for best, _ in parts)])
        index = np.concatenate([np.zeros(0, np.int64), *(index for _, index in parts)])
        return Admissions(best < self.threshold, best, index)

    def _embed(self, texts: Sequence[str]) -> np.ndarray:
        clean = [text.encode("utf-8", "replace").decode("utf-8") for text in texts]  # tokenizers refuse lone surrogates
        return self._embedder.embed(clean)

    def _pooled(self, begin: int) -> np.ndarray:
        return self._vectors[begin : min(begin + _BLOCK, self._count)].astype(np.float32)

    def _search(self, vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        best, index = np.zeros(len(vectors)), np.full(len(vectors), -1, np.int64)
        for begin in range(0, self._count, _BLOCK):
            similar = _products(vectors, self._pooled(begin))
            first = similar.argmax(axis=1)
            highest = similar[np.arange(len(vectors)), first]
            better = highest > best
            best[better], index[better] = highest[better], begin + first[better]
        return best, index

    def _append(self, vectors: np.ndarray) -> None:
        if self._count + len(vectors) > len(self._vectors):
            self._vectors = doubled(self._vectors, self._count + len(vectors))
        self._vectors[self._count : self._count + len(vectors)] = vectors
        self._count += len(vectors)


def _products(vectors: np.ndarray, others: np.ndarray) -> np.ndarray:
    """float64[vectors, others] of cosines, at most 1 (float16 vectors are of length 1 to three decimals)."""
    return np.minimum(np.round((vectors @ others.T).astype(np.float64), _DECIMALS), 1.0)
