from __future__ import annotations

import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from cluster.jobs import command, submit, visible

ROOT = Path(__file__).resolve().parents[2]


def checkout(path: Path) -> Path:
    (path / "pipelines").mkdir(parents=True)
    (path / "pipelines" / "__main__.py").write_text("")
    (path / "recipes").mkdir()
    (path / "recipes" / "my recipe; rm x.yaml").write_text("name: x")
    return path


def test_the_entry_point_is_quoted_and_names_the_recipe_inside_the_checkout(tmp_path: Path) -> None:
    root = checkout(tmp_path / "co")
    recipe = str(root / "recipes" / "my recipe; rm x.yaml")
    line = command(recipe, "http://head:8265", str(root), ["--workers", "4"], "s3://bucket/runs a")
    words = ["recipes/my recipe; rm x.yaml", "--runs", "s3://bucket/runs a", "--workers", "4"]
    assert shlex.split(line) == ["python", "-m", "pipelines", "run", *words]


def test_what_the_cluster_could_not_see_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = checkout(tmp_path / "co")
    outside = tmp_path / "outside.yaml"
    outside.write_text("name: x")
    with pytest.raises(ValueError, match="outside"):
        command(str(outside), "http://h:1", str(root), [], "s3://b")
    with pytest.raises(FileNotFoundError, match="no such recipe"):
        command(str(root / "recipes" / "none.yaml"), "http://h:1", str(root), [], "s3://b")
    with pytest.raises(FileNotFoundError, match="not a checkout"):
        command(str(outside), "http://h:1", str(tmp_path), [], "s3://b")
    with pytest.raises(ValueError, match="absolute path"):
        visible("runs", "https://head.example:8265")
    monkeypatch.chdir(tmp_path)
    assert visible("runs", "http://127.0.0.1:8265") == str(tmp_path / "runs")
    assert visible("runs", "http://localhost:8265") == visible("runs", "[::1]:8265") == str(tmp_path / "runs")
    assert visible("/mnt/runs", "http://head:8265") == "/mnt/runs"


def test_no_job_server_is_a_connection_error(tmp_path: Path) -> None:
    root = checkout(tmp_path / "co")
    with pytest.raises(ConnectionError):
        submit(str(root / "recipes" / "my recipe; rm x.yaml"), "http://127.0.0.1:1", working_dir=str(root))


def _free_ports(count: int) -> list[str]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [str(each.getsockname()[1]) for each in sockets]


_GCS: dict[str, str] = {}  # ports that drivers join at, by the URL of the job server


def _start_head(temporary: Path, token: str) -> tuple[subprocess.Popen[bytes], str] | None:
    """(the head's process, the URL of its job server) once both are up; None when Ray gave up on a busy machine."""
    gcs, dashboard, agent, agent_grpc, metrics, client = _free_ports(6)
    words = [
        sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--node-ip-address", "127.0.0.1", "--port", gcs,
        "--dashboard-host", "127.0.0.1", "--dashboard-port", dashboard, "--dashboard-agent-listen-port", agent,
        "--dashboard-agent-grpc-port", agent_grpc, "--metrics-export-port", metrics, "--ray-client-server-port", client,
        "--include-dashboard", "true", "--num-cpus", "4", "--object-store-memory", str(200 << 20), "--temp-dir", str(temporary),
    ]  # fmt: skip
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    log = temporary / "head.log"
    with open(log, "w") as stream:
        head = subprocess.Popen(words, stdout=stream, stderr=subprocess.STDOUT, env=environment, start_new_session=True)
    url = f"http://127.0.0.1:{dashboard}"
    _GCS[url] = gcs
    request = urllib.request.Request(f"{url}/api/version", headers={"Authorization": f"Bearer {token}"})
    for _ in range(180):
        if head.poll() is not None:
            if "timed out during startup" in log.read_text():
                return None
            pytest.fail(f"the head ended: {log.read_text()}")
        try:
            urllib.request.urlopen(request, timeout=2).close()
            if "Ray runtime started" in log.read_text():
                return head, url
        except OSError:
            pass
        time.sleep(1)
    head.terminate()
    head.wait(60)
    pytest.fail(f"the job server did not answer: {log.read_text()}")


