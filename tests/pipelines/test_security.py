"""What docs/security.md promises, tried: hostile code, checkpoints, names, archives and texts, and secrets that must not leak."""

from __future__ import annotations

import ast
import bz2
import gzip
import json
import lzma
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster import storage
from cluster.jobs import EXCLUDES
from operators.config import SettingsError
from operators.sources import streams
from pipelines.cli import main
from pipelines.recipe import parse_recipe
from pipelines.report.build import build_report
from tests.conftest import ROOT
from tests.operators.sources.reading import read_all
from tests.pipelines.report.browser import dom, needs_browser
from tests.pipelines.report.fixture_run import ORDER, build_run

# --- no code from data: what the shipped packages may not contain ---

_NEVER = {
    "pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "jsonpickle", "tarfile", "zipfile",
}  # fmt: skip
_SAFE_LOADERS = {"SafeLoader", "CSafeLoader", "_UniqueKeys"}


def forbidden(source: str, name: str = "planted.py") -> list[str]:
    """Lines of a module that could run what a file holds: `NAME:LINE: what`."""
    found = []
    for node in ast.walk(ast.parse(source)):
        what = None
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            what = next((f"import of {module}" for module in modules if module.split(".")[0] in _NEVER), None)
        elif isinstance(node, ast.Call):
            what = _call(node)
        if what:
            found.append(f"{name}:{getattr(node, 'lineno', 0)}: {what}")
    return found


def _call(node: ast.Call) -> str | None:
    called = ast.unparse(node.func)
    options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
    if called in ("eval", "exec", "compile", "__import__", "os.system", "os.popen"):
        return called
    if options.get("shell") == "True" or options.get("trust_remote_code") == "True" or options.get("allow_pickle") == "True":
        return f"{called} with {options}"
    if called == "torch.load" and options.get("weights_only") != "True":
        return "torch.load without weights_only"
    if called in ("np.load", "numpy.load") and options.get("allow_pickle") != "False":
        return "np.load without allow_pickle=False"
    if called in ("yaml.load", "yaml.load_all") and options.get("Loader") not in _SAFE_LOADERS:
        return "yaml.load without a safe loader"
    if called.startswith("yaml.") and ("unsafe" in called or "full_load" in called):
        return called
    if called.startswith("Auto") and called.endswith(".from_pretrained"):
        spread = any(keyword.arg is None for keyword in node.keywords)  # `**options`, looked at by hand
        if options.get("trust_remote_code") != "False" and not spread:
            return f"{called} without trust_remote_code=False"
        if called.startswith("AutoModel") and "gguf_file" not in options and options.get("use_safetensors") != "True":
            return f"{called} without use_safetensors=True"
    return None


def test_no_shipped_module_can_run_what_a_file_holds() -> None:
    found, modules = [], 0
    for room in ("cluster", "operators", "train", "pipelines"):
        for path in sorted((ROOT / room).rglob("*.py")):
            modules += 1
            found += forbidden(path.read_text("utf-8"), str(path.relative_to(ROOT)))
    assert modules > 300 and found == []


@pytest.mark.parametrize(
    "planted",
    [
        "import pickle", "from joblib import load", "import cloudpickle as c", "import tarfile", "eval(x)", "exec(open(p).read())",
        "subprocess.run(c, shell=True)", "os.system(c)", "torch.load(p)", "torch.load(p, weights_only=False)", "np.load(p)",
        "np.load(p, allow_pickle=True)", "yaml.load(t)", "yaml.load(t, Loader=yaml.Loader)", "yaml.unsafe_load(t)",
        "AutoModelForCausalLM.from_pretrained(p, trust_remote_code=True)", "AutoTokenizer.from_pretrained(p)",
        "AutoModel.from_pretrained(p, trust_remote_code=False)", "LLM(model=p, trust_remote_code=True)",
    ],
)  # fmt: skip
def test_a_module_that_could_would_be_found(planted: str) -> None:
    assert len(forbidden(planted)) == 1


def test_what_is_safe_is_not_complained_of() -> None:
    assert (
        forbidden(
            "yaml.load(t, Loader=_UniqueKeys); np.load(p, allow_pickle=False); model.eval(); torch.load(p, weights_only=True)"
        )
        == []
    )


