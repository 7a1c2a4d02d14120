"""A wrong recipe is refused with what, where and the nearest valid name; a right one has one plan."""

from __future__ import annotations

from pathlib import Path

import pytest

from operators.config import SettingsError
from pipelines.cli import main
from pipelines.graph import order, plan
from pipelines.recipe import load_recipe, parse_recipe
from tests.conftest import ROOT

TOY = "tests.pipelines.toy:NumberStage"


def recipe(**stages: str) -> str:
    lines = ["name: toy", "stages:"]
    lines += [f"  {name}: {{kind: '{TOY}'{', ' + rest if rest else ''}}}" for name, rest in stages.items()]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (recipe(a="unit: 3"), "stages.a: unknown key 'unit'; did you mean 'units'?"),
        (recipe(a="units: many"), "stages.a.units: Input should be a valid integer"),
        (recipe(a="") + "\nseeds: 3", "unknown key 'seeds'; did you mean 'seed'?"),
        ("name: x\nstages: {a: {kind: corpis}}", "unknown stage kind 'corpis'; did you mean 'corpus'?"),
        ("name: x\nstages: {a: {}}", "stages.a: needs `kind`"),
        ("name: x", "`stages` must be a mapping"),
        ("name: x\nstages: {a: [", "not valid YAML"),
        ("- 1", "must be a mapping"),
        ("name: '../x'\n" + recipe(a="").split("\n", 1)[1], "must be letters, digits"),
        ("name: x\nname: y\nstages: {}", "line 2: key 'name' stands twice"),
        (
            "name: x\nstages: {a: {kind: corpus, read: {path: p}, operators: [detect_langage]}}",
            "unknown operator 'detect_langage'; did you mean 'detect_language'?",
        ),
        (
            "name: x\nstages: {a: {kind: corpus, read: {path: p}, operators: [{detect_language: {kep: [zh]}}]}}",
            "unknown key 'kep'; did you mean 'keep'?",
        ),
        ("name: x\nstages: {a: {kind: corpus, read: {path: p}, operators: ['nowhere:Op']}}", "cannot be imported"),
    ],
)
def test_a_wrong_recipe_is_refused_with_the_place_and_the_nearest_name(text: str, told: str) -> None:
    with pytest.raises(SettingsError) as caught:
        parse_recipe(text)
    assert told in str(caught.value)


def test_all_problems_are_told_at_once() -> None:
    with pytest.raises(SettingsError) as caught:
        parse_recipe(recipe(a="unit: 3", b="waits: 1"))
    assert len(str(caught.value).splitlines()) == 2


def test_a_recipe_that_is_missing_or_no_text_is_told_by_name(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no recipe at .*nothing.yaml"):
        load_recipe(str(tmp_path / "nothing.yaml"))
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00name")
    with pytest.raises(SettingsError, match="not UTF-8"):
        load_recipe(str(tmp_path / "binary.yaml"))


def test_stages_are_ordered_by_their_inputs() -> None:
    assert order(parse_recipe(recipe(c="input: [b]", b="input: [a]", a=""))) == ["a", "b", "c"]


def test_a_cycle_is_named() -> None:
    with pytest.raises(SettingsError, match="cycle: a -> b -> a"):
        order(parse_recipe(recipe(a="input: [b]", b="input: [a]")))


def test_an_unknown_input_is_refused_with_the_nearest_stage() -> None:
    with pytest.raises(SettingsError, match=r"stages.b: input 'wep' is no stage; did you mean 'web'"):
        order(parse_recipe(recipe(web="", b="input: [wep]")))


def test_a_changed_setting_changes_the_fingerprint_of_the_stage_and_of_those_after_it_only(tmp_path: Path) -> None:
    def fingerprints(text: str, **more: int) -> dict[str, str]:
        return {n.name: n.fingerprint for n in plan(parse_recipe(text), "r", str(tmp_path), more.get("limit"))}

    before = fingerprints(recipe(a="", b="input: [a]", c="input: [b]", d=""))
    after = fingerprints(recipe(a="", b="input: [a], units: 4", c="input: [b]", d=""))
    assert {name for name in before if before[name] != after[name]} == {"b", "c"}
    slower = fingerprints(recipe(a="wait_s: 1", b="input: [a]", c="input: [b]", d=""))
    assert slower == before
    assert not set(fingerprints(recipe(a=""), limit=5).values()) & set(before.values())


def test_an_input_pattern_that_matches_nothing_names_stage_and_pattern(tmp_path: Path) -> None:
    text = "name: x\nstages: {web: {kind: corpus, read: {format: jsonl, path: 'no/*.jsonl'}}}"
    with pytest.raises(FileNotFoundError, match=r"stages.web: .*no/\*.jsonl"):
        plan(parse_recipe(text), "r", str(tmp_path), None)


@pytest.mark.parametrize("name", ["quickstart", "corpus", "documents", "synthesis", "forgetting"])
def test_the_example_recipes_are_sound(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    assert main(["check", f"examples/{name}.yaml", "--runs", str(tmp_path)]) == 0
    assert "no errors, 0 warnings" in capsys.readouterr().out
