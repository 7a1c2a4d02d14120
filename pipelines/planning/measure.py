"""What this machine does in a second: the rates that `danlu plan` goes by, measured by the engine's own code.

Text is the examples' (real pages and documents in English and Chinese). A rate is that of the fastest of several rounds, in
CPU seconds of this process, so that what else the machine does is left out as far as it can be; where a library brings its
own threads (training, learning a tokenizer) it is counted as said there.
"""

from __future__ import annotations

import datetime
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cluster import storage
from cluster.rates import Rates
from operators import registry
from operators.config import SettingsError, parse
from operators.dedup.keys import document_keys
from operators.dedup.options import DedupOptions
from operators.sources.units import ReadSettings, plan_units, read_unit
from operators.text.analysis import Analysis
from operators.tokens import bpe
from operators.tokens.encode import Encoder
from operators.tokens.layout import place

DATA = Path(__file__).resolve().parents[2] / "examples" / "data"
_FILES = {"warc": "pages.warc.gz", "parquet": "documents.parquet", "jsonl": "notes.jsonl"}
_OPERATORS: list[str | dict[str, Any]] = [
    "extract_html", "fix_text", "normalise_chinese", "strip_markdown", "strip_boilerplate",
    {"detect_language": {"keep": ["en", "zh"]}}, "gopher_repetition", "gopher_quality", "c4_quality", "fineweb_quality",
    {"filter_lengths": {"min_characters": 10}}, "bad_words",
    {"filter_expression": {"keep": "characters >= 200"}}, "redact_pii",
]  # fmt: skip
_DISK_BYTES = 256 << 20
_SHAPES = {"cpu": (4, 512, 8, 512, 2), "cuda": (8, 2048, 16, 2048, 4)}
"""Layers, width, heads, tokens of a row and rows of a step of the model that is trained."""
_VOCAB = 8192

Log = Callable[[str], None]


def measure(seconds: float, disk: str, command: str, log: Log = lambda line: None) -> Rates:
    """Rates of this machine, in about so many seconds once kernels are compiled. `disk` is the folder that is written to.

    Raises SettingsError when the examples' data is not there, or the folder is no local one.
    """
    missing = [name for name in _FILES.values() if not (DATA / name).exists()]
    if missing:
        raise SettingsError(f"danlu rates measures on the examples' data, which lacks {DATA / missing[0]}: run it from a checkout")
    if storage.is_remote(disk):
        raise SettingsError(f"--disk {disk}: measures this machine's disk, so it must be a local folder")
    each = seconds / 40
    log("reading")
    reads, tables = _reading(each)
    log("operators")
    operators, analysis = _operators(tables, each)
    documents = tables["parquet"]
    log("deduplication, tokens, Parquet")
    found: dict[str, Any] = {
        "sign_mb_s": _signing(documents, each), **_tokens(documents, each), **_parquet(documents, each), "analysis_mb_s": analysis
    }  # fmt: skip
    log("training")
    training = _training(seconds / 4)
    log("disk")
    with tempfile.TemporaryDirectory(dir=disk) as folder:
        write, read = _disk(Path(folder))
    return Rates(
        machine=_machine(), date=datetime.date.today().isoformat(), command=command, read_mb_s=reads, operator_mb_s=operators,
        disk_write_mb_s=write, disk_read_mb_s=read, **training, **found,
    )  # fmt: skip


def _rate(work: Callable[[], Any], amount: float, seconds: float) -> float:
    """`amount` over the CPU seconds of the fastest round; the first one, which compiles, does not count."""
    work()
    best, began = float("inf"), time.monotonic()
    while best == float("inf") or time.monotonic() - began < seconds:
        start = time.process_time()
        work()
        best = min(best, time.process_time() - start)
    return _short(amount / max(best, 1e-6))


def _short(value: float) -> float:
    return float(f"{value:.3g}")


def _reading(seconds: float) -> tuple[dict[str, float], dict[str, pa.Table]]:
    """MB/s of decompressed input by format, and what was read."""
    rates, tables = {}, {}
    for kind, name in _FILES.items():
        read = parse(ReadSettings, {"path": str(DATA / name), "format": kind}, "read")
        units = plan_units(read, ".", keyed=False)

        def rows(units: list[Any] = units, read: ReadSettings = read) -> list[pa.Table]:
            return [batch.table for unit in units for batch in read_unit(unit, read)]

        table = pa.concat_tables(rows(), promote_options="default")
        column = "text" if kind != "warc" else "content"
        tables[kind] = table
        rates[kind] = _rate(rows, _bytes(table, column) / 1e6, seconds)
    rates["wet"] = rates["warc"]
    rates["*"] = rates["jsonl"]
    return rates, tables


def _bytes(table: pa.Table, column: str) -> float:
    return float(pc.sum(pc.binary_length(table[column])).as_py() or 0)


def _operators(tables: dict[str, pa.Table], seconds: float) -> tuple[dict[str, float], float]:
    """MB/s of each operator by itself, words and lines of the text being known; and that of finding those."""
    documents = tables["parquet"]
    size = _bytes(documents, "text") / 1e6

    def analyse() -> Analysis:
        found = Analysis.of(documents["text"])
        _ = found.words, found.lines, found.characters, found.scripts
        return found

    analysis_rate = _rate(analyse, size, seconds)
    analysis = analyse()
    rates: dict[str, float] = {}
    for entry in _OPERATORS:
        operator = registry.build(entry)
        pages = "text" not in operator.needs
        table = tables["warc"] if pages else documents
        amount = _bytes(table, "content") / 1e6 if pages else size

        def work(operator: Any = operator, table: pa.Table = table, pages: bool = pages) -> Any:
            return operator.process(table, None if pages else analysis)

        rates[operator.name] = _rate(work, amount, seconds)
    rates["*"] = _short(statistics.median(rate for name, rate in rates.items() if name != "extract_html"))
    return rates, analysis_rate