# --- checkpoints ---


class _Bomb:
    """What unpickles to an action: a file appears."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.write_text, (self.mark, "it ran"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose files say that its code is to be taken from beside it, and code that leaves a mark when it is imported."""
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM

    directory = tmp_path_factory.mktemp("evil")
    config = LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    Tokenizer(models.WordLevel({"a": 0, "b": 1}, "a")).save(str(directory / "tokenizer.json"))
    described = json.loads((directory / "config.json").read_text())
    described["auto_map"] = {
        "AutoConfig": "modeling_evil.Config", "AutoModelForCausalLM": "modeling_evil.Model", "AutoModel": "modeling_evil.Model",
        "AutoModelForSequenceClassification": "modeling_evil.Model",
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(described))
    (directory / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "auto_map": {"AutoTokenizer": ["modeling_evil.Tok", "modeling_evil.Tok"]},
            }
        )
    )
    mark = directory / "mark"
    (directory / "modeling_evil.py").write_text(
        f"open({str(mark)!r}, 'w').write('it ran')\nclass Model: pass\nConfig = Tok = Model\n"
    )
    (directory / "pytorch_model.bin").write_bytes(pickle.dumps(_Bomb(mark)))
    return directory


def test_code_beside_a_checkpoint_is_never_run(model: Path) -> None:
    from operators.quality import causal_model
    from operators.synthesis.curate import chat_tokens
    from train import models

    assert models.load(str(model)).config.hidden_size == 8
    assert models.load_tokenizer(str(model)).convert_tokens_to_ids("b") == 1
    assert chat_tokens.load(str(model)).ids("b").tolist() == [1]
    assert causal_model.load(str(model), "cpu", "float32").model.config.hidden_size == 8
    assert not (model / "mark").exists()


def test_a_chat_template_reaches_nothing_of_python(model: Path) -> None:
    from jinja2.exceptions import SecurityError, UndefinedError

    from train import models

    tokenizer = models.load_tokenizer(str(model))
    for reach in (
        "cycler.__init__.__globals__.os.system('true')",
        "''.__class__.__mro__[1].__subclasses__()",
        "messages.append(1)",
    ):
        with pytest.raises((SecurityError, UndefinedError)):
            tokenizer.apply_chat_template([{"role": "user", "content": "x"}], chat_template=f"{{{{ {reach} }}}}", tokenize=False)


def test_a_pickled_checkpoint_is_refused_unread(model: Path, tmp_path: Path) -> None:
    import shutil

    from train import models

    for stray in (None, "other.safetensors"):
        directory = tmp_path / f"pickled-{stray}"
        shutil.copytree(model, directory, ignore=shutil.ignore_patterns("*.safetensors"))
        if stray:  # looks like a model in safetensors, but its weights are not in there
            (directory / stray).write_bytes(b"")
        with pytest.raises((FileNotFoundError, OSError), match="safetensors"):
            models.load(str(directory))
    assert not (model / "mark").exists()


def test_the_planted_pickle_would_have_acted(model: Path, tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(_Bomb(tmp_path / "mark")))  # noqa: S301 - the proof that the bomb is one
    assert (tmp_path / "mark").read_text() == "it ran"


# --- names and paths ---


@pytest.mark.parametrize("name", ["../evil", "a/b", "..", ".", "/etc/x", "a\\b", "a\n", "", "a" * 65, "é"])
def test_a_name_cannot_leave_the_folder_of_runs(name: str) -> None:
    for written in ({"name": name, "stages": {"a": {"kind": "mix"}}}, {"name": "r", "stages": {name: {"kind": "mix"}}}):
        with pytest.raises(SettingsError, match="letters, digits"):
            parse_recipe(json.dumps(written))


def test_a_recipe_is_data_to_the_parser() -> None:
    with pytest.raises(SettingsError, match="not valid YAML"):
        parse_recipe("name: !!python/object/apply:os.system ['touch planted']\nstages: {a: {kind: mix}}")


@pytest.mark.parametrize("runs", ["../../x", "s3://key:secret@bucket/x"])
def test_credentials_and_folders_of_this_machine_are_not_sent_with_a_job(runs: str, tmp_path: Path) -> None:
    from cluster.jobs import visible

    with pytest.raises(ValueError) as refused:
        visible(runs, "https://head.example:8265")
    assert "secret" not in str(refused.value)
    assert {".env", ".env.*", ".netrc", "*.pem"} <= set(EXCLUDES)


