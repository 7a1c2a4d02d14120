"""Prediction of a fastText classifier for many texts in one compiled call, over bytes, without a Python object per text.

A reimplementation of fastText's `predict` (Bojanowski et al. 2017, arXiv:1607.04606, hashed character n-grams; Joulin et al.
2016, arXiv:1612.03651, quantisation and pruning) for supervised models without word n-grams, whose loss is the hierarchical
or the full softmax: lid.176.ftz and lid.176.bin are such files. The sum of the vectors of a word and its n-grams depends on
the word alone and is kept for the rest of the call, so that frequent words cost one lookup.

Probabilities equal those of the fasttext module but for the order of float32 sums (1e-4 in the parity test).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np

_MAGIC, _VERSION = 793712314, 12
_HIERARCHICAL, _SOFTMAX, _SUPERVISED = 1, 3, 3
_CENTROIDS = 256
_END_OF_LINE = b"</s>"
_LABEL = b"__label__"
_BASE = np.uint64(0x9E3779B97F4A7C15)
_CACHED_BYTES = 48  # words up to here are remembered
_FLOOR = -11.0  # log probability under which a branch of the tree is not followed


@dataclass(frozen=True)
class Predictions:
    """The best labels of each text, best first; -1 and 0 where a label's probability is below about 1e-5."""

    label: np.ndarray  # int32[texts, k], index into Classifier.labels
    probability: np.ndarray  # float32[texts, k]


class Classifier:
    """A fastText model in memory: float32 tables of its input and output, its dictionary, the tree of its labels."""

    def __init__(self, data: bytes) -> None:
        """Raises ValueError for a file that is no fastText model or has features that the kernel lacks (see `supports`)."""
        reader = _Reader(data)
        header = _header(reader)
        if not _supported(header):
            raise ValueError("the kernel is for supervised models with wordNgrams 1 and loss hs or softmax")
        self._bucket, self._minn, self._maxn = header["bucket"], header["minn"], header["maxn"]
        size, words, labels, _, pruned = reader.read("iiiqq")
        entries = [(reader.text(), *reader.read("qb")) for _ in range(size)]
        if words + labels != size or any(kind != (i >= words) for i, (_, _, kind) in enumerate(entries)):
            raise ValueError("fastText model with a damaged dictionary")
        self.labels = [name.removeprefix(_LABEL).decode("utf-8", "replace") for name, _, _ in entries[words:]]
        self._end = next((i for i, (name, _, _) in enumerate(entries[:words]) if name == _END_OF_LINE), -1)
        self._slots, self._word_start, self._word_bytes = _dictionary([name for name, _, _ in entries[:words]])
        pairs = reader.array(np.int32, 2 * max(pruned, 0)).reshape(-1, 2)
        quantised = bool(reader.read("?"))
        self._rows = reader.product_quantised() if quantised else reader.dense()
        self._output = reader.product_quantised() if bool(reader.read("?")) and quantised else reader.dense()
        if len(self._output) != labels or self._rows.shape[1] != self._output.shape[1]:
            raise ValueError("fastText model with matrices of the wrong shape")
        # row of each n-gram's bucket, -1 where it was pruned; empty where none was
        self._buckets = np.full(self._bucket if pruned >= 0 else 0, -1, np.int32)
        if pruned > 0:
            self._buckets[pairs[:, 0]] = words + pairs[:, 1]
        self._bits = _bits(self._buckets, self._bucket)
        if len(self._rows) < words + (int(pairs[:, 1].max(initial=-1)) + 1 if pruned >= 0 else self._bucket):
            raise ValueError("fastText model with a short input matrix")
        counts = [count for _, count, _ in entries[words:]]
        self._tree = _huffman(counts) if header["loss"] == _HIERARCHICAL else np.empty((0, 2), np.int32)

    def predict(self, data: np.ndarray, starts: np.ndarray, ends: np.ndarray, count: int = 1) -> Predictions:
        """The `count` best labels of each text `data[starts[i]:ends[i]]` (uint8 UTF-8, int64, int64).

        Bytes up to 32 separate words. A text may be a window of another: windows of one document are just more texts.
        """
        return self.predict_joined(data, starts, ends, np.arange(len(starts) + 1, dtype=np.int64), count)

    def predict_joined(
        self, data: np.ndarray, starts: np.ndarray, ends: np.ndarray, offsets: np.ndarray, count: int = 1
    ) -> Predictions:
        """As `predict`, where text i is the pieces `offsets[i]:offsets[i + 1]` of (starts, ends), as if joined by spaces."""
        texts = len(offsets) - 1
        count = min(count, len(self.labels))
        label, probability = np.full((texts, count), -1, np.int32), np.zeros((texts, count), np.float32)
        slots = 256
        while slots < 1 << 14 and slots * 16 < int((ends - starts).sum()):
            slots *= 2
        _predict(
            data, starts, ends, offsets, slots, self._rows, self._output, self._tree, self._buckets, self._bits, self._bucket,
            self._minn, self._maxn, self._slots, self._word_start, self._word_bytes, self._end, label, probability,
        )  # fmt: skip
        return Predictions(label, probability)


