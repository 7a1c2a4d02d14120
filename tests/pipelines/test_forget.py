"""What `danlu forget` takes out of a run and what it leaves: hand-made stages, random ids, and a kill at every step."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster import storage
from operators import shards, tables, tombstones
from operators.ledger import Equation, Ledger
from operators.measures import KEPT
from operators.tokens import twin
from pipelines.clean import clean
from pipelines.cli import main
from pipelines.forget import redo
from pipelines.forget.replies import Quotes
from pipelines.forget.takedown import Takedown, forget, lines
from pipelines.review import sample as review
from pipelines.review.findings import findings
from pipelines.review.verdicts import import_files
from pipelines.runner import hold
from pipelines.status import Watch
from pipelines.trace import trace
from tests.cluster.object_store import BUCKET, Line
from tests.conftest import ROOT

UNITS, ROWS = 3, 6  # of the corpus; of each unit's rows every third is rejected
LENGTH, PAD = 16, 0
SECRET = {
    "en": "The private letter {n} of Ms. Alder {n} about her illness, {n}, was never meant {n} for any corpus {n}.",
    "zh": "欧阳女士{n}关于病情的{n}私人信件第{n}号，从未打算{n}进入任何语料库{n}，请予以删除{n}。",
}


def text_of(row_id: str) -> str:
    return SECRET["zh" if int(row_id[-1], 36) % 2 else "en"].format(n=row_id)


IDS = [f"d{unit}{row}" for unit in range(UNITS) for row in range(ROWS)]
KEPT_IDS = [row_id for row_id in IDS if int(row_id[2]) % 3 != 2]
REMOVED = KEPT_IDS[3::4]  # by dedup: each is a copy of the kept row before it
CLEAN_IDS = [row_id for row_id in KEPT_IDS if row_id not in REMOVED]
DIRECTORIES = {
    "web": "web/" + "a" * 16, "clean": "clean/" + "b" * 16, "pairs": "pairs/" + "c" * 16, "evolved": "evolved/" + "d" * 16,
    "tokens": "tokens/" + "e" * 16, "base": "base/" + "f" * 16, "open": "open/" + "0" * 16, "out": "out/" + "1" * 16,
    "shelf": "shelf/" + "2" * 16, "mix": "mix/" + "3" * 16,
}  # fmt: skip
KINDS = {
    "web": "corpus", "clean": "dedup", "pairs": "document_instruct", "evolved": "evol_instruct", "tokens": "pack",
    "base": "pretrain", "open": "responses", "out": "export", "shelf": "export", "mix": "mix",
}  # fmt: skip
INPUTS = {
    "clean": "web",
    "pairs": "clean",
    "evolved": "pairs",
    "tokens": "clean",
    "base": "tokens",
    "open": "clean",
    "out": "clean",
}


def finish(run: str, name: str, **more: Any) -> shards.Manifest:
    given = {INPUTS[name]: DIRECTORIES[INPUTS[name]]} if name in INPUTS else {}
    return shards.finish(
        f"{run}/{DIRECTORIES[name]}", stage=name, kind=KINDS[name], fingerprint=DIRECTORIES[name][-16:], config={}, inputs=given,
        **more,
    )  # fmt: skip


def make_run(run: str) -> str:
    """Documents, a dedup view, pairs made of documents, pairs evolved from those, packed tokens, a model, an unfinished stage."""
    _web(run)
    _clean(run)
    _made(run, "pairs", [(f"p-{row_id}", row_id, []) for row_id in CLEAN_IDS])
    _made(run, "evolved", [(f"e-{row_id}", None, [f"p-{row_id}"]) for row_id in CLEAN_IDS])
    _tokens(run)
    _base(run)
    writer = shards.UnitWriter(f"{run}/{DIRECTORIES['open']}", 0)
    writer.write(pa.table({"id": ["o-0"], "text": [text_of(CLEAN_IDS[0])]}))
    writer.commit(Ledger(created=1, kept=1))
    storage.write_bytes(f"{run}/{DIRECTORIES['out']}/data/part-00000-of-00001.jsonl", text_of(CLEAN_IDS[0]).encode())
    _shelf_and_mix(run)
    rows = len(CLEAN_IDS)
    finish(run, "out", ledger=Ledger(rows, 0, rows), files={"export": {"path": ".", "format": "alpaca", "files": []}})
    replies = [json.dumps({"key": hashlib.md5(i.encode()).hexdigest(), "text": f"Q: {text_of(i)}"}) for i in CLEAN_IDS]
    storage.write_bytes(
        f"{run}/.replies/pairs.jsonl", ("\n".join([*replies, json.dumps({"key": "0" * 32, "text": "other"})]) + "\n").encode()
    )
    storage.write_bytes(f"{run}/report.html", text_of(CLEAN_IDS[0]).encode())
    listed = {
        name: {
            "kind": KINDS[name], "directory": DIRECTORIES[name], "inputs": [INPUTS[name]] if name in INPUTS else [],
            "status": "pending" if name == "open" else "done", "seconds": 1.0,
        }
        for name in DIRECTORIES
    }  # fmt: skip
    record = {"recipe": "r", "order": list(listed), "stages": listed, "seed": 0, "limit": None, "message": None}
    storage.write_bytes(f"{run}/run.json", json.dumps(record).encode())
    return run


def _web(run: str) -> None:
    for unit in range(UNITS):
        writer = shards.UnitWriter(f"{run}/{DIRECTORIES['web']}", unit)
        ids = [row_id for row_id in IDS if row_id[1] == str(unit)]
        kept = [row_id for row_id in ids if row_id in KEPT_IDS]
        columns = {"id": kept, "text": [text_of(i) for i in kept], "source": ["web"] * len(kept)}
        writer.write(pa.table(columns, schema=tables.DOCUMENTS.remove(3)))
        bad = [row_id for row_id in ids if row_id not in KEPT_IDS]
        writer.reject(tables.rejects_table([{"id": i, "text": text_of(i), "operator": "short", "reason": "few"} for i in bad[:-1]]))
        aside = [{"id": bad[-1], "text": text_of(bad[-1]), "operator": "read", "reason": "broken", "quarantined": True}]
        writer.reject(tables.rejects_table(aside))
        steps = [KEPT if row_id in kept else 0 for row_id in ids if row_id != bad[-1]]
        places = [(kept if row_id in kept else bad).index(row_id) for row_id in ids if row_id != bad[-1]]
        score = [float(int(row_id[1:], 36)) for row_id in ids if row_id != bad[-1]]
        writer.measure(pa.table({"position": pa.array(places, pa.int64()), "step": pa.array(steps, pa.int16()), "00.n": score}))
        step = {"in": len(ids) - 1, "kept": len(kept), "rejected": {"few": len(bad) - 1}}
        ledger = Ledger(len(ids), 0, len(kept), Counter({"short:few": len(bad) - 1}), 1)
        writer.commit(ledger, {"funnel": {"00:short": step}, "examples": [{"text": text_of(kept[0])}]}, {"key": f"k{unit}"})
    finish(run, "web")


def _clean(run: str) -> None:
    directory = f"{run}/{DIRECTORIES['clean']}"
    view = []
    for number, part in enumerate(shards.parts([f"{run}/{DIRECTORIES['web']}"])):
        ids = pq.read_table(part.path)["id"].to_pylist()
        gone = np.array([row_id in REMOVED for row_id in ids])
        name = shards.save_bitmap(directory, number, gone) if gone.any() else None
        entry = {"path": shards.relative_to_run(directory, part.path), "rows": part.rows, "removed": name}
        view.append({**entry, "removed_rows": int(gone.sum())})
    records = [(i, KEPT_IDS[KEPT_IDS.index(i) - 1]) for i in REMOVED]
    columns = {"id": [a for a, _ in records], "match_id": [b for _, b in records], "kept_id": [b for _, b in records]}
    scratch = storage.scratch_file(directory)
    pq.write_table(pa.table({**columns, "reason": ["exact:duplicate"] * len(records)}), scratch)
    table = shards.publish_by_content(scratch, directory, "removed", 0)
    ledger = Ledger(len(KEPT_IDS), 0, len(CLEAN_IDS), Counter({"exact:duplicate": len(REMOVED)}))
    examples = [{"kept": b, "kept_text": text_of(b), "text": text_of(a)} for a, b in records]
    finish(run, "clean", ledger=ledger, view=view, files={"removed": [table]}, stats={"examples": examples})


def _shelf_and_mix(run: str) -> None:
    """An export of one Parquet file whose name is not of its content, and a view that takes it one and a half times."""
    directory = f"{run}/{DIRECTORIES['shelf']}"
    scratch = storage.scratch_file(directory)
    pq.write_table(pa.table({"id": CLEAN_IDS, "text": [text_of(i) for i in CLEAN_IDS]}), scratch, row_group_size=4)
    entry = {"name": "data/part-00000-of-00001.parquet", "rows": len(CLEAN_IDS), "bytes": 1, "sha256": storage.sha256_of(scratch)}
    storage.publish(scratch, f"{directory}/{entry['name']}")
    ledger = Ledger(len(CLEAN_IDS), 0, len(CLEAN_IDS))
    record = {"unit": 0, "parts": [entry], "rejects": [], "ledger": ledger.to_json(), "stats": {}, "file": entry}
    storage.write_bytes(f"{directory}/units/00000000.json", json.dumps(record).encode())
    finish(run, "shelf", files={"export": {"path": ".", "format": "parquet", "files": [entry]}})
    half = np.arange(len(CLEAN_IDS)) % 2 == 1
    bitmap = shards.save_bitmap(f"{run}/{DIRECTORIES['mix']}", 0, half)
    view = [
        {"path": f"{DIRECTORIES['shelf']}/{entry['name']}", "rows": len(CLEAN_IDS), "removed": name, "removed_rows": count}
        for name, count in ((None, 0), (bitmap, int(half.sum())))
    ]
    finish(run, "mix", ledger=Ledger(len(CLEAN_IDS), int((~half).sum()), len(CLEAN_IDS) + int((~half).sum())), view=view)


def _made(run: str, name: str, rows: list[tuple[str, str | None, list[str]]]) -> None:
    """Conversations, each of a document or of other rows, and one reject of each."""
    writer = shards.UnitWriter(f"{run}/{DIRECTORIES[name]}", 0)
    spans = [pa.field("span_start", pa.int64()), pa.field("span_end", pa.int64())]
    schema = pa.schema([*tables.CONVERSATIONS, pa.field("source_id", pa.string()), *spans])
    made = [
        {
            "id": row_id, "messages": [{"role": "user", "content": f"about {row_id}"}], "source_id": source, "span_start": 0,
            "span_end": 9, "provenance": {"parents": parents, "operation": "x"},
        }
        for row_id, source, parents in rows
    ]  # fmt: skip
    writer.write(pa.Table.from_pylist(made, schema=schema))
    of = [(f"r-{row_id}", f"{source}#0-9" if source else parents[0]) for row_id, source, parents in rows]
    writer.reject(tables.rejects_table([{"id": i, "text": i, "source": s, "operator": "m", "reason": "bad"} for i, s in of]))
    writer.commit(Ledger(created=2 * len(rows), kept=len(rows), rejected=Counter({"m:bad": len(rows)})))
    finish(run, name)


def _tokens(run: str) -> None:
    """Two documents of 5 and 7 tokens a sequence; token n of document d is 10 d + n + 1."""
    directory = f"{run}/{DIRECTORIES['tokens']}"
    writer = shards.UnitWriter(directory, 0)
    rows = []
    for number in range(0, len(CLEAN_IDS), 2):
        pieces = CLEAN_IDS[number : number + 2]
        lengths = [5, 7][: len(pieces)]
        tokens = [10 * (number + k) + n + 1 for k, length in enumerate(lengths) for n in range(length)]
        rows.append(
            {
                "sequence": number // 2, "tokens": tokens + [PAD] * (LENGTH - len(tokens)), "documents": pieces,
                "cu_seqlens": np.cumsum([0, *lengths]).tolist(), "offsets": [0] * len(pieces), "sources": ["web"] * len(pieces),
                "langs": ["en"] * len(pieces), "loss_spans": [0, len(tokens)],
            }
        )  # fmt: skip
    writer.write(pa.Table.from_pylist(rows, schema=tables.TOKENS))
    total = sum(row["loss_spans"][1] for row in rows)
    stats = {
        "documents": len(CLEAN_IDS), "packed": len(CLEAN_IDS), "set_aside": {"held_out": 0, "empty": 0}, "sequences": len(rows),
        "tokens_in": total, "tokens": total, "tokens_cut": 0, "padding_tokens": len(rows) * LENGTH - total,
        "languages": {"en": total}, "sources": {"web": total},
    }  # fmt: skip
    record = writer.commit(Ledger(created=len(rows), kept=len(rows)), stats)
    paths = [storage.join(directory, part["name"]) for part in record["parts"]]
    twin.write_twin(directory, paths, length=LENGTH, vocab_size=500, eos_token_id=PAD, padding_token_id=PAD)
    equations = [
        Equation("documents in = packed + set aside", {"d": len(CLEAN_IDS)}, {"packed": len(CLEAN_IDS), "held_out": 0, "empty": 0}),
        Equation("tokens in = tokens packed + tokens cut", {"tokens": total}, {"packed": total, "cut": 0}),
        Equation("sequences x length", {"all": len(rows) * LENGTH}, {"packed": total, "padding": len(rows) * LENGTH - total}),
    ]  # fmt: skip
    files = {"tokens": twin.TOKENS, "index": twin.INDEX, "boundaries": twin.BOUNDARIES, "boundary_offsets": twin.BOUNDARY_OFFSETS}
    finish(run, "tokens", equations=equations, files=files)


def _base(run: str) -> None:
    """A model that took every sequence twice, one a step."""
    sequences = (len(CLEAN_IDS) + 1) // 2
    writer = shards.UnitWriter(f"{run}/{DIRECTORIES['base']}", 0)
    steps = list(range(2 * sequences))
    ids = [str(step % sequences) for step in steps]
    writer.write(pa.table({"step": steps, "input": ["tokens"] * len(steps), "id": ids}))
    writer.commit(Ledger(created=len(steps), kept=len(steps)))
    storage.write_bytes(f"{run}/{DIRECTORIES['base']}/checkpoints/step-00000001/x", b"")
    finish(run, "base", files={"model": "model"})


# --- what is there


def ids_of(run: str, name: str) -> list[str]:
    directory = f"{run}/{DIRECTORIES[name]}"
    return [i for part in shards.parts([directory]) for _, rows in shards.read(part, ["id"]) for i in rows["id"].to_pylist()]


def rejects_of(run: str, name: str) -> list[str]:
    directory = f"{run}/{DIRECTORIES[name]}"
    names = [entry["name"] for entry in shards.load_manifest(directory).rejects]
    return [i for part in names for i in pq.read_table(storage.join(directory, part))["id"].to_pylist()]


def sequences_of(run: str) -> list[dict[str, Any]]:
    directory = f"{run}/{DIRECTORIES['tokens']}"
    names = [part["name"] for part in shards.load_manifest(directory).parts]
    return [row for name in names for row in pq.read_table(storage.join(directory, name)).to_pylist()]


def contents(run: str) -> dict[str, str]:
    return {
        entry.relative: hashlib.sha256(storage.read_bytes(entry.path)).hexdigest()
        for entry in storage.list_all(run)
        if entry.relative.split("/")[0] not in (".lock", "report.html", "forgotten")
    }


def words_of(run: str) -> dict[str, str]:
    """What a reader finds in every file, Parquet files looked into."""
    found = {}
    for entry in storage.list_all(run):
        data = storage.read_bytes(entry.path)
        if entry.relative.endswith(".parquet"):
            data = json.dumps(pq.read_table(pa.BufferReader(data)).to_pylist(), ensure_ascii=False, default=str).encode()
        found[entry.relative] = data.decode("utf-8", "replace")
    return found


def holds(run: str, words: str) -> list[str]:
    """The files that hold these words."""
    forms = (words, json.dumps(words)[1:-1])
    return [name for name, text in words_of(run).items() if any(form in text for form in forms)]


def check_is_without(run: str, gone: set[str]) -> None:
    """Everything but these documents and what was made of them is there, in its order, and every account balances."""
    assert ids_of(run, "web") == [i for i in KEPT_IDS if i not in gone]
    assert rejects_of(run, "web") == [i for i in IDS if i not in KEPT_IDS and i not in gone]
    left = [i for i in CLEAN_IDS if i not in gone]
    assert ids_of(run, "clean") == ids_of(run, "shelf") == left
    assert ids_of(run, "mix") == left + [i for i in CLEAN_IDS[::2] if i not in gone]
    for name, mark in (("pairs", "p"), ("evolved", "e")):
        assert ids_of(run, name) == [f"{mark}-{i}" for i in left]
        assert rejects_of(run, name) == [f"r-{mark}-{i}" for i in left]
    rows = sequences_of(run)
    assert [row["sequence"] for row in rows] == list(range((len(CLEAN_IDS) + 1) // 2))
    for number, row in enumerate(rows):
        pieces = [i for i in CLEAN_IDS[2 * number : 2 * number + 2] if i not in gone]
        tokens = [10 * CLEAN_IDS.index(i) + n + 1 for i in pieces for n in range([5, 7][CLEAN_IDS.index(i) % 2])]
        assert row["documents"] == pieces and row["tokens"] == tokens + [PAD] * (LENGTH - len(tokens))
        assert row["loss_spans"] == [0, len(tokens)] and row["cu_seqlens"][-1] == len(tokens)
        assert [len(row[column]) for column in ("offsets", "sources", "langs")] == [len(pieces)] * 3
    _check_twin(run, rows)
    for name in DIRECTORIES:
        directory = f"{run}/{DIRECTORIES[name]}"
        if not storage.exists(f"{directory}/manifest.json"):
            continue
        manifest = shards.load_manifest(directory)
        manifest.ledger.check(name)
        for equation in manifest.equations:
            Equation(**equation).check(name)
        total = Ledger()
        for _, record in shards.unit_records(directory):
            for entry in (*record["parts"], *record["rejects"], *record.get("measures", ())):
                assert storage.sha256_of(storage.join(directory, entry["name"])) == entry["sha256"]
            total.add(Ledger.from_json(record["ledger"]))
        if name in ("web", "pairs", "evolved", "shelf"):
            assert total == manifest.ledger
        if name in ("web", "clean", "pairs", "evolved", "shelf", "mix"):
            assert manifest.ledger.kept == manifest.rows == len(ids_of(run, name))
    web = shards.load_manifest(f"{run}/{DIRECTORIES['web']}")
    assert web.ledger.rows_in == len(IDS) and web.ledger.forgotten == len(gone & set(IDS))
    assert web.stats.get("funnel", {}).get("00:short", {}).get("kept") == web.ledger.kept
    _check_measures(run)


def _check_twin(run: str, rows: list[dict[str, Any]]) -> None:
    directory = f"{run}/{DIRECTORIES['tokens']}"
    index = json.loads(storage.read_bytes(storage.join(directory, twin.INDEX)))
    flat = np.frombuffer(storage.read_bytes(storage.join(directory, twin.TOKENS)), "<u2").reshape(-1, LENGTH)
    assert flat.tolist() == [row["tokens"] for row in rows] and index["sequences"] == len(rows)
    bounds = np.frombuffer(storage.read_bytes(storage.join(directory, twin.BOUNDARIES)), "<i4").tolist()
    assert bounds == [edge for row in rows for edge in row["cu_seqlens"]]
    for name, digest in index["sha256"].items():
        assert storage.sha256_of(storage.join(directory, name)) == digest


def _check_measures(run: str) -> None:
    """Every measured row is the one at its position: its score is its id's."""
    directory = f"{run}/{DIRECTORIES['web']}"
    for _, record in shards.unit_records(directory):
        rows = {
            kind: [i for entry in record[kind] for i in pq.read_table(storage.join(directory, entry["name"]))["id"].to_pylist()]
            for kind in ("parts", "rejects")
        }
        for entry in record.get("measures", ()):
            for row in pq.read_table(storage.join(directory, entry["name"])).to_pylist():
                place = rows["parts" if row["step"] == KEPT else "rejects"][row["position"]]
                assert row["00.n"] == int(place[1:], 36)


