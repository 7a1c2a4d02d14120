"""MinHash on labelled near-duplicates: does a pair meet in a band as often as theory says, and what becomes of the clusters.

The labels are the exact Jaccard similarities of all pairs of one language (brute force), so both questions have an answer
that no sampling stands behind. A pair of similarity s should meet with probability 1 - (1 - s^r)^b (Mining of Massive
Datasets, 3.4.2). The error of a bin's mean deviation is bootstrapped over families, the histories that versions of one
document come from: a pair between two families counts the product of their draws (the vertex bootstrap of Snijders and
Borgatti, 1999). Where hardly a pair meets that error is no measure; there the binomial one of the theory stands in if larger.

`--write` puts the tables into docs/dedup.md.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from benchmarks import measure
from operators.dedup import components
from operators.dedup.bands import band_hashes, collision_probability
from operators.dedup.join import Joined, join_confirmed, join_records
from operators.dedup.keys import document_shingles, document_signatures
from operators.dedup.options import DedupOptions
from operators.dedup.verify import candidate_pairs, fingerprints

DATA = measure.ROOT.parent / "shared" / "data" / "near_dup"
SHAPES = ((14, 8), (9, 12))  # FineWeb's, and datasketch's optimum for .8 with 112 permutations
EDGES = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0, 1.01)
LANGUAGES = ("en", "zh")
_DRAWS = 1000
_OPTIONS = {"normalisation": "plain", "digits": "keep", "language_column": "lang"}  # the definition of the labels


@dataclass(frozen=True)
class Labelled:
    """Documents (id, text, lang, clusters), and every pair of one language at .2 or more: rows a, b, jaccard, family numbers."""

    documents: pa.Table
    a: np.ndarray
    b: np.ndarray
    jaccard: np.ndarray
    family_a: np.ndarray
    family_b: np.ndarray

    def pairs_of(self, language: str) -> np.ndarray:
        return pc.equal(self.documents["lang"], language).to_numpy(zero_copy_only=False)[self.a]


def load(directory: Path = DATA) -> Labelled:
    """Raises FileNotFoundError where the data pack is not beside the checkout."""
    documents = pq.read_table(directory / "docs.parquet")
    pairs = pq.read_table(directory / "pairs.parquet")
    a, b = (pc.index_in(pairs[side], value_set=documents["id"]).to_numpy() for side in ("a", "b"))
    family = pc.coalesce(documents["family"], documents["id"]).combine_chunks().dictionary_encode().indices.to_numpy()
    return Labelled(documents, a, b, pairs["jaccard"].to_numpy(), family[a], family[b])


def bands_of(labelled: Labelled, seed: int, shapes: Sequence[tuple[int, int]]) -> list[np.ndarray]:
    """For each shape the band hashes uint64[documents, bands] of signatures made with this seed."""
    signatures = document_signatures(labelled.documents, DedupOptions.model_validate({**_OPTIONS, "seed": seed}))
    if not signatures.signed.all():
        raise ValueError("the labelled documents all have shingles")
    return [band_hashes(signatures.values, *shape) for shape in shapes]


@dataclass(frozen=True)
class Bin:
    """Pairs of low <= jaccard < high: how many, share that met (mean over seeds), what theory says, standard error of the
    difference."""

    low: float
    high: float
    pairs: int
    found: float
    expected: float
    error: float

    @property
    def deviation(self) -> float:
        """In standard errors."""
        return 0.0 if self.found == self.expected else (self.found - self.expected) / self.error


def s_curve(labelled: Labelled, met: np.ndarray, seeds: int, shape: tuple[int, int], language: str) -> list[Bin]:
    """`met` float64[pairs]: the share of seeds in which each pair met in a band."""
    theory = np.asarray(collision_probability(labelled.jaccard, *shape))
    theory[labelled.jaccard == 1.0] = 1.0
    generator, families = np.random.default_rng(17), int(max(labelled.family_a.max(), labelled.family_b.max())) + 1
    draws = generator.multinomial(families, np.full(families, 1 / families), _DRAWS).astype(np.float64)
    bins, chosen = [], labelled.pairs_of(language)
    for low, high in itertools.pairwise(EDGES):
        inside = chosen & (labelled.jaccard >= low) & (labelled.jaccard < high)
        if not inside.any():
            continue
        difference, a, b = (met - theory)[inside], labelled.family_a[inside], labelled.family_b[inside]
        weights = np.where(a == b, draws[:, a], draws[:, a] * draws[:, b])
        sums = weights.sum(axis=1)
        means = (weights @ difference)[sums > 0] / sums[sums > 0]
        count = int(inside.sum())
        binomial = float(np.sqrt((theory[inside] * (1 - theory[inside])).sum() / seeds) / count)
        error = max(float(means.std(ddof=1)), binomial)
        bins.append(Bin(low, high, count, float(met[inside].mean()), float(theory[inside].mean()), error))
    return bins


Curves = dict[tuple[int, int], dict[str, list[Bin]]]
"""The bins of each shape (bands, rows) and language."""


def curves(labelled: Labelled, seeds: int, shapes: Sequence[tuple[int, int]] = SHAPES) -> Curves:
    """The bins of each shape and language, mean over `seeds` seeds."""
    met = [np.zeros(len(labelled.a)) for _ in shapes]
    for seed in range(1, seeds + 1):
        for total, hashes in zip(met, bands_of(labelled, seed, shapes), strict=True):
            total += (hashes[labelled.a] == hashes[labelled.b]).any(axis=1)
    return {
        shape: {language: s_curve(labelled, total / seeds, seeds, shape, language) for language in LANGUAGES}
        for shape, total in zip(shapes, met, strict=True)
    }


@dataclass(frozen=True)
class Verified:
    """Pairs compared in a verified pass and confirmed, and labelled pairs at the threshold that met in a band but were lost."""

    checked: int
    confirmed: int
    wrong: int
    lost: int


def join(hashes: np.ndarray) -> tuple[Joined, np.ndarray]:
    """(the forest, its records) of documents by their band hashes."""
    rows = np.repeat(np.arange(len(hashes), dtype=np.uint64), hashes.shape[1])
    records = np.column_stack([hashes.ravel(), rows])
    return join_records(records), records


def join_verified(
    labelled: Labelled, hashes: np.ndarray, sets: tuple[np.ndarray, np.ndarray], threshold: float
) -> tuple[Joined, Verified]:
    """The forest of pairs confirmed by exact Jaccard similarity, checked against the labels edge by edge."""
    _, records = join(hashes)
    members, starts = components.buckets([records[:, 0]], records[:, 1])
    listed = candidate_pairs(members, starts, fingerprints(*sets)[members.astype(np.int64)], cap=1 << 40)

    def load_sets(wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        rows = wanted.astype(np.int64)
        sizes = np.diff(sets[1])[rows]
        ends = np.append(0, np.cumsum(sizes))
        return sets[0][np.repeat(sets[1][rows] - ends[:-1], sizes) + np.arange(ends[-1])], ends

    joined = join_confirmed(listed.pairs, listed.same, threshold, load_sets)
    similar = np.round(labelled.jaccard, 6) >= threshold
    true = {(max(x, y), min(x, y)) for x, y in zip(labelled.a[similar].tolist(), labelled.b[similar].tolist(), strict=True)}
    kept = np.column_stack([joined.larger, joined.smaller])
    wrong = sum(tuple(pair) not in true for pair in kept.tolist())
    met = similar & (hashes[labelled.a] == hashes[labelled.b]).any(axis=1)
    _, ranks = _components(joined, len(hashes))
    lost = int((ranks[labelled.a[met]] != ranks[labelled.b[met]]).sum())
    return joined, Verified(len(listed.pairs), joined.edges, wrong, lost)


def _components(joined: Joined, documents: int) -> tuple[np.ndarray, np.ndarray]:
    nodes, roots = components.connected_components(joined.larger, joined.smaller)
    ranks = np.arange(documents)
    ranks[nodes.astype(np.int64)] = roots.astype(np.int64)
    return nodes, ranks


def score(joined: Joined, truth: np.ndarray, chosen: np.ndarray) -> dict[str, float]:
    """Pairwise precision, recall and F1 of the components among `chosen` documents (bool) against clusters int64 (-1: none)."""
    _, ranks = _components(joined, len(truth))
    single = np.arange(len(truth)) + int(truth.max()) + 1
    true = np.where(truth < 0, single, truth)[chosen]

    def pairs(labels: np.ndarray) -> int:
        counts = np.unique(labels, return_counts=True, axis=0)[1]
        return int((counts * (counts - 1) // 2).sum())

    both, ours, theirs = pairs(np.column_stack([true, ranks[chosen]])), pairs(ranks[chosen]), pairs(true)
    precision, recall = both / max(ours, 1), both / max(theirs, 1)
    return {"precision": precision, "recall": recall, "f1": 2 * precision * recall / max(precision + recall, 1e-12)}


def clusters(labelled: Labelled, seeds: int) -> Iterator[dict[str, Any]]:
    """A row for each threshold, language and way (bands only, verified), mean over seeds; shapes are the optimum's."""
    options = DedupOptions.model_validate(_OPTIONS)
    sets = document_shingles(labelled.documents, options)
    for percent in (70, 80, 90):
        threshold = percent / 100
        shape = DedupOptions(threshold=threshold).shape
        truth = pc.fill_null(labelled.documents[f"cluster_{percent}"], -1).to_numpy()
        rows: dict[tuple[str, bool], list[dict[str, float]]] = {}
        totals = []
        for seed in range(1, seeds + 1):
            (hashes,) = bands_of(labelled, seed, [shape])
            confirmed, checks = join_verified(labelled, hashes, sets, threshold)
            totals.append(checks)
            for language in LANGUAGES:
                chosen = pc.equal(labelled.documents["lang"], language).to_numpy(zero_copy_only=False)
                rows.setdefault((language, False), []).append(score(join(hashes)[0], truth, chosen))
                rows.setdefault((language, True), []).append(score(confirmed, truth, chosen))
        for (language, verified), found in rows.items():
            yield {
                "threshold": threshold, "bands": shape[0], "rows": shape[1], "language": language, "verified": verified,
                **{name: float(np.mean([each[name] for each in found])) for name in ("precision", "recall", "f1")},
                **({"wrong_edges": sum(t.wrong for t in totals), "lost_pairs": sum(t.lost for t in totals)} if verified else {}),
            }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the tables into docs/dedup.md")
    arguments = measure.arguments("", parser)
    labelled, seeds = load(), 3 if arguments.quick else 20
    found, scored = curves(labelled, seeds), list(clusters(labelled, 1 if arguments.quick else 5))
    worst = max(abs(each.deviation) for languages in found.values() for bins in languages.values() for each in bins)
    text = tables(found, scored, seeds)
    print(text)
    if arguments.write:
        _write(measure.ROOT / "docs" / "dedup.md", text)
    figures = {
        "seeds": seeds,
        "largest_deviation_in_errors": worst,
        "curves": {
            f"{shape[0]}x{shape[1]}": {
                language: [{**each.__dict__, "deviation": each.deviation} for each in bins] for language, bins in languages.items()
            }
            for shape, languages in found.items()
        },
        "clusters": scored,
    }  # fmt: skip
    data = f"near_dup: {len(labelled.documents)} documents, {len(labelled.a)} labelled pairs"
    measure.publish("corpus.near_dup", {}, figures, data=data, quick=arguments.quick)