def supports(start: bytes) -> bool:
    """Whether a file that begins with these bytes (64 suffice) is a model of the kind that `Classifier` reads."""
    try:
        return _supported(_header(_Reader(start)))
    except ValueError:
        return False


_ARGUMENTS = ("dim", "ws", "epoch", "minCount", "neg", "wordNgrams", "loss", "model", "bucket", "minn", "maxn", "lrUpdateRate")


def _header(reader: _Reader) -> dict[str, int]:
    magic, version, *arguments = reader.read("14i")
    reader.read("d")
    if magic != _MAGIC:
        raise ValueError("no fastText model")
    return {"version": version, **dict(zip(_ARGUMENTS, arguments, strict=True))}


def _supported(header: dict[str, int]) -> bool:
    return (
        header["version"] == _VERSION
        and header["model"] == _SUPERVISED
        and header["loss"] in (_HIERARCHICAL, _SOFTMAX)
        and header["wordNgrams"] <= 1
        and 0 <= header["minn"] <= 64
        and 0 <= header["maxn"] <= 64
        and (header["bucket"] > 0 or header["maxn"] == 0)
    )


class _Reader:
    """Reads little-endian fields one after the other. Raises ValueError where the file ends too early."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def read(self, layout: str) -> Any:
        try:
            fields = struct.unpack_from(f"<{layout}", self.data, self.at)
        except struct.error as error:
            raise ValueError("fastText model that ends too early") from error
        self.at += struct.calcsize(f"<{layout}")
        return fields if len(fields) > 1 else fields[0]

    def text(self) -> bytes:
        end = self.data.find(b"\0", self.at)
        if end < 0:
            raise ValueError("fastText model that ends too early")
        start, self.at = self.at, end + 1
        return self.data[start:end]

    def array(self, kind: Any, count: int) -> np.ndarray:
        size = np.dtype(kind).itemsize * count
        if count < 0 or self.at + size > len(self.data):
            raise ValueError("fastText model that ends too early")
        values = np.frombuffer(self.data, kind, count, self.at)
        self.at += size
        return values

    def dense(self) -> np.ndarray:
        rows, columns = self.read("qq")
        return self.array(np.float32, rows * columns).reshape(rows, columns).copy()

    def product_quantised(self) -> np.ndarray:
        """float32[rows, columns] of a matrix that is stored as codes of centroids, and of norms where they are apart."""
        normed, rows, columns, size = self.read("?qqi")
        codes = self.array(np.uint8, size)
        matrix = self._centroids(codes, rows, columns)
        if normed:
            matrix *= self._centroids(self.array(np.uint8, rows), rows, 1)
        return matrix

    def _centroids(self, codes: np.ndarray, rows: int, columns: int) -> np.ndarray:
        dim, parts, width, last = self.read("4i")
        if dim != columns or parts < 1 or (parts - 1) * width + last != columns or len(codes) != rows * parts:
            raise ValueError("fastText model with a damaged matrix")
        centroids, by_part = self.array(np.float32, dim * _CENTROIDS), codes.reshape(rows, parts)
        out = np.empty((rows, columns), np.float32)
        for part in range(parts):
            size = last if part == parts - 1 else width
            table = centroids[part * _CENTROIDS * width :][: _CENTROIDS * size].reshape(_CENTROIDS, size)
            out[:, part * width : part * width + size] = table[by_part[:, part]]
        return out


def _dictionary(words: list[bytes]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(open-addressing slots int32 by hash of the word, -1 if free; byte offsets int64[words + 1]; bytes of all words)."""
    joined = np.frombuffer(b"".join(words), np.uint8) if words else np.zeros(0, np.uint8)
    start = np.zeros(len(words) + 1, np.int64)
    np.cumsum([len(word) for word in words], out=start[1:])
    size = 16
    while size < 4 * len(words):
        size *= 2
    slots = np.full(size, -1, np.int32)
    _fill_dictionary(joined, start, slots)
    return slots, start, joined