# --- decompression bombs ---


def _bomb(name: str, size: int) -> bytes:
    line = b'{"id": "x", "text": "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"}\n'
    data = line * (size // len(line))
    if name.endswith(".zst"):
        out = pa.BufferOutputStream()
        with pa.CompressedOutputStream(out, "zstd") as stream:
            stream.write(data)
        return bytes(out.getvalue().to_pybytes())
    return {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}[Path(name).suffix](data)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.bz2", "a.jsonl.xz", "a.jsonl.zst", "a.csv.gz", "a.txt.xz"])
def test_a_file_that_expands_too_far_ends_as_one_row_set_aside(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "FREE_BYTES", 1 << 18)
    (tmp_path / name).write_bytes(_bomb(name.replace("csv", "jsonl").replace("txt", "jsonl"), 2 << 20))
    read = read_all(tmp_path / name, max_expansion=2, **({"csv": {"column_names": ["text", "b"]}} if "csv" in name else {}))
    assert read.reasons[-1] == "bomb" and "max_expansion 2" in read.bad[-1].detail
    assert sum(len(text) for text in read.texts) <= 3 << 18  # what came before it


def test_ordinary_text_does_not_expand_too_far(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "FREE_BYTES", 0)
    (tmp_path / "notes.jsonl.gz").write_bytes(gzip.compress((ROOT / "examples" / "data" / "notes.jsonl").read_bytes() * 4, 9))
    assert "bomb" not in read_all(tmp_path / "notes.jsonl.gz").reasons


def test_a_parquet_bomb_is_set_aside_by_the_length_of_its_text(tmp_path: Path) -> None:
    path = tmp_path / "bomb.parquet"
    texts = pa.array(["fine", "a" * (16 << 20)], pa.large_string())
    pq.write_table(pa.table({"id": ["1", "2"], "text": texts}), path, compression="zstd", use_dictionary=False)
    assert path.stat().st_size < 100_000
    read = read_all(path, max_text_bytes=1 << 20)
    assert (read.ids, read.reasons) == (["1"], ["too_long"])


def test_a_pdf_bomb_gives_no_more_text_than_is_allowed(tmp_path: Path) -> None:
    import zlib

    content = zlib.compress(
        b"BT /F1 1 Tf " + b"(aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa) Tj " * 4_000 + b"ET", 9
    )
    objects = [
        b"<</Type/Catalog/Pages 2 0 R>>", b"<</Type/Pages/Kids[3 0 R]/Count 1>>",
        b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 99999 99999]/Contents 4 0 R/Resources<</Font<</F1 5 0 R>>>>>>",
        b"<</Length %d/Filter/FlateDecode>>stream\n%s\nendstream" % (len(content), content),
        b"<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>",
    ]  # fmt: skip
    data, offsets = b"%PDF-1.4\n", []
    for number, body in enumerate(objects, 1):
        offsets.append(len(data))
        data += b"%d 0 obj%s endobj\n" % (number, body)
    table = b"".join(b"%010d 00000 n \n" % offset for offset in offsets)
    data += b"xref\n0 6\n0000000000 65535 f \n%strailer<</Size 6/Root 1 0 R>>\nstartxref\n%d\n%%%%EOF" % (table, len(data))
    (tmp_path / "bomb.pdf").write_bytes(data)
    assert len(data) < 20_000
    assert read_all(tmp_path / "bomb.pdf", max_text_bytes=100_000).reasons == ["too_long"]


# --- hostile text in pages ---

ACT = "document.documentElement.dataset.owned='yes'"
HOSTILE = [
    f"<script>{ACT}</script>", f"</script><script>{ACT}</script>", f'"><img src=x onerror="{ACT}">', f"'><svg onload='{ACT}'>",
    f"</style><script>{ACT}</script>", f"</title><script>{ACT}</script>", f"javascript:{ACT}", f"\u2028{ACT}\u2029//",
    f'</pre></textarea><iframe srcdoc="<script>parent.{ACT}</script>">', f"<!--<script>{ACT}</script>",
    f"]]>{{{{7*7}}}}${{{ACT}}}", f"<math><mtext></form><img src=x onerror={ACT}>",
]  # fmt: skip
PAYLOAD = " ".join(HOSTILE)


