from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cluster import connect, token

ROOT = Path(__file__).resolve().parents[2]

SCRIPT = """
import os, pathlib
os.environ["RAY_ADDRESS"] = "10.255.255.1:1"
from cluster import connect
first = connect.connect(cpus=3, object_store_bytes=128 << 20)
again = connect.connect()
import ray
stores = [node["Resources"]["object_store_memory"] for node in ray.nodes()]
print(first == again, first.cpus, first.started_here, stores == [128 << 20])
import ipaddress, psutil
family = [psutil.Process(), *psutil.Process().children(recursive=True)]
open_to = {ipaddress.ip_address(c.laddr.ip) for p in family for c in p.net_connections() if c.status == "LISTEN"}
print(bool(open_to), [str(ip) for ip in open_to if not (getattr(ip, "ipv4_mapped", None) or ip).is_loopback])
own = pathlib.Path.home() / ".ray" / "auth_token"
from ray._private.authentication.authentication_utils import is_token_auth_enabled
print(is_token_auth_enabled(), oct(own.stat().st_mode & 0o777), len(own.read_text()))
import subprocess, sys
stranger = "from cluster import token; print(token.accepted(%r))" % first.address
others = [{}, {"RAY_AUTH_TOKEN": "e" * 64}, {"RAY_AUTH_MODE": "disabled"}]
asked = [subprocess.run([sys.executable, "-c", stranger], env={**os.environ, **other}, capture_output=True) for other in others]
print([told.stdout.decode().strip() for told in asked])
connect.disconnect()
connect.disconnect()
print(ray.is_initialized())
"""


@pytest.mark.usefixtures("ray_cluster")
def test_a_ray_that_was_there_before_is_used_and_stays() -> None:
    import ray

    found = connect.connect()
    assert (found.cpus, found.started_here) == (4.0, False)
    assert found.address == ray.get_runtime_context().gcs_address
    connect.disconnect()
    assert ray.is_initialized()


def test_a_local_ray_is_started_once_asks_for_a_token_and_is_ended_whatever_the_environment_names(tmp_path: Path) -> None:
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("d" * 64)  # as Ray writes it: whoever sees the folder may read it
    hidden = ("RAY_AUTH_MODE", *token.VARIABLES)
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    environment |= {"HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    told = ["True 3.0 True True", "True []", "True 0o600 64", "['True', 'False', 'False']", "False"]
    assert done.stdout.splitlines() == told, done.stderr


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home without a token, in an environment that names none."""
    for name in ("RAY_AUTH_MODE", *token.VARIABLES):
        monkeypatch.setenv(name, "")  # so that what the test sets is undone
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_a_token_is_made_once_for_this_user_alone(home: Path) -> None:
    path = home / ".ray" / "auth_token"
    token.keep_private()
    first = path.read_text()
    path.chmod(0o644)
    token.keep_private()
    assert path.read_text() == first and len(first) == 64 and path.stat().st_mode & 0o777 == 0o600
    assert [file.name for file in path.parent.iterdir()] == ["auth_token"] and "RAY_AUTH_TOKEN" not in os.environ


def test_a_home_that_cannot_be_written_gets_a_token_in_memory(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / ".ray").write_text("no folder")
    token.keep_private()
    assert len(os.environ["RAY_AUTH_TOKEN"]) == 64


@pytest.mark.parametrize("variable", [("RAY_AUTH_MODE", "disabled"), ("RAY_AUTH_TOKEN", "x"), ("RAY_AUTH_TOKEN_PATH", "/x")])
def test_what_the_environment_says_of_tokens_is_left_alone(
    variable: tuple[str, str], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(*variable)
    token.keep_private()
    assert not (home / ".ray").exists() and os.environ.get("RAY_AUTH_TOKEN") in (None, "x")


def test_a_refusal_names_the_variable_and_no_token(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "neither RAY_AUTH_TOKEN_PATH nor RAY_AUTH_TOKEN is set" in str(token.refusal("http://head:8265"))
    monkeypatch.setenv("RAY_AUTH_TOKEN", "d" * 64)
    told = str(token.refusal("http://head:8265"))
    assert "RAY_AUTH_TOKEN names is another" in told and "dddd" not in told and len(told.splitlines()) == 1
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert "RAY_AUTH_MODE=disabled sends none" in str(token.refusal("http://head:8265"))


def test_no_ray_at_an_address_is_a_connection_error() -> None:
    script = (
        "from cluster import connect\ntry:\n    connect.connect('127.0.0.1:1')\nexcept ConnectionError as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert "no Ray answers at '127.0.0.1:1'" in done.stdout, done.stderr