def _bits(buckets: np.ndarray, bucket: int) -> np.ndarray:
    """uint64[bucket / 64]: one bit a bucket, set where it has a vector. 250 kB for lid.176, which stay in the cache."""
    present = buckets >= 0 if len(buckets) else np.ones(max(bucket, 1), bool)
    padded = np.zeros((len(present) // 64 + 1) * 64, bool)
    padded[: len(present)] = present
    return np.packbits(padded, bitorder="little").view(np.uint64)


def _huffman(counts: list[int]) -> np.ndarray:
    """int32[labels - 1, 2]: the children of each inner node, as fastText builds its tree. Node i >= labels is row i - labels;
    children have smaller numbers than their parent, the root is the last."""
    labels = len(counts)
    weight = [*counts, *([10**15] * (labels - 1))]
    tree = np.empty((max(labels - 1, 0), 2), np.int32)
    leaf, node = labels - 1, labels
    for parent in range(labels, 2 * labels - 1):
        pair = []
        for _ in range(2):
            if leaf >= 0 and weight[leaf] < weight[node]:
                pair.append(leaf)
                leaf -= 1
            else:
                pair.append(node)
                node += 1
        tree[parent - labels] = pair
        weight[parent] = weight[pair[0]] + weight[pair[1]]
    return tree


@numba.njit(cache=True, nogil=True, inline="always")
def _step(value, byte):  # type: ignore[no-untyped-def]
    """One step of fastText's hash: FNV-1a of 32 bits, bytes taken for signed characters."""
    wide = np.uint64(byte) | (np.uint64(0xFFFFFF00) if byte >= 128 else np.uint64(0))
    return ((value ^ wide) * np.uint64(16777619)) & np.uint64(0xFFFFFFFF)


@numba.njit(cache=True, nogil=True)
def _hash(data, start, end):  # type: ignore[no-untyped-def]
    """64 bits of a word: twice FNV would collide twice, so a polynomial mod 2**64, mixed."""
    value = np.uint64(end - start)
    for i in range(start, end):
        value = value * _BASE + (np.uint64(data[i]) + np.uint64(1))
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    return value ^ (value >> np.uint64(31))


@numba.njit(cache=True, nogil=True)
def _fill_dictionary(joined, start, slots):  # type: ignore[no-untyped-def]
    mask = np.uint64(len(slots) - 1)
    for word in range(len(start) - 1):
        slot = _hash(joined, start[word], start[word + 1]) & mask
        while slots[slot] >= 0:
            slot = (slot + np.uint64(1)) & mask
        slots[slot] = word


@numba.njit(cache=True, nogil=True)
def _find(data, start, end, key, slots, word_start, word_bytes):  # type: ignore[no-untyped-def]
    """Number of the dictionary's word that equals data[start:end], or -1."""
    mask = np.uint64(len(slots) - 1)
    slot = key & mask
    while slots[slot] >= 0:
        word = slots[slot]
        begin = word_start[word]
        if word_start[word + 1] - begin == end - start:
            same = True
            for k in range(end - start):
                if word_bytes[begin + k] != data[start + k]:
                    same = False
                    break
            if same:
                return word
        slot = (slot + np.uint64(1)) & mask
    return np.int32(-1)


@numba.njit(cache=True, nogil=True, inline="always")
def _add_row(total, rows, row):  # type: ignore[no-untyped-def]
    for k in range(len(total)):
        total[k] += rows[row, k]


@numba.njit(cache=True, nogil=True, inline="always")
def _keep(value, bucket, shift, factor, bits, buckets, found, count):  # type: ignore[no-untyped-def]
    """Append the bucket of a hash to `found` if it has a vector, without a branch; returns the new count."""
    # value % bucket: the quotient by multiplication is too high by one at most
    rest = np.int64(value) - np.int64((value * factor) >> shift) * bucket
    rest += bucket & (rest >> 63)
    found[count] = rest
    place = np.uint64(rest)
    return count + np.int64((bits[place >> np.uint64(6)] >> (place & np.uint64(63))) & np.uint64(1))


@numba.njit(cache=True, nogil=True)
def _add_found(total, rows, buckets, words, found, count):  # type: ignore[no-untyped-def]
    for k in range(count):
        _add_row(total, rows, np.int64(buckets[found[k]]) if len(buckets) else found[k] + words)
    return count


@numba.njit(cache=True, nogil=True)
def _add_grams(data, start, end, total, rows, buckets, bits, bucket, minn, maxn, words, found):  # type: ignore[no-untyped-def]
    """Add the vectors of the character n-grams of `<word>` to `total`; returns their number.

    Byte by byte, the hashes of the n-grams that end here are all in work at once: chains that wait for nothing.
    """
    shift = np.uint64(31)
    while bucket >> np.int64(shift - np.uint64(30)):
        shift += np.uint64(1)
    factor = np.uint64((np.uint64(1) << shift) // np.uint64(bucket) + np.uint64(1))
    added, count = 0, 0
    if minn == 2 and maxn == 4:
        blank = np.uint64(2166136261)
        one, two, three = _step(blank, np.uint8(60)), blank, blank  # of the last character, the last two, the last three
        j, characters = start, 1
        while j <= end:
            four, three, two, one = three, two, one, blank
            byte = np.uint8(62) if j == end else data[j]
            while True:
                four, three, two, one = _step(four, byte), _step(three, byte), _step(two, byte), _step(one, byte)
                j += 1
                if j >= end or data[j] & 0xC0 != 0x80:
                    break
                byte = data[j]
            characters += 1
            count = _keep(two, bucket, shift, factor, bits, buckets, found, count)
            if characters >= 3:
                count = _keep(three, bucket, shift, factor, bits, buckets, found, count)
            if characters >= 4:
                count = _keep(four, bucket, shift, factor, bits, buckets, found, count)
            if count > len(found) - 4:
                added += _add_found(total, rows, buckets, words, found, count)
                count = 0
        return added + _add_found(total, rows, buckets, words, found, count)
    for i in range(start - 1, end + 1):
        byte = np.uint8(60) if i < start else (np.uint8(62) if i == end else data[i])
        if byte & 0xC0 == 0x80:
            continue
        value, j, n = np.uint64(2166136261), i, 1
        while j <= end and n <= maxn:
            value = _step(value, byte)
            j += 1
            byte = np.uint8(62) if j >= end else data[j]
            while byte & 0xC0 == 0x80:
                value = _step(value, byte)
                j += 1
                byte = np.uint8(62) if j >= end else data[j]
            if n >= minn and not (n == 1 and (i == start - 1 or j == end + 1)):
                count = _keep(value, bucket, shift, factor, bits, buckets, found, count)
                if count > len(found) - 4:
                    added += _add_found(total, rows, buckets, words, found, count)
                    count = 0
            n += 1
    return added + _add_found(total, rows, buckets, words, found, count)


@numba.njit(cache=True, nogil=True)
def _starts_with_label(data, start, end):  # type: ignore[no-untyped-def]
    """fastText takes a word that begins with `__label__` for a label, and skips it."""
    if end - start < 9 or data[start] != 95 or data[start + 1] != 95:
        return False
    return (
        data[start + 2] == 108
        and data[start + 3] == 97
        and data[start + 4] == 98
        and data[start + 5] == 101
        and data[start + 6] == 108
        and data[start + 7] == 95
        and data[start + 8] == 95
    )


@numba.njit(cache=True, nogil=True)
def _predict(  # type: ignore[no-untyped-def]
    data, starts, ends, offsets, cache_slots, rows, output, tree, buckets, bits, bucket, minn, maxn, slots, word_start,
    word_bytes, end_of_line, label, probability,
):  # fmt: skip
    dim, labels, words = rows.shape[1], len(output), len(word_start) - 1
    keys, known = np.zeros(cache_slots, np.uint64), np.zeros(cache_slots, np.int32)
    vectors = np.empty((cache_slots, dim), np.float32)
    hidden, vector = np.empty(dim, np.float32), np.empty(dim, np.float32)
    scores = np.empty(max(2 * labels - 1, 1), np.float32)
    scratch = np.empty(4096, np.int64)
    cache_mask = np.uint64(cache_slots - 1)
    for text in range(len(offsets) - 1):
        hidden[:] = 0
        count, ended = 0, False
        for piece in range(offsets[text], offsets[text + 1]):
            i, end = starts[piece], ends[piece]
            while i < end and not ended:
                if data[i] <= 32:
                    i += 1
                    continue
                begin = i
                key = np.uint64(0)
                while i < end and data[i] > 32:
                    key = key * _BASE + (np.uint64(data[i]) + np.uint64(1))
                    i += 1
                # the key of a remembered word: its bytes and length, never 0
                key = (key ^ (key >> np.uint64(32))) * np.uint64(0xBF58476D1CE4E5B9) + np.uint64(i - begin)
                slot = (key >> np.uint64(20)) & cache_mask
                if keys[slot] == key and i - begin <= _CACHED_BYTES and key != 0:
                    if known[slot] > 0:
                        count += known[slot]
                        _add_row(hidden, vectors, slot)
                    continue
                if (
                    data[begin] == 60
                    and i - begin == 4
                    and data[begin + 1] == 47
                    and data[begin + 2] == 115
                    and data[begin + 3] == 62
                ):
                    ended = True  # a literal </s> ends the line for fastText
                    break
                vector[:] = 0
                found = 0
                word = _find(data, begin, i, _hash(data, begin, i), slots, word_start, word_bytes)
                if word >= 0:
                    _add_row(vector, rows, word)
                    found = 1
                if maxn > 0 and (word >= 0 or not _starts_with_label(data, begin, i)):
                    found += _add_grams(data, begin, i, vector, rows, buckets, bits, bucket, minn, maxn, words, scratch)
                for k in range(dim):
                    hidden[k] += vector[k]
                count += found
                if i - begin <= _CACHED_BYTES and key != 0:
                    keys[slot], known[slot] = key, found
                    for k in range(dim):
                        vectors[slot, k] = vector[k]
        if end_of_line >= 0:
            _add_row(hidden, rows, end_of_line)
            count += 1
        if not count:
            continue
        scale = np.float32(1.0 / count)
        for k in range(dim):
            hidden[k] *= scale
        if len(tree):
            _descend(hidden, output, tree, scores)
        else:
            _soften(hidden, output, scores)
        _best(scores, labels, label[text], probability[text])


@numba.njit(cache=True, nogil=True)
def _dot(matrix, row, vector):  # type: ignore[no-untyped-def]
    total = np.float32(0)
    for k in range(len(vector)):
        total += matrix[row, k] * vector[k]
    return total


@numba.njit(cache=True, nogil=True)
def _descend(hidden, output, tree, scores):  # type: ignore[no-untyped-def]
    """Log probabilities of the labels by the hierarchical softmax, -inf where the branch was left early."""
    labels = len(output)
    scores[:] = -np.inf
    scores[2 * labels - 2] = 0
    for node in range(2 * labels - 2, labels - 1, -1):
        if scores[node] < _FLOOR:
            continue
        share = np.float32(1.0 / (1.0 + np.exp(-np.float64(_dot(output, node - labels, hidden)))))
        scores[tree[node - labels, 0]] = scores[node] + np.float32(np.log(np.float64(np.float32(1) - share) + 1e-5))
        scores[tree[node - labels, 1]] = scores[node] + np.float32(np.log(np.float64(share) + 1e-5))


@numba.njit(cache=True, nogil=True)
def _soften(hidden, output, scores):  # type: ignore[no-untyped-def]
    """Log probabilities of the labels by the full softmax."""
    labels = len(output)
    highest = np.float32(-np.inf)
    for row in range(labels):
        scores[row] = _dot(output, row, hidden)
        highest = max(highest, scores[row])
    total = np.float64(0)
    for row in range(labels):
        total += np.exp(np.float64(scores[row] - highest))
    for row in range(labels):
        scores[row] = np.float32(np.log(np.exp(np.float64(scores[row] - highest)) / total + 1e-5))


@numba.njit(cache=True, nogil=True)
def _best(scores, labels, label, probability):  # type: ignore[no-untyped-def]
    """The best labels by falling probability; of equals the first."""
    taken = 0
    for row in range(labels):
        score = scores[row]
        if score < _FLOOR:
            continue
        if taken < len(label):
            taken += 1
        elif score <= probability[taken - 1]:
            continue
        place = taken - 1
        while place > 0 and probability[place - 1] < score:
            probability[place], label[place] = probability[place - 1], label[place - 1]
            place -= 1
        probability[place], label[place] = score, row
    for k in range(taken):
        probability[k] = np.exp(probability[k])
