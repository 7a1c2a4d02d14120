"""Stages run as a recipe runs them, in a run directory with a recording as the engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from operators import shards
from operators.config import parse
from operators.stage import Stage, StageContext
from tests.operators.synthesis.recorded import Recording

SEED_TEXTS = ["Name a river in Asia.", "Tell a joke about cats.", "List two metals.", "Explain gravity briefly."]
SEED_TEXTS += ["说出亚洲的一条河。", "讲一个关于猫的笑话。", "列出两种金属。", "简要解释重力。"]
SEEDS = [
    {"id": f"s{n}", "name": "", "instruction": text, "instances": [{"input": "", "output": "fine"}], "is_classification": False}
    for n, text in enumerate(SEED_TEXTS)
]


class Bench:
    """Runs stages in a run directory with a recording as the engine."""

    def __init__(self, root: Path) -> None:
        self.run = root / "runs" / "test"
        self.seeds = root / "seeds.jsonl"
        self.seeds.write_text("".join(json.dumps(seed, ensure_ascii=False) + "\n" for seed in SEEDS), "utf-8")
        self.directories: dict[str, str] = {}

    def stage(
        self, model: type[Stage], name: str, values: dict[str, Any], recording: Recording | None, **context: Any
    ) -> shards.Manifest:
        built = parse(model, {"kind": name.split("-")[0], **values}, name)
        directory = str(self.run / name / "f0")
        self.directories[name] = directory

        def engine(settings: Any) -> Any:
            if recording is None:
                pytest.fail("everything is cached: the engine must not be started")
            return recording

        built.run(
            StageContext(
                name, built.kind, directory, "f0", built.model_dump(mode="json"),
                {wanted: self.directories[wanted] for wanted in built.input_names()}, 17,
                cache_directory=str(self.run.parent / ".cache"), services={"engine": engine}, **context,
            )
        )  # fmt: skip
        return shards.load_manifest(directory)

    def rows(self, name: str) -> list[dict[str, Any]]:
        return [
            row for part in shards.parts([self.directories[name]]) for _, batch in shards.read(part) for row in batch.to_pylist()
        ]

    def forget(self, name: str) -> dict[str, bytes]:
        """Remove a stage's directory as if it had never run; returns its Parquet files."""
        directory = Path(self.directories[name])
        files = {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*.parquet"))}
        for path in sorted(directory.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        return files
