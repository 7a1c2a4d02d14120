"""What scheduling costs, ours beside a Ray Data pipeline of the same units; and what the commit of very many parts costs.

1. Units that do nothing: units a second, CPU milliseconds a unit of the driver and of Ray's servers, driver memory a unit. Ray Data
   gets fewer units, because each costs it more; both rates are per unit.
2. 100,000 units with 500 out at a time, the first tenth beside the last: nothing may slow down or grow.
3. Units that sleep: what is lost between the end of a unit and the start of the next one on a worker.
4. 100,000 unit records of ten parts each, folded into a manifest and read again: seconds and peak memory.
"""

from __future__ import annotations

import hashlib
import json
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.measure import Usage, arguments, interleave, process, publish

_WORKERS = 500
_UNIT_S = 30.0


def main() -> None:
    options = arguments(__doc__ or "")
    many, units, peer_units = (5_000, 2_000, 200) if options.quick else (100_000, 10_000, 2_000)

    def side(*words: object) -> Usage:
        return process([sys.executable, "-m", "benchmarks.cluster.scheduling_side", *(str(word) for word in words)])

    found = interleave({"ours": lambda: side("ours", units), "ray_data": lambda: side("ray_data", peer_units)}, options.rounds)
    medians = {
        name: {
            what: statistics.median(usage.output[what] for usage in usages) for what in ("units_a_second", "driver_bytes_a_unit")
        }
        for name, usages in found.items()
    }
    large = side("ours", many, "--workers", _WORKERS).output
    sleeping = side("ours", 80, "--workers", 4, "--sleep", 0.5).output
    lost_s = (sleeping["seconds"] - 80 / 4 * 0.5) / (80 / 4)
    needed = _WORKERS / _UNIT_S
    cpu_s = sum(large["cpu_ms_a_unit"].values()) / 1e3
    records = process([sys.executable, "-m", "benchmarks.cluster.scheduling", "--records", str(many), "10"]).output
    publish(
        "cluster.scheduling",
        {"vs_ray_data": medians["ours"]["units_a_second"] / medians["ray_data"]["units_a_second"]},
        {
            "medians": medians,
            "cpu_ms_a_unit": {name: usages[-1].output["cpu_ms_a_unit"] for name, usages in found.items()},
            f"{many}_units_{_WORKERS}_at_a_time": large,
            "lost_between_two_units_ms": 1e3 * lost_s,
            "at_500_workers_and_units_of_30_s": {
                "units_a_second_needed": needed,
                "share_of_a_unit_lost": lost_s / _UNIT_S,
                "share_of_the_head_s_cores_used": needed * cpu_s,
                "share_of_the_rate_measured": needed / large["units_a_second"],
            },
            "records": records,
        },
        data=f"{many:,} units, {peer_units:,} for Ray Data; {many:,} records of 10 parts",
        quick=options.quick,
    )


def commit_many(units: int, parts: int) -> dict[str, Any]:
    """Fold `units` records of `parts` parts each into a manifest, and list the parts: seconds of each, peak memory of all."""
    from operators import shards

    with tempfile.TemporaryDirectory() as folder:
        stage = Path(folder, "run", "stage", "f" * 16)
        (stage / "units").mkdir(parents=True)
        (stage / "timings").mkdir()
        (stage / "parts").mkdir()
        for unit in range(units):
            digests = [hashlib.sha256(b"%d %d" % (unit, part)).hexdigest() for part in range(parts)]
            names = [f"parts/{unit:08d}-{part:03d}-{digest[:12]}.parquet" for part, digest in enumerate(digests)]
            listed = [
                {"name": name, "rows": 7, "bytes": 4096, "sha256": digest} for name, digest in zip(names, digests, strict=True)
            ]
            ledger = {"in": 8 * parts, "created": 0, "kept": 7 * parts, "rejected": {"gopher:short": parts}, "quarantined": 0}
            stats = {"lang": {"en": 3 * parts, "zh": 4 * parts}}
            record = {"unit": unit, "parts": listed, "rejects": [], "ledger": ledger, "stats": stats}
            (stage / "units" / f"{unit:08d}.json").write_text(json.dumps(record))
            timing = {"seconds": 1.0, "cpu_seconds": 1.0, "peak_rss_bytes": 1 << 28}
            (stage / "timings" / f"{unit:08d}.json").write_text(json.dumps(timing))
        first = stage / "parts" / f"00000000-000-{hashlib.sha256(b'0 0').hexdigest()[:12]}.parquet"
        _one_row(first)
        before, begun = _peak(), time.perf_counter()
        missing = len(set(range(units)) - shards.committed_numbers(str(stage)))
        listed_s, begun = time.perf_counter() - begun, time.perf_counter()
        shards.finish(str(stage), stage="s", kind="corpus", fingerprint="f", config={}, inputs={})
        finish_s, begun = time.perf_counter() - begun, time.perf_counter()
        found = shards.parts([str(stage)])
        parts_s = time.perf_counter() - begun
        assert not missing and len(found) == units * parts and found[-1].first_ordinal == 7 * (units * parts - 1)
        return {
            "parts": len(found), "list_units_s": listed_s, "finish_s": finish_s, "read_parts_s": parts_s, "peak_mb": _peak() / 1e6,
            "peak_before_mb": before / 1e6, "manifest_mb": sum(path.stat().st_size for path in stage.glob("manifest*")) / 1e6,
        }  # fmt: skip


def _one_row(path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"id": ["a"]}), path)


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    if sys.argv[1:2] == ["--records"]:
        print(json.dumps(commit_many(int(sys.argv[2]), int(sys.argv[3]))))
    else:
        main()
