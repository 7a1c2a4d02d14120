"""The row-local filters of the FineWeb order over the texts of one Parquet file by one tool; prints one JSON line.

usage: PYTHON fineweb_order.py TOOL PARQUET MODEL OUT.json

Order: language ID, Gopher repetition, Gopher quality, C4 (without its rule on line ends), FineWeb. Timed are CPU seconds of
the process: once as a chain, where a rejected document goes no further, with and without language ID; once all filters over
every document, where each tool uses words again that it has; and once each filter over every document by itself. Reading,
imports and loading of models are not timed, and some documents go through beforehand, so that nothing is compiled or loaded
within the measurement. OUT gets the operator and reason of each document.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

for variable in ("NUMBA_NUM_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(variable, "1")

import pyarrow as pa  # noqa: E402 - after the number of threads
import pyarrow.parquet as pq  # noqa: E402

THRESHOLD = 0.65  # datatrove's and FineWeb's
_BATCH = 1000
_AT_LEAST_S = 1.0


def _timed(work: Callable[[], Any], at_least_s: float = 0.0) -> float:
    """CPU seconds of one run, over as many runs as fill `at_least_s`."""
    runs, start = 0, time.process_time()
    while True:
        work()
        runs += 1
        passed = time.process_time() - start
        if passed >= at_least_s:
            return passed / runs


def danlu(table: pa.Table, model: str, out: str) -> dict[str, Any]:
    sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
    from operators.chain import Chain
    from operators.operator import Filter
    from operators.text.analysis import Analysis

    pa.set_cpu_count(1)
    language: dict[str, Any] = {"detect_language": {"keep": ["en"], "threshold": THRESHOLD, "model": model}}
    if table["lang"][0].as_py() == "zh":
        language = {"detect_language": {"keep": ["zh"], "model": model}}
    filters = ["gopher_repetition", "gopher_quality", "c4_quality", "fineweb_quality"]
    table = table.select(["id", "text", "source"]).set_column(1, "text", table["text"].cast(pa.large_string()))
    batches = [table.slice(start, _BATCH).combine_chunks() for start in range(0, table.num_rows, _BATCH)]
    chain, without = Chain([language, *filters]), Chain(filters)
    chain.run(table.slice(0, 200).combine_chunks())

    decisions: dict[str, list[str]] = {}
    for batch in batches:
        for rejects in chain.run(batch).rejects:
            for row in rejects.select(["id", "operator", "reason"]).to_pylist():
                decisions[row["id"]] = [row["operator"], row["reason"]]
    result: dict[str, Any] = {
        "chain": _timed(lambda: [chain.run(batch) for batch in batches], _AT_LEAST_S),
        "without_language": _timed(lambda: [without.run(batch) for batch in batches], _AT_LEAST_S),
    }
    result["each"] = each = {}
    own: dict[str, list[str | None]] = {}
    for operator in chain.operators:

        def alone(operator: Any = operator) -> list[Any]:
            if isinstance(operator, Filter):  # measured and decided; its words and lines are its own
                return [operator.process(batch, Analysis.of(batch["text"])) for batch in batches]
            return [operator.process(batch) for batch in batches]

        each[operator.name] = _timed(alone, _AT_LEAST_S / 2)
        own[operator.name] = [reason for verdict in alone() for reason in verdict.reason.to_pylist()]

    def shares() -> None:
        for batch in batches:
            analysis = Analysis.of(batch["text"])
            for name in ("characters", "scripts", "lines", "words"):
                start = time.process_time()
                getattr(analysis, name)
                spent[name] = spent.get(name, 0.0) + time.process_time() - start
            for operator in chain.operators:
                start = time.process_time()
                operator.process(batch, analysis)
                spent[operator.name] = spent.get(operator.name, 0.0) + time.process_time() - start

    spent: dict[str, float] = {}
    result["all"] = _timed(shares, _AT_LEAST_S)
    result["share"] = {name: seconds / sum(spent.values()) for name, seconds in spent.items()}
    ids = table["id"].to_pylist()
    Path(out).write_text(json.dumps({"chain": [decisions.get(id_) for id_ in ids], "each": own}), "utf-8")
    return result


def datatrove(table: pa.Table, model: str, out: str) -> dict[str, Any]:
    from datatrove.data import Document
    from datatrove.pipeline.filters import (
        C4QualityFilter,
        FineWebQualityFilter,
        GopherQualityFilter,
        GopherRepetitionFilter,
        LanguageFilter,
    )
    from datatrove.utils.text import split_into_parts
    from fasttext.FastText import _FastText

    language = LanguageFilter(languages=["en"], language_threshold=THRESHOLD)
    language.model._model = _FastText(model)  # the file that Danlu reads: its own would be downloaded
    filters: dict[str, Any] = {
        "detect_language": language,
        "gopher_repetition": GopherRepetitionFilter(),
        "gopher_quality": GopherQualityFilter(),
        "c4_quality": C4QualityFilter(filter_no_terminal_punct=False),
        "fineweb_quality": FineWebQualityFilter(),
    }
    texts, ids = table["text"].to_pylist(), table["id"].to_pylist()

    def judge(one: Any, document: Document) -> str | None:
        verdict = one.filter(document)
        if verdict is True:
            return None
        return verdict[1] if isinstance(verdict, tuple) else "language"

    def chained(names: list[str], texts: list[str]) -> list[list[str] | None]:
        found: list[list[str] | None] = []
        for id_, text in zip(ids, texts, strict=False):
            document, outcome = Document(text=text, id=id_), None
            for name in names:  # words stay in datatrove's cache from one filter to the next
                reason = judge(filters[name], document)
                if reason is not None:
                    outcome = [name, reason]
                    break
            found.append(outcome)
        return found

    chained(list(filters), texts[:5])
    result: dict[str, Any] = {"each": {}}
    own: dict[str, list[str | None]] = {}
    decided: list[list[str] | None] = []
    result["chain"] = _timed(lambda: decided.extend(chained(list(filters), texts)))
    result["without_language"] = _timed(lambda: chained(list(filters)[1:], texts))
    result["all"] = _timed(
        lambda: [judge(one, Document(text=text, id=id_)) for id_, text in zip(ids, texts, strict=True) for one in filters.values()]
    )
    for name, one in filters.items():
        split_into_parts.cache_clear()
        own[name] = []
        result["each"][name] = _timed(
            lambda one=one, into=own[name]: into.extend(  # type: ignore[misc]
                judge(one, Document(text=text, id=id_)) for id_, text in zip(ids, texts, strict=True)
            )
        )
    Path(out).write_text(json.dumps({"chain": decided, "each": own}), "utf-8")
    return result


if __name__ == "__main__":
    tool, parquet, model_path, out_path = sys.argv[1:]
    measured = {"danlu": danlu, "datatrove": datatrove}[tool](pq.read_table(parquet), model_path, out_path)
    print(json.dumps(measured))
