"""What a recipe may say about its input, and what is refused before anything starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from operators.config import SettingsError
from pipelines.describe import describe_one
from pipelines.recipe import parse_recipe

RECIPE = """
name: demo
stages:
  tables: {kind: corpus, read: {format: csv, path: a.csv, text_column: 正文, csv: {delimiter: ";", quoted_newlines: false}}}
  papers: {kind: corpus, read: {format: pdf, path: papers, pdf: {page_break: "\\f", max_pages: 500}}}
  wiki: {kind: corpus, read: {format: wikipedia, path: dumps, wikipedia: {namespaces: [0, 12], tables: drop}}}
  hub: {kind: corpus, read: {format: huggingface, path: saved, split: train}}
  notes: {kind: corpus, read: {format: markdown, path: notes, encoding: gb18030}}
  all: {kind: export, input: [tables, papers, wiki, hub, notes], format: huggingface, path: out}
"""


def test_every_format_has_its_settings_in_a_recipe(tmp_path: Path) -> None:
    stages = parse_recipe(RECIPE).stages
    assert stages["all"].input_names() == ["tables", "papers", "wiki", "hub", "notes"]
    (tmp_path / "a.csv").write_text("正文;n\n第一篇;1\n", "utf-8")
    stages["tables"].preflight(str(tmp_path))
    (tmp_path / "a.csv").write_text("text;n\n第一篇;1\n", "utf-8")
    with pytest.raises(SettingsError, match=r"no column '正文' \(read.text_column\); its columns: text, n"):
        stages["tables"].preflight(str(tmp_path))


@pytest.mark.parametrize(
    ("read", "message"),
    [
        ("{path: a, format: cvs}", "stages.web.read.format: Input should be"),
        ("{path: a, csv: {delimeter: x}}", "unknown key 'delimeter'; did you mean 'delimiter'"),
        ("{path: a, csv: {delimiter: '::'}}", "one ASCII character"),
        ("{path: a, format: jsonl, pdf: {max_pages: 3}}", "pdf: is for format pdf, the format is jsonl"),
        ("{path: a, format: pdf, columns: [n]}", "columns: files of format pdf have no named columns"),
        ("{path: a, format: html, encoding: klingon}", "'klingon' is no encoding"),
    ],
)
def test_wrong_settings_are_named(read: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        parse_recipe(f"{{name: demo, stages: {{web: {{kind: corpus, read: {read}}}}}}}")


def test_readers_and_the_export_document_themselves() -> None:
    corpus, export = "\n".join(describe_one("corpus")), "\n".join(describe_one("export"))
    assert all(name in corpus for name in ("quoted_newlines", "page_break", "namespaces", "wikipedia", "huggingface"))
    assert all(name in export for name in ("target_bytes", "jsonl.zst", "compaction"))