def tables(found: Curves, scored: Sequence[dict[str, Any]], seeds: int) -> str:
    lines = []
    for (bands, rows), languages in found.items():
        lines += [f"Share of pairs that meet, {bands} bands of {rows}, mean of {seeds} seeds:", ""]
        lines += ["| language | Jaccard | pairs | met | theory | standard errors apart |", "|---|---|---|---|---|---|"]
        for language, bins in languages.items():
            for each in bins:
                span = "1" if each.low == 1.0 else f"{each.low:g} to {each.high:g}"
                cells = [language, span, str(each.pairs), f"{each.found:.4f}", f"{each.expected:.4f}", f"{each.deviation:+.1f}"]
                lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    lines += ["Components against clusters of exact Jaccard similarity, pairwise:", ""]
    lines += ["| threshold | bands x rows | language | pairs | precision | recall | F1 |", "|---|---|---|---|---|---|---|"]
    for row in scored:
        way = "verified" if row["verified"] else "bands only"
        numbers = " | ".join(f"{row[name]:.4f}" for name in ("precision", "recall", "f1"))
        lines.append(f"| {row['threshold']:g} | {row['bands']} x {row['rows']} | {row['language']} | {way} | {numbers} |")
    wrong, lost = (sum(row.get(name, 0) for row in scored) // len(LANGUAGES) for name in ("wrong_edges", "lost_pairs"))
    lines += ["", f"Verified edges below the threshold: {wrong}. Pairs at the threshold that met in a band and were lost: {lost}."]
    return "\n".join(lines)


def _write(path: Path, text: str) -> None:
    begin, end = "<!-- near_dup -->", "<!-- /near_dup -->"
    page = path.read_text("utf-8")
    head, rest = page.split(begin)
    path.write_text(f"{head}{begin}\n{text}\n{end}{rest.split(end)[1]}", "utf-8")


if __name__ == "__main__":
    main()