@pytest.fixture(scope="module")
def job_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Ray head of this test's own, with a token, on free loopback ports; ended by its process id."""
    temporary = Path(tempfile.mkdtemp(prefix="rj", dir="/tmp"))  # Ray's sockets need a short path
    token = tmp_path_factory.mktemp("token") / "token"
    token.write_text("d" * 64)
    patch = pytest.MonkeyPatch()
    patch.setenv("RAY_AUTH_MODE", "token")
    patch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    started = None
    for _ in range(3):  # Ray allows its own servers 30 seconds, which a busy machine exceeds
        started = started or _start_head(temporary, token.read_text())
    assert started is not None, (temporary / "head.log").read_text()
    head, url = started
    try:
        yield url
        assert head.poll() is None, "the head ended by itself: " + (temporary / "head.log").read_text()
    finally:
        head.terminate()
        head.wait(60)
        patch.undo()
        shutil.rmtree(temporary, ignore_errors=True)


RECIPE = """
name: tiny
seed: 1
stages:
  docs: {kind: corpus, read: {format: jsonl, path: PATH}, operators: []}
"""


@pytest.mark.slow
def test_a_recipe_runs_as_a_ray_job_and_its_exit_code_comes_back(job_server: str, tmp_path: Path) -> None:
    documents = tmp_path / "docs.jsonl"
    documents.write_text('{"id": "1", "text": "丹炉"}\n{"id": "2", "text": "a furnace"}\n')
    work = tmp_path / "work"
    for room in ("cluster", "operators", "pipelines", "train"):
        shutil.copytree(ROOT / room, work / room, ignore=shutil.ignore_patterns("__pycache__"))
    (work / "tiny.yaml").write_text(RECIPE.replace("PATH", str(documents)))
    (work / "bad.yaml").write_text(RECIPE.replace("PATH", str(tmp_path / "none.jsonl")))

    def submitted(recipe: str) -> subprocess.CompletedProcess[str]:
        words = ["submit", recipe, "--address", job_server, "--working-dir", ".", "--runs", str(tmp_path / "runs")]
        return subprocess.run(
            [sys.executable, "-m", "pipelines", *words], cwd=work, capture_output=True, text=True, timeout=300, check=False
        )

    done = submitted("tiny.yaml")
    assert done.returncode == 0, done.stdout + done.stderr
    assert list((tmp_path / "runs" / "tiny" / "docs").glob("*/manifest.json"))
    assert "submitted danlu-tiny-" in done.stdout
    assert "docs" in done.stdout
    failed = submitted("bad.yaml")
    assert failed.returncode == 2
    assert "submitted danlu-bad-" in failed.stdout
    assert "none.jsonl" in failed.stdout

    def danlu(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "pipelines", *words, "--address", job_server]
        return subprocess.run(command, cwd=work, capture_output=True, text=True, timeout=300, check=False)

    listed = [json.loads(line) for line in danlu("jobs", "--json").stdout.splitlines()]
    assert [(job["status"], job["recipe"]) for job in listed] == [("FAILED", "bad.yaml"), ("SUCCEEDED", "tiny.yaml")]
    assert "none.jsonl" in danlu("jobs", "logs", listed[0]["name"]).stdout
    assert danlu("jobs", "logs", listed[0]["name"], "--follow").returncode == 2
    wrong = danlu("jobs", "logs", listed[1]["name"] + "x")
    assert (wrong.returncode, listed[1]["name"] in wrong.stderr) == (2, True)

    line = json.dumps({"text": "a furnace of many words " * 40})
    (tmp_path / "long.jsonl").write_text(f"{line}\n" * 100_000)
    operators = "[gopher_repetition, gopher_quality, fix_text]"
    (work / "long.yaml").write_text(RECIPE.replace("PATH", str(tmp_path / "long.jsonl")).replace("[]", operators))
    words = ["submit", "long.yaml", "--working-dir", ".", "--runs", str(tmp_path / "runs"), "--no-wait"]
    assert danlu(*words).returncode == 0
    newest = json.loads(danlu("jobs", "--json").stdout.splitlines()[0])
    assert newest["status"] in ("PENDING", "RUNNING")
    assert danlu("jobs", "stop", newest["name"]).stdout.split() == [newest["name"], "STOPPED"]
    assert danlu("jobs", "logs", newest["name"], "--follow").returncode == 130


