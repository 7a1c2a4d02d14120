"""A small real world for the training room: bilingual text, a BPE tokenizer, packed shards, conversations, pairs."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from operators import shards, tables
from operators.ledger import Ledger

_ENGLISH = [
    "The furnace is heated slowly until the copper begins to glow.",
    "A river carries sand and clay down from the mountains to the sea.",
    "Every student must write a short report about the experiment.",
    "The index of a table makes a search fast, at the price of memory.",
    "Rain fell on the old bridge, and nobody crossed it that night.",
]
_CHINESE = [
    "炉火慢慢升温，直到铜开始发光。",
    "河水把沙子和泥土从山上带到海里。",
    "每个学生都要写一份关于实验的短报告。",
    "索引让查找变快，代价是占用内存。",
    "雨落在老桥上，那天夜里没有人走过。",
]


def documents(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Documents of a few sentences, half of them Chinese."""
    draw = random.Random(seed)
    rows = []
    for number in range(count):
        lang = "zh" if number % 2 else "en"
        pool = _CHINESE if lang == "zh" else _ENGLISH
        text = ("" if lang == "zh" else " ").join(draw.choice(pool) for _ in range(draw.randint(1, 6)))
        rows.append({"id": f"doc-{seed}-{number}", "text": text, "source": f"src-{number % 3}", "lang": lang})
    return rows


@pytest.fixture(scope="session")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE of 600 tokens with Danlu's special tokens, as a tokenizer.json."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((row["text"] for row in documents(400)), trainer)
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


def finish(directory: Path, kind: str, files: dict[str, str] | None = None) -> str:
    shards.finish(
        str(directory), stage=directory.parent.name, kind=kind, fingerprint=directory.name, config={}, inputs={}, files=files
    )
    return str(directory)


def write_rows(directory: Path, kind: str, rows: list[dict[str, Any]], schema: pa.Schema) -> str:
    writer = shards.UnitWriter(str(directory), 0)
    writer.write(pa.Table.from_pylist(rows, schema=schema))
    writer.commit(Ledger(created=len(rows), kept=len(rows)))
    return finish(directory, kind)


def pack(directory: Path, tokenizer_file: Path, rows: list[dict[str, str]], length: int, first: int = 0) -> str:
    """What the pack stage leaves: documents laid end to end, cut at `length`, the last row padded."""
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    end, pad = tokenizer.token_to_id("<|endoftext|>"), tokenizer.token_to_id("<|pad|>")
    sequences: list[list[int]] = [[]]
    bounds: list[list[int]] = [[0]]
    for row in rows:
        ids = [*tokenizer.encode(row["text"]).ids, end]
        while ids:
            if len(sequences[-1]) == length:
                sequences.append([])
                bounds.append([0])
            taken = ids[: length - len(sequences[-1])]
            sequences[-1] += taken
            bounds[-1].append(len(sequences[-1]))
            ids = ids[len(taken) :]
    sequences[-1] += [pad] * (length - len(sequences[-1]))
    directory.mkdir(parents=True)
    np.array(sequences, "<u2").tofile(directory / "tokens.bin")
    np.concatenate(bounds).astype("<i4").tofile(directory / "boundaries.bin")
    np.cumsum([0, *map(len, bounds)]).astype("<i8").tofile(directory / "boundary_offsets.bin")
    index = {
        "dtype": "uint16", "length": length, "sequences": len(sequences), "vocab_size": tokenizer.get_vocab_size(),
        "eos_token_id": end, "padding_token_id": pad, "boundaries": "boundaries.bin", "boundary_offsets": "boundary_offsets.bin",
    }  # fmt: skip
    (directory / "tokens.json").write_text(json.dumps(index))
    (directory / "tokenizer.json").write_bytes(tokenizer_file.read_bytes())
    return finish(directory, "pack", {"tokens": "tokens.bin", "index": "tokens.json", "tokenizer": "tokenizer.json"})


@pytest.fixture(scope="session")
def packed(tmp_path_factory: pytest.TempPathFactory, bpe: Path) -> str:
    """A finished pack stage of 64-token rows."""
    return pack(tmp_path_factory.mktemp("run") / "tokens" / "f0", bpe, documents(400), 64)


@pytest.fixture(scope="session")
def make_pack(bpe: Path) -> Callable[..., str]:
    return lambda directory, rows, length: pack(directory, bpe, rows, length)


def conversations(count: int) -> list[dict[str, Any]]:
    rows = []
    for number in range(count):
        zh = number % 2
        question = f"第{number}个问题：什么会发光？" if zh else f"Question {number}: what glows?"
        answer = (_CHINESE if zh else _ENGLISH)[number % 5]
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        if number % 3 == 0:
            messages += [
                {"role": "user", "content": "再说一次" if zh else "Say it again"},
                {"role": "assistant", "content": answer},
            ]
        rows.append({"id": f"chat-{number}", "messages": messages, "lang": "zh" if zh else "en", "tools": None, "provenance": None})
    return rows


def preferences(count: int) -> list[dict[str, Any]]:
    rows = []
    for number in range(count):
        zh = number % 2
        pool = _CHINESE if zh else _ENGLISH
        rows.append(
            {
                "id": f"pair-{number}",
                "prompt": [{"role": "user", "content": f"请说第{number}句" if zh else f"Say sentence {number}"}],
                "chosen": [{"role": "assistant", "content": pool[number % 5]}],
                "rejected": [{"role": "assistant", "content": "不。" if zh else "No."}],
                "margin": 1.0, "lang": "zh" if zh else "en", "provenance": None,
            }
        )  # fmt: skip
    return rows


@pytest.fixture(scope="session")
def chats(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_rows(tmp_path_factory.mktemp("run") / "chats" / "f0", "self_instruct", conversations(60), tables.CONVERSATIONS)


@pytest.fixture(scope="session")
def general(tmp_path_factory: pytest.TempPathFactory) -> str:
    rows = [{**row, "id": f"general-{row['id']}"} for row in conversations(20)]
    return write_rows(tmp_path_factory.mktemp("run") / "general" / "f0", "general", rows, tables.CONVERSATIONS)


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_rows(tmp_path_factory.mktemp("run") / "pairs" / "f0", "preferences", preferences(60), tables.PREFERENCES)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    schema = pa.schema([*tables.DOCUMENTS, pa.field("lang", pa.string())])
    return write_rows(tmp_path_factory.mktemp("run") / "clean" / "f0", "corpus", documents(400), schema)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Small models are slower on two threads than on one, and results must not depend on the machine's cores."""
    import torch

    torch.set_num_threads(1)


SHAPE = {"layers": 2, "hidden": 64, "heads": 4, "kv_heads": 2, "intermediate": 128}


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory, packed: str) -> str:
    """A tiny model pretrained for a few steps in this process."""
    from train import pretrain
    from train.parallel import Workers
    from train.settings import ModelShape, PretrainJob, RowsInput

    job = PretrainJob(
        inputs=[RowsInput(name="tokens", directory=packed)], model=ModelShape(**SHAPE), steps=20,
        learning_rate=5e-3, checkpoint_every=10,
    )  # fmt: skip
    directory = str(tmp_path_factory.mktemp("run") / "base" / "f0")
    pretrain.run(job, directory, Workers())
    return directory + "/model"