def _signing(documents: pa.Table, seconds: float) -> float:
    options = DedupOptions.model_validate({}).with_shape()
    ordinals = np.arange(documents.num_rows, dtype=np.uint64)
    return _rate(lambda: document_keys(documents, ordinals, options, True), _bytes(documents, "text") / 1e6, seconds)


def _tokens(documents: pa.Table, seconds: float) -> dict[str, float]:
    """Learning a tokenizer (wall time: it takes all cores), encoding, and laying tokens into sequences and writing them."""
    texts = documents["text"].to_pylist()
    size = _bytes(documents, "text") / 1e6
    began = time.monotonic()
    tokenizer = bpe.train(iter([texts]), 32_000)
    learn = size / (time.monotonic() - began)
    encoder = Encoder(tokenizer.to_str().encode())
    column = documents["text"].cast(pa.large_string())
    ids, offsets = encoder.encode(column)
    lengths = np.diff(offsets) + 1
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "packed.parquet")

        def pack() -> None:
            place(lengths, 2048, "best_fit")
            rows = pa.ListArray.from_arrays(pa.array(np.arange(0, len(ids) + 1, 2048, dtype=np.int32)), pa.array(ids))
            pq.write_table(pa.table({"tokens": rows}), path, compression="zstd")

        return {
            "learn_mb_s": _short(learn),
            "encode_mb_s": _rate(lambda: encoder.encode(column), size, seconds),
            "pack_tokens_s": _rate(pack, float(len(ids)), seconds),
        }


def _parquet(documents: pa.Table, seconds: float) -> dict[str, float]:
    """Text written to and read from zstd Parquet as stages do, in memory."""
    size = _bytes(documents, "text") / 1e6

    def write() -> pa.Buffer:
        sink = pa.BufferOutputStream()
        pq.write_table(documents, sink, compression="zstd")
        return sink.getvalue()

    held = write()
    return {
        "write_mb_s": _rate(write, size, seconds),
        "scan_mb_s": _rate(lambda: pq.read_table(pa.BufferReader(held), use_threads=False), size, seconds),
    }


def _training(seconds: float) -> dict[str, Any]:
    """Operations/s of `train.pretrain`'s loss and AdamW: of a CPU core by precision (over CPU seconds of all threads), and the
    share of its peak that a GPU reaches, where there is one whose peak is known."""
    import torch

    from train import flops

    cores = torch.get_num_threads()
    rates = {precision: _short(_steps("cpu", precision, seconds / 2) / cores) for precision in ("fp32", "bf16")}
    found: dict[str, Any] = {"train_flops": rates}
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name(0)
        peak = flops.peak_flops(name)
        if peak is not None:
            known = max((each for each in flops.PEAKS if all(word in name.replace("-", " ") for word in each.split())), key=len)
            found |= {"gpu": known, "gpu_mfu": _short(min(1.0, _steps("cuda", "bf16", seconds) / peak))}
    return found


def _steps(device: str, precision: str, seconds: float) -> float:
    """Operations a second of training steps: of all threads on CPU, of one GPU."""
    import torch

    from pipelines.planning import models as sizes
    from train import models
    from train.loader import IGNORE
    from train.settings import ModelShape

    layers, hidden, heads, length, rows = _SHAPES[device]
    shape = ModelShape(layers=layers, hidden=hidden, heads=heads)
    torch.manual_seed(0)
    network = models.create(models.configuration(shape, _VOCAB, length, 0, 0), 0)
    torch.nn.Module.to(network, torch.device(device))
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True)
    ids = torch.randint(4, _VOCAB, (rows, length), device=device)
    targets = torch.cat([ids[:, 1:], torch.full((rows, 1), IGNORE, device=device)], 1)
    amount = sizes.train_flops(sizes.of_shape(shape, _VOCAB), float(rows * length), length)

    def step() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
            logits = network(input_ids=ids, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORE)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()

    step()
    best, began = float("inf"), time.monotonic()
    while best == float("inf") or time.monotonic() - began < seconds:
        wall, cpu = time.perf_counter(), time.process_time()
        step()
        taken = time.perf_counter() - wall
        if device == "cpu":  # what other programs took of the cores is not counted against this one
            taken = min(taken, (time.process_time() - cpu) / torch.get_num_threads())
        best = min(best, taken)
    return amount / best


def _disk(folder: Path) -> tuple[float, float]:
    """MB/s written until the disk has it, and read with the page cache emptied of it."""
    path, block = folder / "disk", os.urandom(8 << 20)
    began = time.monotonic()
    with open(path, "wb") as stream:
        for _ in range(_DISK_BYTES // len(block)):
            stream.write(block)
        stream.flush()
        os.fsync(stream.fileno())
    write = time.monotonic() - began
    with open(path, "rb", buffering=0) as stream:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        began = time.monotonic()
        while stream.read(len(block)):
            pass
        read = time.monotonic() - began
    return _short(_DISK_BYTES / 1e6 / write), _short(_DISK_BYTES / 1e6 / max(read, 1e-6))


def _machine() -> str:
    """The machine in a line: processor, cores, memory."""
    processor = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        lines = []
    processor = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), processor)
    return f"{processor}, {os.cpu_count()} cores, {psutil.virtual_memory().total / 2**30:.0f} GiB"
