"""The container files of `cluster/images`, on another base image if asked."""

from __future__ import annotations

import re
from pathlib import Path

from cluster.manifests.settings import Container, ManifestError

FOLDER = Path(__file__).resolve().parent.parent / "images"
_BASE = re.compile(r"^ARG BASE=.*$", re.MULTILINE)


def containerfile(settings: Container) -> str:
    """The container file of a device, with `base` as its default base image. Raises ManifestError for a base that is no name."""
    text = (FOLDER / f"{settings.device}.Containerfile").read_text("utf-8")
    if not settings.base:
        return text
    if not re.fullmatch(r"[\w.:/@-]+", settings.base):
        raise ManifestError(f"container.base: {settings.base!r} is no name of an image")
    return _BASE.sub(f"ARG BASE={settings.base}", text, count=1)