# --- tests


@settings(max_examples=5, deadline=None)
@given(first=st.sets(st.sampled_from(IDS)), second=st.sets(st.sampled_from(IDS), min_size=1))
def test_exactly_what_was_asked_for_goes_and_every_account_balances(first: set[str], second: set[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        run = make_run(f"{folder}/run")
        storage.delete(f"{run}/report.html")  # writing it again would take most of the time
        check_is_without(run, set())
        for asked in filter(None, (first, second)):
            full = contents(run)
            told = forget(run, sorted(asked), dry_run=True)
            assert contents(run) == full, "a dry run changed something"
            done = forget(run, sorted(asked))
            assert (told.rows, told.stages, told.resets) == (done.rows, done.stages, done.resets)
        gone = first | second
        check_is_without(run, gone)
        everything = "".join(words_of(run).values())
        for row_id in gone:
            assert text_of(row_id) not in everything and f"about p-{row_id}" not in everything
        for row_id in sorted(gone)[:2]:
            events = trace(run, row_id)
            assert events[0].what == "forgotten" and all(event.what in ("forgotten", "trained") for event in events)
        kept = [i for i in KEPT_IDS if i not in gone]
        assert all(text_of(row_id) in everything for row_id in kept)
        assert not storage.exists(f"{run}/.forget") and sum(clean(run).files.values()) == 0


def test_what_is_told_of_a_document_its_copies_its_model_and_what_is_begun_anew(tmp_path: Path) -> None:
    run = make_run(str(tmp_path / "run"))
    row_id = KEPT_IDS[2]  # REMOVED[0] is its copy
    told = forget(run, [row_id, "never-seen"], reason="ticket 7")
    assert told.not_found == ["never-seen"] and told.duplicates == [REMOVED[0]] and told.descendants == 2
    assert told.resets == [DIRECTORIES["open"], DIRECTORIES["out"]]
    assert not storage.exists(f"{run}/{DIRECTORIES['open']}") and not storage.exists(f"{run}/{DIRECTORIES['out']}")
    (model,) = told.models
    sequence, sequences = CLEAN_IDS.index(row_id) // 2, (len(CLEAN_IDS) + 1) // 2
    assert (model.stage, model.samples, model.first_step, model.last_step) == ("base", 2, sequence, sequence + sequences)
    assert model.checkpoint_before == "checkpoints/step-00000001"
    assert told.replies == (1, len(CLEAN_IDS))
    english, chinese = "\n".join(lines(told, "en")), "\n".join(lines(told, "zh"))
    assert f"model {DIRECTORIES['base']} (pretrain) saw it in 2 samples" in english and "never-seen" in english
    assert f"模型 {DIRECTORIES['base']}（pretrain）在 2 个样本中见过它" in chinese and REMOVED[0] in chinese
    (event, *_) = trace(run, row_id)
    assert "ticket 7" in event.detail and f"of its 2 ids some were seen by {DIRECTORIES['base']} (2 samples)" in event.detail
    assert "with a row that it was made from" in trace(run, f"p-{row_id}")[0].detail
    assert trace(run, "never-seen")[0].what == "forgotten"
    record = storage.read_bytes(f"{run}/forgotten/00000001.json")
    assert row_id.encode() not in record and text_of(row_id).encode() not in record
    status = Watch(run).look()
    assert status.takedowns == [{"time": told.time, "reason": "ticket 7", "ids": 2, "rows": told.rows}]
    assert next(stage.forgotten for stage in status.stages if stage.name == "web") == 1
    page = storage.read_bytes(f"{run}/report.html").decode()
    assert "Forgotten on" in page and "删除" in page and text_of(row_id) not in page


def test_copies_go_too_when_asked(tmp_path: Path) -> None:
    run = make_run(str(tmp_path / "run"))
    told = forget(run, [REMOVED[0]], with_duplicates=True)
    assert set(told.asked) == {REMOVED[0], KEPT_IDS[2]} and told.duplicates == []
    check_is_without(run, set(told.asked))


def test_a_second_takedown_of_the_same_id_says_when_it_was_forgotten(tmp_path: Path) -> None:
    run = make_run(str(tmp_path / "run"))
    first = forget(run, [KEPT_IDS[0]])
    before = contents(run)
    again = forget(run, [KEPT_IDS[0]])
    assert again.earlier == {KEPT_IDS[0]: first.time} and again.not_found == [] and again.rows == 0
    assert contents(run) == before and len(tombstones.files(run)) == 1


def test_superseded_fingerprints_and_committed_units_of_an_unfinished_corpus_are_rewritten_too(tmp_path: Path) -> None:
    run = make_run(str(tmp_path / "run"))
    done, old, unfinished = (f"{run}/web/{mark * 16}" for mark in "a78")
    view, old_view = (f"{run}/clean/{mark * 16}" for mark in "b7")  # the old view comes before the old corpus by name
    for source, target in ((done, old), (done, unfinished), (view, old_view)):
        for entry in storage.list_all(source):
            storage.write_bytes(storage.join(target, entry.relative), storage.read_bytes(entry.path))
    manifest = storage.read_bytes(f"{old_view}/manifest.json").replace(b"a" * 16, b"7" * 16)
    storage.write_bytes(f"{old_view}/manifest.json", manifest)
    storage.delete(f"{unfinished}/manifest.json")
    record = json.loads(storage.read_bytes(f"{run}/run.json"))
    record["stages"]["web"]["directory"] = f"web/{'8' * 16}"
    storage.write_bytes(f"{run}/run.json", json.dumps(record).encode())
    storage.write_bytes(
        f"{unfinished}/parts/00000009-000-0123456789ab.parquet", text_of(KEPT_IDS[1]).encode()
    )  # of a killed attempt
    forget(run, [KEPT_IDS[1]])
    assert holds(run, text_of(KEPT_IDS[1])) == []
    assert len(shards.committed_units(unfinished)) == UNITS
    read = [i for part in shards.parts([old_view]) for _, rows in shards.read(part, ["id"]) for i in rows["id"].to_pylist()]
    assert read == [i for i in CLEAN_IDS if i != KEPT_IDS[1]]
    assert sum(entry["ledger"].get("forgotten", 0) for entry in shards.committed_units(unfinished).values()) == 1


def test_columns_of_other_types_are_looked_into_or_left_alone(tmp_path: Path) -> None:
    run = str(tmp_path / "run")
    directory = f"{run}/web/{'a' * 16}"
    writer = shards.UnitWriter(directory, 0)
    ids = pa.array(["a", "b", "a"]).dictionary_encode()
    writer.write(pa.table({"id": ids, "provenance": ["x", "a", "y"], "source_id": [1, 2, 3], "text": ["one", "two", "three"]}))
    writer.commit(Ledger(rows_in=3, kept=3))
    shards.finish(directory, stage="web", kind="corpus", fingerprint="a" * 16, config={}, inputs={})
    entry = {"kind": "corpus", "directory": f"web/{'a' * 16}", "inputs": [], "status": "done", "seconds": 1.0}
    record = {"recipe": "r", "order": ["web"], "stages": {"web": entry}, "seed": 0, "limit": None, "message": None}
    storage.write_bytes(f"{run}/run.json", json.dumps(record).encode())
    assert forget(run, ["a"]).rows == 2  # every row of the id
    manifest = shards.load_manifest(directory)
    assert [row for part in manifest.parts for row in pq.read_table(f"{directory}/{part['name']}")["text"].to_pylist()] == ["two"]
    assert manifest.ledger.to_json() == {"in": 3, "created": 0, "kept": 1, "rejected": {}, "quarantined": 0, "forgotten": 2}
    assert forget(run, ["b"]).rows == 1
    assert shards.load_manifest(directory).parts == [] and shards.parts([directory]) == []


class Killed(BaseException):
    """As `kill -9`: nothing of ours catches it."""


_WRITES: list[tuple[Any, str]] = [(storage, "write_bytes"), (storage, "publish"), (storage, "delete")]


@pytest.fixture
def dying(monkeypatch: pytest.MonkeyPatch) -> Callable[[int | None, bool], list[int]]:
    """Makes the nth change to the storage the last one; `after` says whether it still happens."""
    state: dict[str, Any] = {"left": None, "after": False, "count": [0]}

    def wrap(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def step(*arguments: Any, **options: Any) -> Any:
            state["count"][0] += 1
            if state["left"] is not None:
                state["left"] -= 1
                if state["left"] < 0:
                    raise Killed
                if state["left"] == 0:
                    if state["after"]:
                        original(*arguments, **options)
                    raise Killed
            return original(*arguments, **options)

        return step

    for module, name in _WRITES:
        monkeypatch.setattr(module, name, wrap(name, getattr(module, name)))

    def arm(left: int | None, after: bool) -> list[int]:
        state.update(left=left, after=after)
        return state["count"]  # type: ignore[no-any-return]

    return arm


@pytest.mark.parametrize("every", [17, pytest.param(1, marks=pytest.mark.slow)])
def test_a_takedown_that_is_killed_at_any_step_is_finished_by_the_same_command(
    tmp_path: Path, dying: Callable[[int | None, bool], list[int]], every: int
) -> None:
    gone = {CLEAN_IDS[1], IDS[2], REMOVED[0]}
    made = make_run(str(tmp_path / "made"))
    storage.delete(f"{made}/report.html")

    def fresh(name: str) -> str:
        shutil.copytree(made, tmp_path / name)
        return str(tmp_path / name)

    count = dying(None, False)
    run = fresh("whole")
    start = count[0]
    forget(run, sorted(gone))
    steps = count[0] - start
    undisturbed = contents(run)
    assert steps > 30
    for step in sorted({*range(1, steps + 1, every), *range(steps - 3 * (every > 1), steps + 1)}):
        run = fresh(f"killed-{step}")
        dying(step, step % 2 == 0)
        with pytest.raises(Killed):
            forget(run, sorted(gone))
        dying(None, False)
        if not tombstones.files(run):
            assert all(event.what != "forgotten" for event in trace(run, CLEAN_IDS[1])), f"step {step}: told too early"
        else:
            assert holds(run, text_of(CLEAN_IDS[1])) == [], f"step {step}: told as forgotten and still there"
        (clean if step % 3 == 0 else lambda directory: forget(directory, sorted(gone)))(run)
        forget(run, sorted(gone))
        assert _settled(contents(run)) == _settled(undisturbed), f"step {step}"
        check_is_without(run, gone)
        shutil.rmtree(run)


_KILLER = """
import os, signal, sys
from cluster import storage
from pipelines.cli import main
left = int(sys.argv[1])
def step(original):
    def counted(*arguments):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments)
    return counted
storage.write_bytes, storage.publish, storage.delete = map(step, (storage.write_bytes, storage.publish, storage.delete))
sys.exit(main(["forget", *sys.argv[2:]]))
"""


@pytest.mark.slow
def test_the_command_goes_on_after_a_real_kill_9(tmp_path: Path) -> None:
    gone = {CLEAN_IDS[1], IDS[2]}
    killed = 0
    for step in (20, 45, 60, 75, 90):
        run = make_run(str(tmp_path / f"run-{step}"))
        first = subprocess.run([sys.executable, "-c", _KILLER, str(step), run, *sorted(gone)], cwd=ROOT, capture_output=True)
        killed += first.returncode == -signal.SIGKILL
        assert main(["forget", run, *sorted(gone)]) == 0
        check_is_without(run, gone)
    assert killed >= 4


def _settled(found: dict[str, str]) -> dict[str, str]:
    """Without what tells the time of the takedown."""
    return {name: "" if name.endswith("manifest.json") else digest for name, digest in found.items()}


def test_a_run_that_was_begun_is_finished_before_it_is_read(tmp_path: Path, dying: Callable[[int | None, bool], list[int]]) -> None:
    run = make_run(str(tmp_path / "run"))
    original = redo.finish
    try:
        redo.finish = lambda directory, check: None if redo.pending(directory) is None else _kill()  # type: ignore[assignment]
        with pytest.raises(Killed):
            forget(run, [CLEAN_IDS[1]])
    finally:
        redo.finish = original
    assert redo.pending(run) is not None and tombstones.files(run) == []
    with pytest.raises(Exception, match="a takedown was interrupted"):
        clean(run, dry_run=True)
    clean(run)
    check_is_without(run, {CLEAN_IDS[1]})


def test_a_run_of_the_recipe_finishes_a_takedown_first(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"id": f"c{n}", "messages": [{"role": "user", "content": f"问 {n}?"}, {"role": "assistant", "content": "答"}]} for n in "12"
    ]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    stages = "{chat: {kind: conversations, format: messages, path: chat.jsonl}}"
    (tmp_path / "recipe.yaml").write_text(f"name: chat\nstages: {stages}\n", encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        assert main(["run", "recipe.yaml", "--runs", "runs"]) == 0
        run = str(tmp_path / "runs" / "chat")
        with pytest.MonkeyPatch.context() as broken:
            broken.setattr(redo, "_put", lambda staged, target: _kill())
            with pytest.raises(Killed):
                forget(run, ["c2"])
        assert redo.pending(run) is not None and holds(run, "问 2?")
        assert main(["run", "recipe.yaml", "--runs", "runs"]) == 0
    assert "finished the takedown of" in capfd.readouterr().err
    assert redo.pending(run) is None and holds(run, "问 2?") == [] and trace(run, "c2")[0].what == "forgotten"


def _kill() -> None:
    raise Killed


def test_a_conversation_that_was_forgotten_is_not_read_again(tmp_path: Path) -> None:
    rows = [
        {"id": f"c{n}", "messages": [{"role": "user", "content": f"问 {n}?"}, {"role": "assistant", "content": "答"}]}
        for n in range(4)
    ]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (tmp_path / "recipe.yaml").write_text(
        "name: chat\nstages: {chat: {kind: conversations, format: messages, path: chat.jsonl}}\n", encoding="utf-8"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        assert main(["run", "recipe.yaml", "--runs", "runs"]) == 0
        assert main(["forget", "runs/chat", "c2"]) == 0
        rows[0]["messages"] = [{"role": "user", "content": "new"}, {"role": "assistant", "content": "新"}]
        (tmp_path / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        assert main(["run", "recipe.yaml", "--runs", "runs"]) == 0
    record = json.loads((tmp_path / "runs/chat/run.json").read_bytes())
    directory = str(tmp_path / "runs/chat" / record["stages"]["chat"]["directory"])
    assert [i for part in shards.parts([directory]) for i in pq.read_table(part.path)["id"].to_pylist()] == ["c0", "c1", "c3"]
    ledger = shards.load_manifest(directory).ledger
    assert (ledger.rows_in, ledger.kept, ledger.forgotten) == (4, 3, 1)


def test_a_sample_for_review_keeps_its_places_and_finds_its_rows(tmp_path: Path) -> None:
    run = make_run(str(tmp_path / "run"))
    directory = f"{run}/{DIRECTORIES['pairs']}"
    sample = review.draw(directory, 6)
    review.keep(directory, sample)
    said = [
        {"sample": sample.name, "item": number, "id": item.id, "verdict": "accept", "reviewer": "王", "note": f"note on {item.id}"}
        for number, item in enumerate(sample.items)
    ]
    given = tmp_path / "verdicts.jsonl"
    given.write_text("".join(json.dumps(verdict, ensure_ascii=False) + "\n" for verdict in said), encoding="utf-8")
    import_files(directory, [str(given)], None, False)
    assert findings(directory).total.judged == len(said)
    asked = [sample.items[0].id, sample.items[3].id, CLEAN_IDS[1]]
    forget(run, asked)
    (after,) = review.kept(directory)
    assert [item.id for item in after.items if item.row >= 0] == [
        item.id for item in sample.items if item.id not in (*asked, f"p-{CLEAN_IDS[1]}")
    ]
    ids = ids_of(run, "pairs")
    for item, was in zip(after.items, sample.items, strict=True):
        assert (item.row == -1 and item.id.startswith("forgotten:")) if was.id not in ids else ids[item.row] == item.id == was.id

    assert findings(directory).total.judged == sum(item.row >= 0 for item in after.items) <= len(said) - 2
    assert all(f"note on {row_id}" not in "".join(words_of(run).values()) for row_id in asked)


@pytest.mark.slow
def test_a_run_on_an_object_store_is_treated_alike(line: Line, tmp_path: Path) -> None:
    run = f"s3://{BUCKET}/forget/run"
    for entry in storage.list_all(make_run(str(tmp_path / "run"))):
        storage.write_bytes(storage.join(run, entry.relative), storage.read_bytes(entry.path))
    told = forget(run, [CLEAN_IDS[1], IDS[2]])
    assert told.outside == [("nodes", "$DANLU_CACHE")]
    check_is_without(run, {CLEAN_IDS[1], IDS[2]})
    assert holds(run, text_of(CLEAN_IDS[1])) == []


def test_the_command_tells_by_its_exit_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(str(tmp_path / "run"))
    (tmp_path / "ids.txt").write_text(f"{CLEAN_IDS[1]}\n\n{CLEAN_IDS[2]}\n", encoding="utf-8")
    assert main(["forget", run, "--ids", str(tmp_path / "ids.txt"), "--dry-run", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["dry_run"] and told["models"][0]["stage"] == "base" and set(told["asked"]) == set(CLEAN_IDS[1:3])
    assert main(["forget", run, "nobody", "--lang", "zh"]) == 1
    assert "没有任何阶段见过 nobody" in capsys.readouterr().out
    assert main(["forget", run]) == 2
    assert main(["forget", str(tmp_path), "x"]) == 2
    with hold(run, lambda _: None):
        assert main(["forget", run, CLEAN_IDS[1]]) == 2
    assert "in use by process" in capsys.readouterr().err
    assert main(["forget", run, "--ids", str(tmp_path / "ids.txt")]) == 0
    check_is_without(run, set(CLEAN_IDS[1:3]))
    assert isinstance(Takedown(run, False, "", "", []).to_json(), dict)


@pytest.mark.parametrize("row_id", [IDS[0], IDS[1]])
def test_a_reply_is_found_by_a_run_of_its_words_wherever_it_begins(row_id: str) -> None:
    quotes = Quotes()
    quotes.add("x" + text_of(row_id) * 3)
    quotes.add("是")
    words = text_of(row_id) * 3
    for start in range(20):
        assert quotes.quoted_in("前文 " + words[start : start + 50] + " 后文")
    assert quotes.quoted_in(" 是 ") and not quotes.quoted_in("是的") and not quotes.quoted_in("")
    assert not quotes.quoted_in("另一封信，与它没有任何相同之处。" * 5)