def without_token(home: Path) -> dict[str, str]:
    """The environment of somebody who has no token."""
    hidden = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
    kept = {name: value for name, value in os.environ.items() if name not in hidden}
    return kept | {"HOME": str(home), "PYTHONPATH": str(ROOT)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("given", "code", "told"),
    [
        ({"RAY_AUTH_TOKEN": "d" * 64}, 0, ""),  # the mode need not be set besides
        ({"RAY_AUTH_TOKEN": "e" * 64}, 2, "the one that RAY_AUTH_TOKEN names is another one"),
        ({"RAY_AUTH_MODE": "token"}, 2, "neither RAY_AUTH_TOKEN_PATH nor RAY_AUTH_TOKEN is set"),
        ({"RAY_AUTH_MODE": "disabled"}, 2, "RAY_AUTH_MODE=disabled sends none"),
    ],
)
def test_every_command_uses_the_token_or_says_in_one_line_what_to_set(
    given: dict[str, str], code: int, told: str, job_server: str, tmp_path: Path
) -> None:
    commands = [["jobs"], ["jobs", "logs", "danlu-none"], ["jobs", "stop", "danlu-none"]]
    if code:
        commands.append(["submit", "examples/quickstart.yaml", "--runs", str(tmp_path / "runs")])
    for words in commands:
        done = subprocess.run(
            [sys.executable, "-m", "pipelines", *words, "--address", job_server],
            cwd=ROOT, env=without_token(tmp_path) | given, capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        said = done.stdout + done.stderr
        if code:
            assert done.returncode == 2 and told in done.stderr and done.stderr.count("error:") == 1, said
        else:
            assert done.returncode == (0 if words == ["jobs"] else 2) and "token" not in done.stderr, said
        assert "Traceback" not in said and "d" * 64 not in said and "e" * 64 not in said, said


@pytest.mark.slow
def test_a_run_joins_a_cluster_with_its_token_alone_which_no_job_and_no_file_holds(job_server: str, tmp_path: Path) -> None:
    from ray.job_submission import JobSubmissionClient

    (tmp_path / "docs.jsonl").write_text('{"id": "1", "text": "a furnace"}\n')
    (tmp_path / "tiny.yaml").write_text(RECIPE.replace("PATH", str(tmp_path / "docs.jsonl")))
    for token, code in (("e" * 64, 2), ("d" * 64, 0)):
        done = subprocess.run(
            [sys.executable, "-m", "pipelines", "run", "tiny.yaml", "--address", f"127.0.0.1:{_GCS[job_server]}"],
            cwd=tmp_path, env={**without_token(tmp_path), "RAY_AUTH_TOKEN": token}, capture_output=True, text=True, timeout=300,
            check=False,
        )  # fmt: skip
        said = done.stdout + done.stderr
        assert done.returncode == code and ("asks for its token" in said) == bool(code), said
        assert token not in said and "Traceback" not in said, said
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or b"d" * 64 not in path.read_bytes(), path
    assert "d" * 64 not in str([details.dict() for details in JobSubmissionClient(job_server).list_jobs()])
