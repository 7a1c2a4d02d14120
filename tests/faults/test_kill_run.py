"""A run that is killed at any moment goes on with the same command, and its Parquet is the same to the byte."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import yaml

from operators import shards
from tests.cluster.nodes import CONFIGURATION, Nodes
from tests.conftest import ROOT
from tests.operators.synthesis.server import Answer, Call, Server, said

RUN = "killed-limit-200"
STAGES = ["web", "docs", "clean", "bpe", "tokens"]


def write_recipe(directory: Path) -> None:
    """The quickstart's own corpus, dedup, tokenizer and pack stages, on a part of its data."""
    recipe = yaml.safe_load((ROOT / "examples" / "quickstart.yaml").read_text(encoding="utf-8"))
    stages = {name: recipe["stages"][name] for name in STAGES}
    for name in ("web", "docs"):
        stages[name]["operators"] = [entry for entry in stages[name]["operators"] if "score_quality" not in entry]
        stages[name]["batch_rows"] = 64
    stages["docs"]["read"]["max_unit_bytes"] = 1 << 20
    stages["clean"]["keep"] = "first"
    stages["bpe"]["vocab_size"] = 2000
    text = yaml.safe_dump({"name": "killed", "seed": 17, "stages": stages}, allow_unicode=True)
    (directory / "recipe.yaml").write_text(text, encoding="utf-8")
    (directory / "examples").symlink_to(ROOT / "examples")


def write_whole_recipe(directory: Path, data: str, endpoint: str) -> None:
    """Corpus, dedup, tokenizer, packing, synthesis, pretraining, fine-tuning, evaluation: input files below `data`."""
    directory.mkdir()
    write_recipe(directory)
    recipe = yaml.safe_load((directory / "recipe.yaml").read_text("utf-8"))
    stages = recipe["stages"] = {name: recipe["stages"][name] for name in STAGES}
    stages["web"]["read"]["path"] = f"{data}/pages.warc.gz"
    stages["docs"]["read"]["path"] = [f"{data}/documents.parquet", f"{data}/notes.jsonl"]
    seeds = [f"{data}/seed_tasks_en.jsonl", f"{data}/seed_tasks_zh.jsonl"]
    generator = {"model": "m", "endpoint": {"url": endpoint, "concurrency": 8, "revision": "m1"}}
    tiny = {"layers": 1, "hidden": 32, "heads": 2, "kv_heads": 1}
    steps = {"learning_rate": 0.001, "max_length": 128}
    stages |= {
        "general": {"kind": "conversations", "path": seeds, "format": "seed_tasks"},
        "told": {"kind": "generate", "input": "general", "prompt": {"user": "$messages"}, "generator": generator},
        "base": {
            "kind": "pretrain", "input": "tokens", "steps": 6, "batch_sequences": 4, "checkpoint_every": 3, "model": tiny,
        },
        "chat": {
            "kind": "sft", "model": "base", "input": "general", "steps": 4, "batch_examples": 4, "checkpoint_every": 2, **steps,
        },
        "scores": {
            "kind": "evaluate", "models": ["base", "chat"], "input": "clean", "packed": "tokens", "max_documents": 5,
            "max_tokens": 256, "prompts": [{"text": "请介绍一下中国的首都。", "lang": "zh"}], "max_new_tokens": 8,
        },
    }  # fmt: skip
    stages["told"]["max_generated_tokens"] = 100_000
    (directory / "recipe.yaml").write_text(yaml.safe_dump(recipe, allow_unicode=True, sort_keys=False), "utf-8")


#: What differs from run to run, or with where the run lies; everything else must be equal to the byte.
_DIFFERS = re.compile(r"manifest\.json|timings|result\.json|tensorboard|evaluation/before\.json")


def comparable(files: dict[str, str]) -> dict[str, str]:
    """Files of stages by their path without the fingerprint: that of a recipe with other paths is another."""
    found = {}
    for name, digest in files.items():
        pieces = name.split("/")
        if len(pieces) > 2 and not name.startswith((".", "log")) and not _DIFFERS.search(name):
            found["/".join([pieces[0], *pieces[2:]])] = digest
    return found


def start(directory: Path, *arguments: str, environment: dict[str, str] | None = None) -> subprocess.Popen[str]:
    with (directory / "log").open("a", encoding="utf-8") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "pipelines", "run", "recipe.yaml", "--limit", "200", *arguments],
            cwd=directory,
            env={**os.environ, **(environment or {}), "PYTHONPATH": str(ROOT)},
            stdout=log,
            stderr=log,
            text=True,
            start_new_session=True,
        )


def finish(process: subprocess.Popen[str], directory: Path) -> None:
    code = process.wait(timeout=400)
    assert code == 0, (directory / "log").read_text(encoding="utf-8")[-4000:]


