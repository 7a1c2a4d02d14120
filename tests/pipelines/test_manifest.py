from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from pipelines.cli import main
from pipelines.manifest import kinds_of
from pipelines.recipe import load_recipe

ROOT = Path(__file__).resolve().parents[2]
CORPUS = """\
name: words
stages:
  docs: {kind: corpus, read: {path: "data/*.jsonl"}, operators: [fix_text]}
"""
TASKS = """\
name: words
stages:
  tasks: {kind: self_instruct, seeds: seeds.jsonl, target: 5, generator: GENERATOR}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    path = tmp_path / "words.yaml"
    path.write_text(CORPUS)
    return str(path)


def test_a_job_is_written_with_the_recipe_as_it_stands(recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "job.yaml"
    words = [
        "manifest",
        "kuberay",
        "--recipe",
        recipe,
        "--runs",
        "s3://bucket/runs",
        "--set",
        "workers.cpu.max=3",
        "--out",
        str(out),
    ]
    assert main(words) == 0
    config_map, job = yaml.safe_load_all(out.read_text("utf-8"))
    assert config_map["data"]["words.yaml"] == CORPUS
    assert "&id" not in out.read_text("utf-8")
    (group,) = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]  # the recipe trains nothing and asks no model
    assert (group["groupName"], group["maxReplicas"]) == ("cpu", 3)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["kuberay"], "needs the recipe"),
        (["slurm"], "needs the recipe"),
        (["kuberay", "--kind", "cluster", "--set", "workers.gpu.maks=8"], "did you mean 'max'?"),
        (["launcher"], "head.instance"),
        (
            ["launcher", "--set", "credentials.A=b/c", "--set", "platform=gke"],
            "--set credentials, platform: danlu manifest launcher reads",
        ),
        (["slurm", "--recipe", "examples/corpus.yaml", "--set", "workers.cpu.max=3"], "reads only env, name, slurm"),
        (["launcher", "--kind", "job"], "--kind says nothing about danlu manifest launcher"),
        (["containerfile", "--recipe", "examples/corpus.yaml"], "--recipe says nothing"),
        (["kuberay", "--kind", "cluster", "--runs", "s3://b/r"], "--runs says nothing"),
        (["kuberay", "--recipe", "none.yaml", "--runs", "s3://b/r"], "none.yaml"),
        (["kuberay", "--recipe", "examples/corpus.yaml"], "pods do not see this folder"),
    ],
)
def test_what_gives_no_manifest_is_told_with_exit_code_2(
    words: list[str], complaint: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    assert main(["manifest", *words]) == 2
    told = capsys.readouterr()
    assert complaint in told.err and told.out == ""


def test_settings_are_listed_with_their_defaults_and_meanings(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["manifest", "settings"]) == 0
    listed = capsys.readouterr().out
    assert "credentials" in listed and "retries: int (default 4)" in listed and "spot: bool | None (default None)" in listed


def test_the_container_file_in_the_checkout_is_what_is_written(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["manifest", "containerfile", "--set", "container.device=gpu"]) == 0
    assert capsys.readouterr().out == (ROOT / "cluster" / "images" / "gpu.Containerfile").read_text("utf-8")


@pytest.mark.parametrize(
    ("generator", "kinds"),
    [
        ("{max_running: 8}", {"generate"}),
        ("{device: cpu}", {"cpu"}),
        ('{model: m, endpoint: {url: "http://127.0.0.1:1/v1"}}', {"cpu"}),
    ],
)
def test_a_model_behind_another_server_or_on_cpu_needs_no_gpu_nodes(generator: str, kinds: set[str], tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(TASKS.replace("GENERATOR", generator))
    assert kinds_of(load_recipe(str(path))[0]) == kinds


def test_the_quickstart_needs_all_three() -> None:
    assert kinds_of(load_recipe(str(ROOT / "examples" / "quickstart.yaml"))[0]) == {"cpu", "generate", "train"}
