"""The row-local part of a `curate` stage: work units of conversations through the fused chain, each committed with its ledger.

A unit is a run of kept rows of the inputs. It is read in batches; beside the rows the chain sees a column `text`, all that
was said, so that operators for documents (`bad_words`, `decontaminate`, `filter_perplexity`) work on conversations too.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cluster import storage
from operators import registry, shards, tables
from operators.chain import Chain
from operators.config import SettingsError
from operators.ledger import Ledger, merge_stats
from operators.operator import Operator
from operators.supervise import Report, Task
from operators.synthesis.curate.set_operator import SetOperator
from operators.synthesis.curate.turns import Turns, whole_text
from operators.tokens.window import Span, read_span

TEXT = "text"
Entry = str | dict[str, Any]
KEY_COLUMN = re.compile(r"\d\d\.")


def key_column(place: int, key: str) -> str:
    """The column of a set operator's key among the working rows."""
    return f"{place:02d}.{key}"


def split_entries(entries: Sequence[Entry]) -> tuple[list[Entry], list[tuple[int, Entry]]]:
    """(row-local operators, set operators with their places). Raises SettingsError for a row-local one behind a set
    operator, and for one that changes text or does not work on conversations."""
    local: list[Entry] = []
    whole: list[tuple[int, Entry]] = []
    for place, entry in enumerate(entries):
        kind = registry.load(registry.split(entry)[0])
        if issubclass(kind, SetOperator):
            whole.append((place, entry))
            continue
        if whole:
            raise SettingsError(
                f"operator {kind.name} looks at single rows and must stand before those that look at the whole set, "
                f"such as {registry.load(registry.split(whole[0][1])[0]).name}"
            )
        local.append(entry)
    return local, whole


def check_local(operator: Operator) -> None:
    """Raises SettingsError for an operator that would change text, or that wants columns which no conversation has."""
    if operator.changes_text:
        raise SettingsError(
            f"operator {operator.name} changes text, so it does not work on conversations (an `action` that drops does)"
        )
    strange = [name for name in operator.needs if name not in ("messages", TEXT, "lang", "id", "tools")]
    if strange:
        raise SettingsError(f"operator {operator.name} needs the columns {strange}, which conversations do not have")


def input_schema(parts: Sequence[shards.Part]) -> pa.Schema:
    """The columns of all parts; types that differ are widened. Raises SettingsError for rows that are no conversations."""
    known: dict[str, pa.Schema] = {}
    for part in parts:
        folder = part.path.rsplit("/parts/", 1)[0]
        if folder in known:
            continue
        with storage.open_input(part.path) as stream:
            known[folder] = pq.read_schema(stream).remove_metadata()
        if "messages" not in known[folder].names or "id" not in known[folder].names:
            raise SettingsError(f"{folder} holds no conversations (columns id and messages); it has {known[folder].names}")
        if TEXT in known[folder].names:
            raise SettingsError(f"{folder} has a column {TEXT!r}, which a curate stage makes for itself")
    try:
        return pa.unify_schemas(list(known.values()), promote_options="permissive") if known else tables.CONVERSATIONS
    except pa.ArrowTypeError as error:
        raise SettingsError(f"the inputs do not go together: {error}") from error


def read_rows(span: Span, schema: pa.Schema, batch_rows: int) -> Iterator[pa.Table]:
    """The span's rows with the columns of the schema (null where a part lacks one), at most `batch_rows` at once."""
    optional = [name for name in schema.names if name not in ("id", "messages")]
    pending: list[pa.Table] = []
    rows = 0
    for batch in read_span(span, ["id", "messages"], optional):
        columns = [_typed(batch.column(item.name), item.type) for item in schema]
        table = pa.Table.from_arrays(columns, schema=schema)
        while rows + table.num_rows >= batch_rows:
            head = table.slice(0, batch_rows - rows)
            yield pa.concat_tables([*pending, head])
            table, pending, rows = table.slice(head.num_rows), [], 0
        if table.num_rows:
            pending.append(table)
            rows += table.num_rows
    if pending:
        yield pa.concat_tables(pending)


def _typed(column: pa.Array, kind: pa.DataType) -> pa.Array:
    if column.type == kind:
        return column
    return pa.nulls(len(column), kind) if column.null_count == len(column) else column.cast(kind)


@functools.lru_cache(maxsize=4)
def _chain(local: str, whole: str) -> tuple[Chain, list[tuple[int, SetOperator]]]:
    operators = [(place, registry.build(entry)) for place, entry in json.loads(whole)]
    return Chain(json.loads(local), "seen"), [(place, item) for place, item in operators if isinstance(item, SetOperator)]


