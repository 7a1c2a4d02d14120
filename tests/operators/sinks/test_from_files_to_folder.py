"""A recipe from files of many formats to a Hugging Face folder, its units done in this process."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from operators import shards
from operators.stage import StageContext
from operators.supervise import Report, Task
from pipelines.graph import plan
from pipelines.recipe import parse_recipe
from tests.operators.sources.test_pdf import pdf
from tests.operators.sources.test_wikipedia import HEAD, page

RECIPE = """
name: demo
stages:
  web: {kind: corpus, read: {path: in, csv: {quoted_newlines: true}}, operators: [fix_text]}
  packed: {kind: export, input: web}
  hub: {kind: export, input: packed, format: huggingface, path: out, columns: [id, text, source]}
"""


@pytest.fixture
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(context: Any, target: str, units: list[dict[str, Any]], limits: Any, **rest: Any) -> None:
        module, _, function = target.partition(":")
        for unit in json.loads(json.dumps(units)):
            getattr(importlib.import_module(module), function)(Task(unit), Report(lambda message: None))

    monkeypatch.setattr("operators.corpus.run_units", run)
    monkeypatch.setattr("operators.sinks.export.run_units", run)


def test_every_row_of_every_format_arrives_or_is_accounted_for(one_process: None, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.csv").write_bytes('id,text\n1,"第一篇，\n两行"\n2,第二篇\n坏行\n'.encode("gb18030"))
    (folder / "b.md").write_text("# 标题\n\n正文。", "utf-8")
    (folder / "c.pdf").write_bytes(pdf([["论文第一页。"], ["Second page."]]))
    (folder / "d.pdf").write_bytes(pdf([["secret"]], encrypted=True))
    pages = page(1, "'''条目'''。") + page(2, "#REDIRECT [[条目 1]]", redirect="条目 1")
    (folder / "zhwiki-pages-articles.xml").write_text(f"{HEAD}{pages}</mediawiki>", "utf-8")
    recipe = parse_recipe(RECIPE)
    done: dict[str, str] = {}
    for node in plan(recipe, str(tmp_path / "runs" / "demo"), str(tmp_path), None):
        inputs = {name: done[name] for name in node.inputs}
        node.stage.run(
            StageContext(
                node.name, node.stage.kind, node.directory, node.fingerprint, node.config, inputs, 0, base_directory=str(tmp_path)
            )
        )
        done[node.name] = node.directory
    web = shards.load_manifest(done["web"])
    assert web.ledger.to_json() == {"in": 8, "created": 0, "kept": 5, "rejected": {"read:redirect": 1}, "quarantined": 2}
    assert web.stats["quarantine"] == {"read:bad_csv": 1, "read:encrypted": 1}
    packed = shards.load_manifest(done["packed"])
    assert [part["rows"] for part in packed.parts] == [5]
    assert [name for name, _ in packed.schema] == ["id", "text", "source", "url", "title"]
    written = [entry["name"] for entry in shards.load_manifest(done["hub"]).files["export"]["files"]]
    texts = [text for name in written for text in pq.read_table(tmp_path / "out" / name)["text"].to_pylist()]
    assert texts == ["第一篇，\n两行", "第二篇", "# 标题\n\n正文。", "论文第一页。\n\nSecond page.", "条目。"]
    assert "| web | corpus |" in (tmp_path / "out" / "README.md").read_text("utf-8")