def outcome(directory: Path, *, every: bool = False) -> dict[str, str]:
    """SHA-256 of every Parquet, bitmap and binary file of the finished stages (or of every file), by its path."""
    run = directory / "runs" / RUN
    kinds = ("*.*",) if every else ("*.parquet", "*.bits", "tokens.bin", "tokenizer.json")
    files = [path for kind in kinds for path in run.glob(f"*/*/**/{kind}") if path.is_file()]
    return {str(path.relative_to(run)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(files)}


def wait_for(process: subprocess.Popen[str], directory: Path, pattern: str) -> None:
    deadline = time.monotonic() + 300
    while not list((directory / "runs" / RUN).glob(pattern)):
        assert process.poll() is None, (directory / "log").read_text(encoding="utf-8")[-4000:]
        assert time.monotonic() < deadline, f"{pattern} never appeared"
        time.sleep(0.02)


def descendants(process: subprocess.Popen[str], word: str) -> list[psutil.Process]:
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        try:
            if word in " ".join(child.cmdline()):
                found.append(child)
        except psutil.Error:
            continue  # it ended while we looked
    return found


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    directory = tmp_path_factory.mktemp("undisturbed")
    write_recipe(directory)
    finish(start(directory, "--workers", "1"), directory)
    for name in STAGES:
        (stage,) = (directory / "runs" / RUN / name).iterdir()
        manifest = shards.load_manifest(str(stage))
        manifest.ledger.check(name)
        assert json.loads((stage / "manifest.json").read_text(encoding="utf-8"))["kind"] == manifest.kind
    return outcome(directory)


def slow_answer(call: Call, number: int) -> Answer:
    time.sleep(0.03)  # a kill is to find replies missing
    return said("答 " + hashlib.sha256(call.text.encode()).hexdigest())


@pytest.mark.slow
def test_the_driver_killed_in_each_stage_then_the_same_command_gives_the_same_bytes(tmp_path: Path) -> None:
    """Corpus, dedup, tokenizer, packing, synthesis, training, evaluation: the recipe grows by the stage that the kill meets."""
    going = threading.Event()
    going.set()

    def answer(call: Call, number: int) -> Answer:
        if number % 10 == 9:
            going.wait(60)
        return slow_answer(call, number)

    model = Server(answer)
    data = str(ROOT / "examples" / "data")
    for name in ("calm", "killed"):
        write_whole_recipe(tmp_path / name, data, model.url)
    finish(start(tmp_path / "calm", "--train-workers", "1"), tmp_path / "calm")
    asked, place = len(model.calls), tmp_path / "killed"
    whole = yaml.safe_load((place / "recipe.yaml").read_text(encoding="utf-8"))
    for number, stage in enumerate(whole["stages"]):
        part = {**whole, "stages": dict(list(whole["stages"].items())[: number + 1])}
        (place / "recipe.yaml").write_text(yaml.safe_dump(part, allow_unicode=True, sort_keys=False), encoding="utf-8")
        if stage == "told":
            going.clear()  # it asks the model, and is to be met in the middle
        process = start(place, "--train-workers", "1")
        wait_for(process, place, f"{stage}/*/*")
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        going.set()
        assert not list((place / "runs" / RUN).glob(f"{stage}/*/manifest.json")), f"the kill came after {stage}"
    finish(start(place, "--train-workers", "1"), place)
    model.close()
    assert comparable(outcome(place, every=True)) == comparable(outcome(tmp_path / "calm", every=True))
    assert len(model.calls) - asked <= asked + 8, "replies that were received are not asked for again"


@pytest.mark.slow
def test_the_head_host_lost_then_the_same_command_on_a_new_cluster_gives_the_same_bytes(
    tmp_path: Path, undisturbed: dict[str, str]
) -> None:
    """No Redis behind it: control process, the head's raylet and, soon after, the nodes are gone. The run says so and ends."""
    write_recipe(tmp_path)
    first = Nodes(tmp_path)
    try:
        first.add(cpus=2)
        process = start(tmp_path, "--address", first.address, environment=CONFIGURATION)
        wait_for(process, tmp_path, "docs/*/units/*.json")
        first.kill_head()
        assert process.wait(timeout=100) == 1
    finally:
        first.close()
    log = (tmp_path / "log").read_text(encoding="utf-8")
    assert f"Ray's control process at {first.address} has not answered for" in log, log[-3000:]
    assert "what was committed stays. Go on with: danlu run" in log, log[-3000:]
    second = Nodes(tmp_path)
    try:
        second.add(cpus=2)
        finish(start(tmp_path, "--address", second.address, environment=CONFIGURATION), tmp_path)
    finally:
        second.close()
    assert outcome(tmp_path) == undisturbed


@pytest.mark.slow
def test_a_killed_child_and_a_killed_worker_cost_only_their_unit(tmp_path: Path, undisturbed: dict[str, str]) -> None:
    write_recipe(tmp_path)
    process = start(tmp_path)
    wait_for(process, tmp_path, "web/*/.scratch")
    for child in descendants(process, "operators.supervise"):
        child.kill()
    wait_for(process, tmp_path, "docs/*/units/*.json")
    for worker in descendants(process, "MapWorker"):
        worker.kill()
    finish(process, tmp_path)
    assert outcome(tmp_path) == undisturbed


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["raylet", "gcs_server"])
def test_ray_itself_killed_then_the_same_command_gives_the_same_bytes(
    tmp_path: Path, undisturbed: dict[str, str], victim: str
) -> None:
    write_recipe(tmp_path)
    process = start(tmp_path)
    wait_for(process, tmp_path, "docs/*/units/*.json")
    (server,) = [found for found in descendants(process, victim) if victim in found.name()]
    server.kill()
    try:
        code = process.wait(timeout=150)
    except subprocess.TimeoutExpired:
        process.kill()
        pytest.fail(f"the run hangs after {victim} was killed: " + (tmp_path / "log").read_text(encoding="utf-8")[-3000:])
    assert code != 0
    finish(start(tmp_path), tmp_path)
    assert outcome(tmp_path) == undisturbed
