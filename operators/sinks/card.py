"""The data card of a Hugging Face folder: what the rows are, where they come from, and how they were made."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import yaml

from cluster import storage
from operators import shards
from operators.stage import StageContext

if TYPE_CHECKING:
    from operators.sinks.export import ExportOptions

_SHOWN = 50
_SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"), (10_000_000, "1M<n<10M"),
          (100_000_000, "10M<n<100M"), (1_000_000_000, "100M<n<1B"), (10_000_000_000, "1B<n<10B"), (100_000_000_000, "10B<n<100B"),
          (1_000_000_000_000, "100B<n<1T"))  # fmt: skip
_LANGUAGE = re.compile(r"^[A-Za-z]{2,3}(-[A-Za-z0-9]{2,8})*$")


def render(
    options: ExportOptions,
    context: StageContext,
    schema: pa.Schema,
    written: Sequence[Mapping[str, Any]],
    counts: Mapping[str, Any],
    directories: Sequence[str],
) -> str:
    """README.md: YAML front matter that `datasets` reads, then tables for people."""
    title = options.title or context.stage
    rows, size = sum(entry["rows"] for entry in written), sum(entry["bytes"] for entry in written)
    lines = ["---", _front_matter(options, title, schema, rows, size, counts), "---", "", f"# {title}", ""]
    if options.description:
        lines += [options.description.strip(), ""]
    lines += ["| | |", "|---|---|", f"| rows | {rows:,} |", f"| files | {len(written):,}, {size:,} bytes |"]
    if "text_bytes" in counts:
        lines.append(f"| text | {counts['text_bytes']:,} bytes of UTF-8 |")
    lines += [
        "",
        "```python",
        "from datasets import load_dataset",
        f'rows = load_dataset("PATH", split="{options.split}")',
        "```",
        "",
    ]
    lines += [
        "## Columns",
        "",
        "| column | type |",
        "|---|---|",
        *(f"| `{cell(f.name)}` | {cell(str(f.type))} |" for f in schema),
        "",
    ]
    for heading, key in (("Languages", "languages"), ("Sources", "sources"), ("Licences", "licenses")):
        if counts.get(key):
            lines += [f"## {heading}", "", f"| {heading.lower()[:-1]} | rows |", "|---|---|", *_table(counts[key]), ""]
    return "\n".join([*lines, *made(context, directories)])


def _front_matter(options: ExportOptions, title: str, schema: pa.Schema, rows: int, size: int, counts: Mapping[str, Any]) -> str:
    from datasets import DatasetInfo, Features, SplitDict, SplitInfo
    from datasets.info import DatasetInfosDict
    from huggingface_hub import DatasetCardData

    languages = sorted({name for name in counts.get("languages", {}) if _LANGUAGE.match(name)})
    data = DatasetCardData(
        pretty_name=title,
        language=languages or None,
        license=options.license,
        size_categories=[next((name for bound, name in _SIZES if rows < bound), "n>1T")],
        tags=["danlu"],
        configs=[{"config_name": "default", "data_files": [{"split": options.split, "path": f"data/{options.split}-*.parquet"}]}],
    )
    split = SplitInfo(options.split, num_bytes=counts.get("bytes", 0), num_examples=rows)
    info = DatasetInfo(
        features=Features.from_arrow_schema(schema),
        splits=SplitDict({options.split: split}),
        download_size=size,
        dataset_size=counts.get("bytes", 0),
    )
    DatasetInfosDict({"default": info}).to_dataset_card_data(data)
    return str(data.to_yaml())


def _table(values: Mapping[str, int]) -> list[str]:
    ranked = sorted(values.items(), key=lambda item: (-item[1], item[0]))
    lines = [f"| {cell(name) or '(unknown)'} | {rows:,} |" for name, rows in ranked[:_SHOWN]]
    if len(ranked) > _SHOWN:
        lines.append(f"| {len(ranked) - _SHOWN} others | {sum(rows for _, rows in ranked[_SHOWN:]):,} |")
    return lines


def cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def made(context: StageContext, directories: Sequence[str]) -> list[str]:
    """The stages that the rows went through, each with its account of rows, and their settings."""
    stages = lineage(directories)
    told = f"{context.kind.capitalize()} `{context.stage}` ({context.fingerprint}) of these stages, in this order:"
    lines = ["## How it was made", "", told, ""]
    lines += ["| stage | kind | fingerprint | in | kept | rejected | quarantined |", "|---|---|---|---|---|---|---|"]
    for manifest in stages:
        ledger = manifest.ledger
        lines.append(
            f"| {manifest.stage} | {manifest.kind} | `{manifest.fingerprint}` | {ledger.rows_in + ledger.created:,} | "
            f"{ledger.kept:,} | {ledger.rejected.total():,} | {ledger.quarantined:,} |"
        )
    reasons = [(m.stage, reason, rows) for m in stages for reason, rows in m.ledger.rejected.items()]
    if reasons:
        lines += ["", "| stage | rejected for | rows |", "|---|---|---|"]
        ranked = sorted(reasons, key=lambda item: (-item[2], item[0], item[1]))[:_SHOWN]
        lines += [f"| {stage} | {cell(reason)} | {rows:,} |" for stage, reason, rows in ranked]
    recipe = {manifest.stage: manifest.config for manifest in stages} | {context.stage: context.config}
    text = yaml.safe_dump({"seed": context.seed, "stages": recipe}, sort_keys=False, allow_unicode=True, width=120)
    return [*lines, "", "The settings, every default written out:", "", "````yaml", text.rstrip(), "````", ""]


def lineage(directories: Sequence[str]) -> list[shards.Manifest]:
    """The manifests of stages and of all that they were made from, inputs first, each once."""
    found: dict[str, shards.Manifest] = {}

    def visit(directory: str) -> None:
        if directory in found:
            return
        manifest = shards.load_manifest(directory)
        for place in manifest.inputs.values():
            visit(storage.join(shards.run_directory(directory), place))
        found[directory] = manifest

    for directory in directories:
        visit(directory)
    return list(found.values())