def _poisoned(value: Any, inside: bool = False) -> Any:
    """Every text of a manifest's free parts with the payload behind it, keys of counts too."""
    if isinstance(value, dict):
        return {
            (f"{key}{PAYLOAD}" if inside and isinstance(item, int | float) else key): _poisoned(item, True)
            for key, item in value.items()
        }
    if isinstance(value, list):
        return [_poisoned(item, True) for item in value]
    return value + PAYLOAD if isinstance(value, str) else value


def _tell_all(run: Path) -> int:
    """Put the payload wherever a run's records hold text that somebody else may have written; how many files were changed."""
    changed = 0
    for path in run.glob("*/*/manifest.json"):
        manifest = json.loads(path.read_text("utf-8"))
        manifest["config"], manifest["versions"] = _poisoned(manifest["config"]), {**manifest["versions"], f"lib{PAYLOAD}": PAYLOAD}
        manifest["ledger"]["rejected"] = {f"{key}{PAYLOAD}": count for key, count in manifest["ledger"]["rejected"].items()}
        for name in ("sources", "languages", "clusters", "examples", "operations"):
            if name in manifest["stats"]:
                manifest["stats"][name] = _poisoned(manifest["stats"][name], True)
        path.write_text(json.dumps(manifest), "utf-8")
        changed += 1
    record = json.loads((run / "run.json").read_text("utf-8"))
    record.update(message=PAYLOAD, command=PAYLOAD, recipe_text=PAYLOAD)
    record["machine"]["platform"] = PAYLOAD
    for entry in record["stages"].values():
        entry["message"] = PAYLOAD
    (run / "run.json").write_text(json.dumps(record), "utf-8")
    texts = dict.fromkeys(("name", "remedy", "note"), PAYLOAD)
    symptom = {**texts, "verdict": "bad", "value": 0.5, "before": None, "bound": 0.1, "direction": "above"}
    symptoms = [{"en": symptom, "zh": symptom}]
    replies = [{"lang": "en", "text": PAYLOAD, "reply": PAYLOAD, "before": PAYLOAD}]
    told = {"stage": "chat", "base": PAYLOAD, "symptoms": symptoms, "replies": replies, "model": "x"}
    (run / "diagnosis.json").write_text(json.dumps({"stages": {"chat": told}}), "utf-8")
    return changed


@needs_browser
def test_hostile_text_everywhere_in_a_report_runs_nothing_with_its_policy_or_without(tmp_path: Path) -> None:
    run = build_run(tmp_path)
    assert _tell_all(run) == len(ORDER)
    html = Path(build_report(str(run))).read_text("utf-8")
    assert html.count("Content-Security-Policy") == 1 and "default-src &#39;none&#39;" in html
    assert html.count(ACT.replace("'", "&#39;")) > 100, "the payload is on the page"
    bare = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", html)  # the escapes alone hold too
    for page in (html, bare):
        (tmp_path / "page.html").write_text(page, "utf-8")
        shown = dom(tmp_path / "page.html", tmp_path / "profile")
        assert 'data-owned="yes"' not in shown and 'data-script="on"' in shown, "our own script runs, and no other"
        assert re.findall(r'<[^>]*(?:href|src)="(?!#)[^"]*"', shown) == []


