"""The run report: one HTML file that needs nothing but itself.

Every number comes from the manifests and timings of the run's stages; example rows come from the beginnings of a few
files. All text is escaped, invisible characters are spelled out, and a content security policy that knows the page's own
style and script by their hashes forbids everything else, so that no text of a corpus can ever act.
"""

from __future__ import annotations

import base64
import functools
import hashlib
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2
import pyarrow as pa
from markupsafe import Markup

from cluster import storage
from operators import tombstones
from pipelines.progress import clock
from pipelines.report import (
    accounts,
    charts,
    corpus,
    diagnosis,
    dialogues,
    differences,
    evaluation,
    excerpts,
    figures,
    lineage,
    resources,
    samples,
    spending,
    training,
)
from pipelines.report.view import CHOOSING_KINDS, SYNTHESIS_KINDS, TRAINING_KINDS, Now, RunView, StageView, load_run
from pipelines.symptom_texts import NOTES, VERDICTS

_HERE = Path(__file__).parent
MAX_CLUSTER_BINS = 24
EXAMPLE_CHARACTERS = 2000  # where dedup stages cut the texts of their examples
_POLICY = "default-src 'none'; base-uri 'none'; form-action 'none'"


def build_report(run_directory: str) -> str:
    """Write `report.html` into `runs/NAME` and return its path.

    Runs that failed or have not finished get a report that says so. Raises FileNotFoundError when the directory holds
    no run.json, ValueError when that is damaged.
    """
    return Report(run_directory).write()


class Report:
    """The report of one run, written again and again: what finished stages have left is read once."""

    def __init__(self, run_directory: str) -> None:
        self._directory = run_directory
        self._finished: dict[str, StageView] = {}
        self._read: dict[tuple[str, str], Any] = {}

    def write(self, now: Now | None = None) -> str:
        """Write the page and return its path; with `now` it says so and loads itself again. Raises as `build_report`."""
        run = load_run(self._directory, now, self._finished)
        path = storage.join(run.directory, "report.html")
        storage.write_bytes(path, render(run, self._read).encode("utf-8"))
        return path


def render(run: RunView, read: dict[tuple[str, str], Any] | None = None) -> str:
    """The page as text. `read` keeps the example rows of finished stages."""
    css, script = (_HERE / "report.css").read_text("utf-8"), (_HERE / "report.js").read_text("utf-8")
    rows = accounts.accounts(run)
    usages, placed = resources.usages(run)
    diagnosed = diagnosis.diagnoses(run)
    page = (
        _environment()
        .get_template("page.jinja")
        .render(
            **_readers({} if read is None else read),
            run=run,
            policy=f"{_POLICY}; style-src 'sha256-{_hash(css)}'; script-src 'sha256-{_hash(script)}'",
            css=Markup(css),
            script=Markup(script),
            sections=_sections(run, diagnosed),
            verdict=accounts.verdict(run),
            started=_moment(run.started),
            as_of="" if run.now is None else _moment(datetime.fromtimestamp(run.now.as_of, UTC).isoformat()),
            problems=accounts.stage_problems(run),
            unfinished=[stage for stage in run.stages if stage.status in ("pending", "running", "failed")],
            figures=accounts.key_figures(run),
            lineage=lineage.drawing(run),
            accounts={account.stage.name: account for account in rows},
            balances=accounts.balances(run),
            takedowns=tombstones.records(run.directory),
            classifier_stages=run.of_kind("quality_classifier"),
            corpus_stages=run.of_kind("corpus", "curate"),
            dedup_stages=run.of_kind("dedup"),
            choosing_stages=run.of_kind(*CHOOSING_KINDS),
            token_stages=run.of_kind("tokenizer", "pack"),
            synthesis_stages=run.of_kind("conversations", *SYNTHESIS_KINDS),
            preference_stages=run.of_kind("preferences", "rankings"),
            training_stages=run.of_kind(*TRAINING_KINDS),
            training_summaries=training.summaries(run),
            training_compared=training.compared(run),
            training_panels=training.panels(run),
            training_kinds=TRAINING_KINDS,
            evaluate_stages=run.of_kind("evaluate"),
            diagnoses=diagnosed,
            verdicts=VERDICTS,
            mend_before=NOTES["mend_before"],
            usages=usages,
            usages_placed=placed,
            spendings=spending.spendings(run),
            versions=resources.versions(run),
            gpus=_gpus(run.machine.get("gpus")),
        )
    )
    return page


