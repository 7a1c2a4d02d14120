"""The stage that makes instruction data from documents."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import Field

from cluster import storage
from operators import shards, tables
from operators.config import SettingsError
from operators.ledger import Equation, merge_stats
from operators.stage import StageContext
from operators.synthesis.documents import token_counts
from operators.synthesis.documents.chunks import Chunk, chunk
from operators.synthesis.documents.method import DOCUMENT_INSTRUCTIONS, OPERATOR, Maker, chunk_flow, most_tokens
from operators.synthesis.documents.passage import Passage
from operators.synthesis.documents.quotas import spread
from operators.synthesis.documents.settings import DocumentSettings
from operators.synthesis.flow import Flow, asks_nothing
from operators.synthesis.heuristics import language_of
from operators.synthesis.novelty import NoveltyPool
from operators.synthesis.packaged import resolve_model
from operators.synthesis.requests import Reject
from operators.synthesis.rows import Account
from pipelines.stages.generating import GeneratingStage, Row, follow_rows, listed

_READ = tables.DOCUMENTS.append(pa.field("lang", pa.string()))


class DocumentInstructStage(GeneratingStage, DocumentSettings):
    """Documents to instruction data: chunks, key points, questions with grounded answers or dialogues, and their checks.

    A document is no row of this stage: rows are what is made from it. What became of each document and of each chunk is
    balanced in equations of its own. A unit is committed every 256 chunks.
    """

    kind: Literal["document_instruct"]
    input: str | list[str] = Field(description="stage(s) whose documents are read")

    def input_names(self) -> list[str]:
        return [*listed(self.input), *self.model_stages()]

    def files(self) -> list[str]:
        named = self.chunk.tokenizer
        return [*super().files(), *([named] if named not in ("auto", "estimate") else [])]

    def run(self, context: StageContext) -> None:
        started = time.monotonic()
        settings: DocumentSettings = self.method_settings(DocumentSettings, context)
        generator = self.make_generator(context)
        maker = Maker(self.model_name, generator.revision, context.seed)
        reading = _Reading(self, context, settings)
        novelty = _Settling(context, settings)
        bound = most_tokens(settings)

        def flow_of(row: Row) -> tuple[int, Flow[Account]]:
            if row["passage"] is None:
                return 0, _left(row)
            return bound, chunk_flow(row["passage"], settings, maker)

        def unasked(row: Row, account: Account) -> None:
            if row["passage"] is None:
                _enter(row, account)
                return
            first = bool(row["stats"])
            passage: Passage = row["passage"]
            account.reject(passage.id, "", Reject("token_cap"), source=passage.document)
            _count(row, account, {"documents": {"token_cap": 1}} if first else {}, {"token_cap": 1})

        self.run_rows(
            context, reading.rows(), flow_of, unasked, DOCUMENT_INSTRUCTIONS, generator, settle=novelty.settle
        )  # fmt: skip
        self.finish(context, generator, started, equations=reading.equations(context.directory))

    def token_counts(self, context: StageContext) -> token_counts.TokenCounts:
        """What counts tokens: a function of the settings alone, so that chunks do not depend on what happens to be there."""
        named = self.chunk.tokenizer
        if named == "estimate" or (named == "auto" and self.generator.endpoint is not None):
            return token_counts.estimate
        if named != "auto":
            return token_counts.counts_of(context.path(named))
        folder = resolve_model(self.engine_settings(context).model, context.cache_directory)
        return token_counts.counts_of(storage.join(folder, "tokenizer.json"))


@dataclass
class _Reading:
    """The chunks of all documents in order; documents that give none as items of their own, so that they are counted."""

    stage: DocumentInstructStage
    context: StageContext
    settings: DocumentSettings
    documents: int = 0
    chunks: int = 0
    asked: int = 0
    sources: Counter[str] = field(default_factory=Counter)  # chunks by source; as long as there are sources

    def rows(self) -> Iterator[Row | None]:
        counts = self.stage.token_counts(self.context)
        limit = self.context.limit
        for row in follow_rows(self.context, listed(self.stage.input), _READ):
            if row is None:
                yield None
                continue
            if limit is not None and self.asked >= limit:
                return
            if row["text"] is None:
                names = ", ".join(listed(self.stage.input))
                raise SettingsError(f"stage {self.context.stage}: input {names} has no column `text`: it holds no documents")
            self.documents += 1
            yield from self._items(row, counts)

    def _items(self, row: Row, counts: token_counts.TokenCounts) -> Iterator[Row]:
        text, settings = row["text"], self.settings
        if len(text) > settings.max_document_characters:
            yield _item(row, "too_long", len(text))
            return
        code = (row["lang"] or "").split("-")[0].lower()
        if code and code not in ("en", "zh", "lzh", "yue", "unknown", "und"):
            yield _item(row, "other_language", detail=row["lang"])
            return
        found, short = chunk(text, counts(text), settings.chunk)
        self.chunks += len(found) + short
        if not found:
            yield _item(row, "no_chunk", len(text), chunks={"too_short": short})
            return
        wanted = settings.quota.per_document
        source = row["source"] or ""
        if settings.quota.per_source is not None:
            wanted = min(wanted, settings.quota.per_source - self.sources[source])
        if self.context.limit is not None:
            wanted = min(wanted, self.context.limit - self.asked)
        if wanted <= 0:
            yield _item(row, "source_quota", detail=source, chunks={"left_by_quota": len(found), "too_short": short})
            return
        chosen = spread(found, wanted, self.context.seed, row["id"])
        self.sources[source] += len(chosen)
        self.asked += len(chosen)
        left = {"left_by_quota": len(found) - len(chosen), "too_short": short}
        stats = {
            "documents": {"used": 1},
            "chunks": {name: number for name, number in left.items() if number},
            "chunk_positions": _positions(found, len(text)),
            "asked_positions": _positions(chosen, len(text)),
        }
        for number, item in enumerate(chosen):
            lang: Literal["en", "zh"] = "zh" if language_of(text[item.start : item.end]) == "zh" else "en"
            passage = Passage(row["id"], item.start, item.end, text[item.start : item.end], item.headings, lang)
            yield {"passage": passage, "document": row["id"], "stats": stats if number == 0 else {}, "why": None}

    def equations(self, directory: str) -> list[Equation]:
        """Documents read against what became of them, and chunks likewise; the right sides are sums over committed units."""
        totals: dict[str, Counter[str]] = {"documents": Counter(), "chunks": Counter()}
        for record in shards.committed_units(directory).values():
            for name, counter in totals.items():
                counter.update(record["stats"].get(name, {}))
        return [
            Equation("documents", {"read": self.documents}, dict(sorted(totals["documents"].items()))),
            Equation("chunks", {"cut": self.chunks}, dict(sorted(totals["chunks"].items()))),
        ]


def _positions(found: list[Chunk], length: int) -> dict[str, int]:
    """Histogram of where chunks begin in their document, in tenths of its characters."""
    counter = Counter(f"{min(10 * item.start // max(1, length), 9) / 10:.1f}" for item in found)
    return dict(sorted(counter.items()))


def _item(
    row: Row, reason: str, value: float | None = None, detail: str | None = None, chunks: dict[str, int] | None = None
) -> Row:
    """A document that nothing is asked about."""
    stats = {"documents": {reason: 1}, "chunks": {name: number for name, number in (chunks or {}).items() if number}}
    return {"passage": None, "document": row["id"], "stats": stats, "why": Reject(reason, value, detail)}


def _enter(row: Row, account: Account) -> None:
    account.reject(row["document"], "", row["why"], step="documents")
    merge_stats(account.extra, row["stats"])


def _left(row: Row) -> Flow[Account]:
    """The flow of a document that nothing is asked about."""
    account = Account(OPERATOR)
    _enter(row, account)
    return asks_nothing(account)


def _count(row: Row, account: Account, documents: dict[str, Any], chunks: dict[str, int]) -> None:
    """Add a chunk to the statistics; the first chunk of a document brings those of the document along."""
    stats = {name: dict(values) for name, values in row["stats"].items()}
    if documents:
        stats.update(documents)
    merge_stats(stats.setdefault("chunks", {}), chunks)
    merge_stats(account.extra, stats)


class _Settling:
    """What is decided in the order of the chunks: whether a question is new among earlier ones, and the end of a trial run.

    With `novelty: stage` the questions of the whole stage are pooled (see novelty.NoveltyPool for its memory), with
    `document` those of one document at a time.
    """

    def __init__(self, context: StageContext, settings: DocumentSettings) -> None:
        self._settings, self._limit = settings, context.limit
        self._pool = NoveltyPool()
        self._ids: list[str] = []
        self._document: str | None = None
        self._kept = 0
        done = shards.committed_units(context.directory)
        for number in sorted(done):
            for part in done[number]["parts"]:
                self._take_over(storage.join(context.directory, part["name"]))

    def _take_over(self, path: str) -> None:
        """Pool the questions of a committed unit."""
        with storage.open_input(path) as stream:
            file = pq.ParquetFile(stream)
            for batch in file.iter_batches(batch_size=1024, columns=["id", "source_id", "messages"]):
                self._kept += batch.num_rows
                if self._settings.novelty not in ("document", "stage"):
                    continue
                firsts = pc.list_element(batch.column("messages"), 0)
                questions = pc.struct_field(firsts, "content").to_pylist()
                for row_id, document, question in zip(
                    batch.column("id").to_pylist(), batch.column("source_id").to_pylist(), questions, strict=True
                ):
                    self._open(document)
                    self._add(row_id, question)

    def _open(self, document: str) -> None:
        if self._settings.novelty == "document" and document != self._document:
            self._pool, self._ids, self._document = NoveltyPool(), [], document

    def _add(self, row_id: str, question: str) -> None:
        self._pool.add(question)
        self._ids.append(row_id)

    def settle(self, row: Row, account: Account) -> None:
        if row["passage"] is None:
            return
        _count(row, account, {}, {"asked": 1})
        rows, examples = account.rows, account.examples
        account.rows, account.examples = [], []
        account.ledger.kept -= len(rows)
        account.ledger.created -= len(rows)
        account.languages.clear()
        account.operations.clear()
        for number, made in enumerate(rows):
            why = self._refused(made)
            if why is not None:
                account.reject(made["id"], _shown(made), why, source=row["passage"].id, step="novelty")
            else:
                example = examples[number] if number < len(examples) else None
                account.keep(made, made["provenance"]["operation"], example)
                self._kept += 1

    def _refused(self, made: dict[str, Any]) -> Reject | None:
        if self._limit is not None and self._kept >= self._limit:
            return Reject("left_over", detail="limit")
        if self._settings.novelty not in ("document", "stage"):
            return None
        self._open(made["source_id"])
        question = made["messages"][0]["content"]
        similarity, nearest = self._pool.nearest(question)
        if similarity >= self._settings.max_similarity:
            return Reject("not_novel", round(similarity, 4), self._ids[nearest])
        self._add(made["id"], question)
        return None


def _shown(row: dict[str, Any]) -> str:
    return "\n\n".join(message["content"] for message in row["messages"])
