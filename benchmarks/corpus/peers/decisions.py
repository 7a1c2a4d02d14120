"""What datatrove's filters and its MinHash decide. Runs in datatrove's environment, imports nothing of ours.

`python decisions.py filters IN OUT LANGUAGE`: IN is JSONL {id, text}; OUT gets one JSON line a document with the
reason of each filter (null = kept, `!Error` = the filter raised) and the text that C4 left.
`python decisions.py minhash IN FOLDER SEED`: the four stages; writes FOLDER/kept.json (ids),
FOLDER/clusters.json ([document, cluster]) and FOLDER/signatures.json ([document, band, hex] of every band).
`python decisions.py shingles IN OUT`: the shingles of each document as datatrove makes them.
"""

from __future__ import annotations

import gzip
import json
import struct
import sys
import time
from pathlib import Path
from typing import Any

from datatrove.data import Document
from datatrove.pipeline.filters import C4QualityFilter, FineWebQualityFilter, GopherQualityFilter, GopherRepetitionFilter
from datatrove.utils.text import ngrams, simplify_text, split_into_parts
from datatrove.utils.typeshelper import Languages
from datatrove.utils.word_tokenizers import load_word_tokenizer

# FineWeb-2's configuration of cmn_Hani
_STOP_WORDS_ZH = [
    "的", "是", "在", "和", "了", "有", "不", "与", "與", "或", "为", "為", "这", "這", "也", "就", "中", "对", "對", "可以",
    "之", "其", "而", "以", "于", "於", "者", "所", "则", "則",
]  # fmt: skip


def _filters(language: str) -> dict[str, Any]:
    if language == "en":
        return {
            "gopher_quality": GopherQualityFilter(),
            "gopher_repetition": GopherRepetitionFilter(),
            "c4_quality": C4QualityFilter(filter_no_terminal_punct=False),
            "c4_quality_terminal": C4QualityFilter(),
            "fineweb_quality": FineWebQualityFilter(),
        }
    return {
        "gopher_quality": GopherQualityFilter(
            min_avg_word_length=1, max_avg_word_length=5, max_non_alpha_words_ratio=0.735, stop_words=_STOP_WORDS_ZH,
            language="cmn_Hani",
        ),
        "gopher_repetition": GopherRepetitionFilter(
            dup_para_frac=0, dup_para_char_frac=0, dup_line_frac=0.287, dup_line_char_frac=0,
            top_n_grams=((2, 0.256), (3, 0.201), (4, 0.171)),
            dup_n_grams=((5, 0.198), (6, 0.182), (7, 0.167), (8, 0.154), (9, 0.14), (10, 0.127)),
            language="cmn_Hani",
        ),
        "fineweb_quality": FineWebQualityFilter(
            line_punct_thr=0.106, short_line_thr=999, char_duplicates_ratio=0.1, new_line_ratio=0.178, language="cmn_Hani"
        ),
    }  # fmt: skip


def _decide(path: str, out: str, language: str) -> dict[str, Any]:
    filters = _filters(language)
    seconds = dict.fromkeys(filters, 0.0)
    with open(path, encoding="utf-8") as lines, open(out, "w", encoding="utf-8") as stream:
        for line in lines:
            row = json.loads(line)
            result: dict[str, Any] = {"id": row["id"]}
            for name, one in filters.items():
                document = Document(text=row["text"], id=str(row["id"]))
                split_into_parts.cache_clear()  # each filter pays for its own words
                start = time.process_time()
                try:
                    verdict = one.filter(document)
                    reason = None if verdict is True else verdict[1]
                except Exception as error:  # noqa: BLE001 (what the peer does on such a text is the result)
                    reason = f"!{type(error).__name__}"
                seconds[name] += time.process_time() - start
                result[name] = reason
                if name.startswith("c4") and reason is None:
                    result[f"{name}_text"] = document.text
            stream.write(json.dumps(result, ensure_ascii=False) + "\n")
    return {"seconds": seconds}


def _minhash(path: str, folder: str, seed: int) -> dict[str, Any]:
    """One task a stage, so that the order of documents is the order of the file."""
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.dedup import MinhashDedupCluster, MinhashDedupFilter, MinhashDedupSignature
    from datatrove.pipeline.dedup.minhash import MinhashConfig, MinhashDedupBuckets
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.writers import JsonlWriter

    base = Path(folder)
    config = MinhashConfig(n_grams=5, num_buckets=14, hashes_per_bucket=8, seed=seed)
    source, name = str(Path(path).parent), Path(path).name
    reader = lambda: JsonlReader(source, glob_pattern=name, default_metadata={})  # noqa: E731
    stages = (
        [reader(), MinhashDedupSignature(str(base / "signatures"), config=config, language=Languages.english)],
        [MinhashDedupBuckets(str(base / "signatures"), str(base / "buckets"), config=config)],
        [MinhashDedupCluster(str(base / "buckets"), str(base / "removed"), config=config, save_cluster_id=True)],
        [reader(), MinhashDedupFilter(str(base / "removed")), JsonlWriter(str(base / "kept"))],
    )
    for number, stage in enumerate(stages):
        tasks = config.num_buckets if number == 1 else 1
        LocalPipelineExecutor(stage, tasks=tasks, workers=1, logging_dir=str(base / "logs" / str(number))).run()
    kept = []
    for part in sorted((base / "kept").glob("*.jsonl.gz")):
        with gzip.open(part, "rt", encoding="utf-8") as lines:
            kept += [json.loads(line)["id"] for line in lines]
    (base / "kept.json").write_text(json.dumps(kept, ensure_ascii=False), "utf-8")
    record = struct.Struct(f"<{config.hashes_per_bucket}QI")
    bands = []
    for band in range(config.num_buckets):
        data = (base / "signatures" / f"bucket_{band:03d}" / "00000.minhash.sig").read_bytes()
        for start in range(0, len(data), record.size):
            piece = data[start : start + record.size]
            bands.append([struct.unpack("<I", piece[-4:])[0], band, piece[:-4].hex()])
    (base / "signatures.json").write_text(json.dumps(bands), "utf-8")
    clusters = (base / "removed" / "000000.clusters").read_bytes()
    (base / "clusters.json").write_text(json.dumps(list(struct.iter_unpack("<II", clusters))), "utf-8")
    return {"kept": len(kept)}


def _shingles(path: str, out: str) -> dict[str, Any]:
    tokenizer = load_word_tokenizer(Languages.english)
    with open(path, encoding="utf-8") as lines, open(out, "w", encoding="utf-8") as stream:
        for line in lines:
            row = json.loads(line)
            words = tokenizer.word_tokenize(simplify_text(row["text"]))
            found = sorted({" ".join(each) for each in ngrams(words, 5)})
            stream.write(json.dumps({"id": row["id"], "shingles": found}, ensure_ascii=False) + "\n")
    return {}


if __name__ == "__main__":
    command, *given = sys.argv[1:]
    if command == "filters":
        print(json.dumps(_decide(*given)))
    elif command == "minhash":
        print(json.dumps(_minhash(given[0], given[1], int(given[2]))))
    elif command == "shingles":
        print(json.dumps(_shingles(*given)))
    else:
        sys.exit(f"unknown command {command!r}: filters, minhash or shingles")