@functools.cache
def _environment() -> jinja2.Environment:
    """The templates, compiled once: that takes four times as long as a page."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_shown,
    )
    environment.globals.update(_functions())
    return environment


def _sections(run: RunView, diagnosed: diagnosis.Diagnoses) -> list[str]:
    """Sections whose kinds of stage the recipe has, in reading order."""
    kinds = {stage.kind for stage in run.stages}
    wanted = {
        "corpus": {"corpus", "quality_classifier", "curate"},
        "duplicates": {"dedup"},
        "choosing": set(CHOOSING_KINDS),
        "tokens": {"tokenizer", "pack"},
        "synthesis": {"conversations", *SYNTHESIS_KINDS},
        "preferences": {"preferences", "rankings"},
        "training": set(TRAINING_KINDS),
        "evaluation": {"evaluate"},
    }
    found = [key for key, needs in wanted.items() if needs & kinds]
    if diagnosed.found or diagnosed.problem:
        found.append("diagnosis")
    return ["lineage", "ledger", *found, "resources", "recipe"]


def _functions() -> dict[str, Any]:
    """What templates may call."""
    return {
        "t": excerpts.translated,
        "both": excerpts.both,
        "term": excerpts.term,
        "excerpt": excerpts.excerpt,
        "marked": excerpts.marked,
        "number": figures.number,
        "percent": figures.percent,
        "duration": figures.duration,
        "clock": clock,
        "size": figures.size,
        "anchor": lineage.anchor,
        "histogram": charts.histogram,
        "rate": charts.rate,
        "bar": _bar,
        "distribution": corpus.distribution,
        "funnel": corpus.funnel,
        "lengths": corpus.lengths,
        "tenths": corpus.tenths,
        "numeric_order": corpus.numeric_order,
        "ordered": lambda counts: [(key, counts[key]) for key in corpus.numeric_order(counts)],
        "measured": measured,
        "length_facts": length_facts,
        "cluster_bins": cluster_bins,
        "duplicate_examples": duplicate_examples,
        "measure_title": training.measure_title,
        "models": evaluation.models,
        "perplexities": evaluation.perplexities,
        "perplexity_chart": lambda stage: evaluation.perplexity_chart(
            stage, lambda row: " ".join(filter(None, (row.lang, row.source))).removesuffix(" *")
        ),
        "model_legend": lambda names: [(evaluation.style(index), name) for index, name in enumerate(names)],
        "style": evaluation.style,
        "samples": evaluation.samples,
        "set_table": evaluation.set_table,
        "set_changes": evaluation.set_changes,
        "retention": evaluation.retention,
    }


def _readers(kept: dict[tuple[str, str], Any]) -> dict[str, Any]:
    """The functions that read rows. Where a file is gone or damaged they give nothing, and the page says so."""
    unreadable: dict[str, list[str]] = {}

    def guarded(read: Callable[[StageView], Any], nothing: Any) -> Callable[[StageView], Any]:
        def reader(stage: StageView) -> Any:
            key = (read.__name__, stage.directory)
            try:
                if key not in kept or stage.manifest is None:
                    kept[key] = read(stage)
                return kept[key]
            except (OSError, pa.ArrowException) as error:
                problems = unreadable.setdefault(stage.name, [])
                if str(error) not in problems:
                    problems.append(str(error))
                return nothing

        return reader

    rejected = guarded(samples.rejected_rows, {})
    return {
        "unreadable": unreadable,
        "reasons": lambda stage: corpus.reasons(stage, rejected(stage)),
        "quarantined": lambda stage: corpus.quarantined(stage, rejected(stage)),
        "dialogues": guarded(dialogues.dialogues, []),
        "pairs": guarded(dialogues.pairs, []),
    }


def _shown(value: Any) -> Any:
    """Applied by the template engine to everything it prints: invisible characters in any plain string are spelled out."""
    return excerpts.visible(value) if type(value) is str else value


def _bar(value: figures.Number, total: figures.Number, style: str) -> Markup:
    return charts.bar([charts.Segment(value, style, f"{figures.number(value)} · {figures.percent(value, total)}")], total)


_SHOWN_APART = frozenset({"usage", "rounds", "novelty", "operations", "languages", "margins", "sources", "examples", "mixture"})


def length_facts(stage: StageView) -> list[tuple[Markup, str]]:
    """What a preference stage measured of lengths, and how far its judge agrees with itself: (name, value)."""
    found = stage.counts("length_bias", "all")
    names = {
        "correlation": "preferences.correlation",
        "chosen_longer": "preferences.chosen_longer",
        "chosen_shorter": "preferences.chosen_shorter",
        "length_ratio": "preferences.length_ratio",
    }
    facts = [(excerpts.translated(key), figures.number(found[name])) for name, key in names.items() if name in found]
    if "judge_consistency" in stage.stats:
        facts.append((excerpts.translated("preferences.consistency"), figures.percent(stage.count("judge_consistency"), 1)))
    return facts


def measured(stage: StageView) -> list[tuple[str, dict[str, figures.Number], bool]]:
    """What a method of synthesis counted beside what has a place of its own: (name, counts, whether the keys are numbers)."""
    found = []
    for name in stage.stats:
        counts = {} if name in _SHOWN_APART else stage.counts(name)
        if 1 < len(counts) <= MAX_CLUSTER_BINS:
            found.append((name.replace("_", " "), counts, all(corpus.is_number(key) for key in counts)))
    return found


def cluster_bins(clusters: dict[str, figures.Number]) -> list[tuple[str, figures.Number]]:
    """Cluster sizes in order; where there are many, those from some size on stand together."""
    keys = corpus.numeric_order(clusters)
    bins = [(key, clusters[key]) for key in keys[:MAX_CLUSTER_BINS]]
    if len(keys) > MAX_CLUSTER_BINS:
        bins[-1] = (f"≥{keys[MAX_CLUSTER_BINS - 1]}", sum(clusters[key] for key in keys[MAX_CLUSTER_BINS - 1 :]))
    return bins


def duplicate_examples(stage: StageView) -> list[dict[str, Any]]:
    """Example pairs of a dedup stage with their differences."""
    found = []
    for item in stage.stats.get("examples", [])[:5]:
        if isinstance(item, dict):
            kept, removed = str(item.get("kept_text") or ""), str(item.get("removed_text") or "")
            clipped = max(len(kept), len(removed)) >= EXAMPLE_CHARACTERS
            shown = {name: item.get(name) for name in ("kept", "removed", "similarity")}
            found.append({**shown, "pieces": differences.difference(kept, removed, clipped)})
    return found


def _moment(written: str) -> str:
    """An ISO time without its fractions of a second."""
    try:
        return datetime.fromisoformat(written).replace(microsecond=0).isoformat(sep=" ")
    except ValueError:
        return written


def _gpus(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(str(item.get("name", item)) if isinstance(item, dict) else str(item) for item in value)
    return str(value) if value else ""


def _hash(content: str) -> str:
    """The hash by which a content security policy knows an inline style or script."""
    return base64.b64encode(hashlib.sha256(content.encode("utf-8")).digest()).decode("ascii")