def curate_unit(task: Task, report: Report) -> dict[str, Any]:
    """One unit in the supervised child: read, run the chain, add the keys of the set operators, write, commit.

    A probe only runs the chain.
    """
    given = task.arguments
    raw = given["span"]
    span = Span(tuple(shards.Part(**part) for part in raw["parts"]), raw["skip"], raw["rows"])
    schema = pa.ipc.read_schema(pa.py_buffer(bytes.fromhex(given["schema"])))
    if task.unreadable is not None:
        raise RuntimeError(
            f"{span.parts[0].path}: reading {span.rows} rows of a finished stage ends the process: {task.unreadable}"
        )
    report.alive()
    chain, whole = _chain(json.dumps(given["local"]), json.dumps(given["whole"]))
    writer = shards.UnitWriter(given["directory"], given["unit"]["index"]) if task.probe is None else None
    ledger, stats = Ledger(), dict[str, Any]()
    aside, position = np.array(sorted(task.set_aside), np.int64), 0
    for table in read_rows(span, schema, given["batch_rows"]):
        rows = np.arange(position, position + table.num_rows)
        position += table.num_rows
        guilty = np.isin(rows, aside)
        chosen = ~guilty
        if task.probe is not None:
            chosen &= (rows >= task.probe[0]) & (rows < task.probe[1])
        healthy = table if chosen.all() else table.filter(pa.array(chosen))
        kept, rejects, keyed = healthy, list[pa.Table](), healthy
        if healthy.num_rows:
            with report.rows(int(rows[chosen][0]), int(rows[chosen][-1]) + 1):
                result = chain.run(healthy.append_column(TEXT, whole_text(Turns(healthy))))
                kept, rejects = result.kept.drop_columns([TEXT]), result.rejects
                keyed = _with_keys(kept, whole)
        if writer is None:
            continue
        ledger.rows_in += table.num_rows
        ledger.kept += kept.num_rows
        writer.write(keyed)
        if healthy.num_rows:
            ledger.rejected.update(result.rejected)
            merge_stats(stats, {"funnel": result.funnel, "measures": histograms(result.measures, chain), **describe(kept)})
        for rejected in rejects:
            writer.reject(rejected)
        if guilty.any():
            ledger.quarantined += int(guilty.sum())
            ids = table["id"].filter(pa.array(guilty)).to_pylist()
            writer.reject(tables.rejects_table(tables.crashed(ids, rows[guilty].tolist(), task.set_aside, "chain")))
    if writer is None:
        return {}
    writer.commit(ledger, stats)
    return {"unit": given["unit"]["index"], "rows": ledger.kept}


def _with_keys(table: pa.Table, whole: Sequence[tuple[int, SetOperator]]) -> pa.Table:
    for place, operator in whole:
        for name, values in operator.keys(table).items():
            table = table.append_column(key_column(place, name), values)
    return table


def histograms(measures: pa.Table | None, chain: Chain) -> dict[str, dict[str, int]]:
    """Of each number that an operator measured, how many rows fall where: `operator.score` -> start of the bin -> rows.

    Numbers below 1 fall into tenths, others into powers of two; negative ones count as -1.
    """
    found: dict[str, dict[str, int]] = {}
    if measures is None:
        return found
    for name in measures.column_names:
        place, _, score = name.partition(".")
        kind = measures.schema.field(name).type
        if not score or not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)):
            continue
        column = measures[name].drop_null()
        values = np.asarray(column.cast(pa.float64()).to_numpy(), np.float64)
        values = values[np.isfinite(values)]
        tenths = np.where(values < 0, -1, np.floor(values * 10 + 1e-6) / 10)
        starts = np.where(values >= 1, np.exp2(np.floor(np.log2(np.maximum(values, 1)))), tenths)
        bins, counts = np.unique(starts, return_counts=True)
        label = f"{chain.operators[int(place)].name}.{score}"
        entry = found.setdefault(label, {})
        for start, count in zip(bins.tolist(), counts.tolist(), strict=True):
            text = f"{start:g}"
            entry[text] = entry.get(text, 0) + count
    return found


def describe(table: pa.Table) -> dict[str, Any]:
    """Kept rows by language, number of turns and what they were made by."""
    if not table.num_rows:
        return {}
    turns = Turns(table)
    found: dict[str, Any] = {"turns": _counts(pa.array(turns.counts).cast(pa.string()))}
    if "lang" in table.column_names:
        found["languages"] = _counts(table["lang"].cast(pa.string()).fill_null("unknown"))
    return found


def _counts(column: Any) -> dict[str, int]:
    return {entry["values"]: entry["counts"] for entry in column.value_counts().to_pylist()}
