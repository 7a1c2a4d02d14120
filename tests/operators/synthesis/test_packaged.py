"""A model reference leads to weights, or to an error that says what to write instead."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from operators.synthesis import packaged
from operators.synthesis.packaged import ModelError, check_model, model_revision, resolve_model

REFERENCE = "packaged:smollm2-135m-instruct"


def a_model(folder: Path, weights: bytes = b"w", template: str = "{{ messages }}") -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(weights)
    (folder / "chat_template.jinja").write_text(template)
    return folder


def test_the_packaged_model_is_found_without_importing_its_package() -> None:
    check_model(REFERENCE)


@pytest.mark.parametrize(
    ("missing", "message"),
    [("config.json", "no config.json"), ("model.safetensors", r"no \*.safetensors"), ("chat_template.jinja", "no chat template")],
)
def test_a_folder_that_is_no_chat_model_says_what_it_lacks(tmp_path: Path, missing: str, message: str) -> None:
    folder = a_model(tmp_path / "m")
    check_model(str(folder))
    (folder / missing).unlink()
    with pytest.raises(ModelError, match=message):
        check_model(str(folder))


def test_references_that_lead_nowhere_name_the_valid_ones(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=REFERENCE):
        resolve_model("packaged:other", str(tmp_path))
    with pytest.raises(ModelError, match="no such directory"):
        resolve_model(str(tmp_path / "nothing"), str(tmp_path))


def test_the_revision_is_the_content_of_weights_and_template_not_the_place(tmp_path: Path) -> None:
    cache = str(tmp_path / "cache")
    first = model_revision(str(a_model(tmp_path / "a")), cache)
    assert model_revision(str(a_model(tmp_path / "b")), cache) == first
    assert model_revision(str(a_model(tmp_path / "c", weights=b"x")), cache) != first
    assert model_revision(str(a_model(tmp_path / "d", template="{{ x }}")), cache) != first


def test_makers_that_race_leave_one_whole_model_and_no_scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Path] = []

    def convert(reference: str, target: Path) -> None:
        made.append(target)
        time.sleep(0.1)
        a_model(target)

    monkeypatch.setattr(packaged, "_convert_apart", convert)
    found: list[str] = []
    makers = [threading.Thread(target=lambda: found.append(resolve_model(REFERENCE, str(tmp_path)))) for _ in range(4)]
    for maker in makers:
        maker.start()
    for maker in makers:
        maker.join()
    assert len(found) == 4
    assert len(set(found)) == len(made) == 1
    assert [p.name for p in (tmp_path / "models").iterdir() if p.name != "hashes" and p.suffix != ".lock"] == [Path(found[0]).name]
    check_model(found[0])


def test_a_conversion_that_fails_leaves_nothing_that_looks_like_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def convert(reference: str, target: Path) -> None:
        target.mkdir()
        (target / "config.json").write_text("{}")
        raise OSError("no space left on device")

    monkeypatch.setattr(packaged, "_convert_apart", convert)
    with pytest.raises(OSError, match="no space"):
        resolve_model(REFERENCE, str(tmp_path))
    assert [p.name for p in (tmp_path / "models").iterdir() if p.name != "hashes" and p.suffix != ".lock"] == []
