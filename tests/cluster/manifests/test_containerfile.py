from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.manifests.containerfile import FOLDER, containerfile
from cluster.manifests.settings import Container, ManifestError

ROOT = Path(__file__).resolve().parents[3]
FILES = sorted(FOLDER.glob("*.Containerfile"))


def copied(text: str) -> list[str]:
    """The sources of COPY instructions."""
    return [word for line in re.findall(r"^COPY (.*)$", text, re.MULTILINE) for word in line.split()[:-1] if word[0] != "-"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_container_file_copies_what_the_checkout_has_and_installs_its_own_list(path: Path) -> None:
    text = path.read_text("utf-8")
    sources = copied(text)
    assert all((ROOT / source).exists() for source in sources)
    rooms = {found.parent.name for found in ROOT.glob("*/__init__.py")} - {"tests", "benchmarks"}
    assert rooms <= {source.rstrip("/") for source in sources}
    assert f"-r requirements/{path.stem}.txt" in text and "--require-hashes" in text
    assert text.rindex("USER 1000:1000") < text.index("COPY")  # nothing of ours is installed or run as root


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_container_file_passes_the_linter(path: Path) -> None:
    linter = Path(sys.executable).parent / "hadolint"
    found = str(linter) if linter.exists() else shutil.which("hadolint")
    if found is None:
        pytest.skip("hadolint is not installed")
    done = subprocess.run([found, "--failure-threshold", "info", str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_another_base_image_may_be_named_and_nothing_else_slips_in() -> None:
    text = containerfile(Container(device="gpu", base="example/python@sha256:0a"))
    assert "ARG BASE=example/python@sha256:0a\n" in text and text.count("ARG BASE") == 1
    with pytest.raises(ManifestError, match="no name of an image"):
        containerfile(Container(base="x\nRUN id"))