@needs_browser
def test_the_payload_acts_on_a_page_that_does_not_escape(tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(f"<!DOCTYPE html><html><body><p>{PAYLOAD}</p></body></html>", "utf-8")
    assert 'data-owned="yes"' in dom(tmp_path / "page.html", tmp_path / "profile")


@needs_browser
def test_hostile_rows_run_nothing_in_the_review_page(tmp_path: Path) -> None:
    from pipelines.review import page, sample
    from tests.pipelines.review import run as made

    patch = pytest.MonkeyPatch()
    patch.setattr(made, "HOSTILE", PAYLOAD)
    try:
        run = made.make_run(tmp_path, 40)
    finally:
        patch.undo()
    directory = str(run / "chat" / "f00d")
    drawn = sample.draw(directory, 40)
    sample.keep(directory, drawn)
    page.write(directory, drawn, str(tmp_path / "out"))
    html = (tmp_path / "out" / "review.html").read_text("utf-8")
    assert "dataset.owned" in html and "Content-Security-Policy" in html
    assert 'data-owned="yes"' not in dom(tmp_path / "out" / "review.html", tmp_path / "profile")


# --- secrets ---

SECRET = "Pl4nted-s3cret-0f-the-t3st-4711"
IN_RECIPE = "sk-proj-Pl4ntedKey00000000000000000000000000000000"


def _bytes(directory: Path) -> Iterator[tuple[Path, bytes]]:
    """Every file below a directory, and of Parquet files every value decoded as well."""
    for path in sorted(directory.rglob("*")):
        if path.is_file():
            data = path.read_bytes()
            yield path, data + (str(pq.read_table(path).to_pylist()).encode() if path.suffix == ".parquet" else b"")


def test_a_secret_of_the_environment_or_a_recipe_is_in_no_file_and_in_no_output(tmp_path: Path) -> None:
    """Through a stage that fails with it, another that logs it, and every command that tells of a run."""
    (tmp_path / "docs.jsonl").write_text('{"id": "1", "text": "a plain text"}\n')
    recipe = (
        f"name: secretive\ndescription: 'key {IN_RECIPE}'\nstages:\n"
        "  a: {kind: 'tests.pipelines.toy:NumberStage', units: 2, ray: false}\n"
        f"  b: {{kind: 'tests.pipelines.toy:NumberStage', input: [a], ray: false, fail: 'refused {SECRET} and {IN_RECIPE}'}}\n"
    )
    (tmp_path / "recipe.yaml").write_text(recipe)
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "MY_API_TOKEN": SECRET,
        "RAY_AUTH_TOKEN": SECRET,
        "OPENAI_API_KEY": IN_RECIPE,
    }
    told = b""
    words = [
        ["run", "recipe.yaml"], ["status", "runs/secretive"], ["status", "runs/secretive", "--json"],
        ["status", "runs/secretive", "--prometheus"], ["report", "runs/secretive"], ["diff", "runs/secretive", "runs/secretive"],
        ["check", "recipe.yaml", "--runs", "runs"], ["manifest", "kuberay", "--kind", "cluster"],
        ["manifest", "slurm", "--recipe", "recipe.yaml"],
        ["manifest", "kuberay", "--kind", "cluster", "--set", f"env.AWS_SECRET_ACCESS_KEY={SECRET}"],
        ["run", "recipe.yaml", "--runs", f"s3://me:{SECRET}@bucket/runs"],
        ["submit", "recipe.yaml", "--address", "http://127.0.0.1:1", "--runs", f"s3://me:{SECRET}@bucket/runs"],
    ]  # fmt: skip
    script = (
        f"import sys, json\nfrom pipelines.cli import main\nfor words in json.loads({json.dumps(json.dumps(words))}): main(words)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, timeout=120, check=False
    )
    told = done.stdout + done.stderr
    assert b"refused [MY_API_TOKEN]" in told or b"refused [RAY_AUTH_TOKEN]" in told, told.decode()
    assert b"Traceback" not in told, told.decode()
    files = dict(_bytes(tmp_path / "runs"))
    assert {"run.json", "report.html", "status.json", "log.jsonl", "manifest.json"} <= {path.name for path in files}
    for where, data in [*((str(path), data) for path, data in files.items()), ("output", told)]:
        for secret in (SECRET, IN_RECIPE):
            assert secret.encode() not in data, where


def test_a_run_that_lies_in_a_directory_with_a_secret_in_its_path_still_finds_it(tmp_path: Path) -> None:
    """Only what is told is masked, never what is opened."""
    folder = tmp_path / "token=abcdefgh12345678ijkl"
    folder.mkdir()
    (folder / "docs.jsonl").write_text('{"id": "1", "text": "a plain text"}\n')
    assert storage.exists(str(folder / "docs.jsonl"))
    (folder / "recipe.yaml").write_text("name: r\nstages: {a: {kind: 'tests.pipelines.toy:NumberStage', ray: false}}\n")
    assert main(["run", str(folder / "recipe.yaml"), "--runs", str(folder / "runs")]) == 0
    assert (folder / "runs" / "r" / "report.html").exists()
