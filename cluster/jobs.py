"""Running a recipe as a Ray job: the checkout is the job's working directory, its entry point `python -m pipelines run`.

Where the cluster asks for a token (Ray's default), the submitter needs the same one: `cluster.token` says where it comes from.
"""

from __future__ import annotations

import asyncio
import difflib
import ipaddress
import os
import shlex
import socket
import sys
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from cluster import remote, storage, token
from cluster.remote import PathError

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

EXCLUDES = [
    "/.git/", "/.venv/", "/.peers/", "/runs/", "/build/", "/dist/", "/benchmarks/results/",
    ".env", ".env.*", ".netrc", "*.pem",
    "__pycache__/", "*.pyc", "*.egg-info/", ".pytest_cache/", ".mypy_cache/", ".ruff_cache/", ".hypothesis/",
]  # fmt: skip
"""What of the checkout stays here, in the syntax of .gitignore; Ray leaves out what .gitignore names as well."""

_STOPPED = 130
_PREFIX = "danlu-"
_MOST_RECONNECTIONS = 30


def submit(
    recipe_path: str,
    address: str,
    *,
    working_dir: str = ".",
    arguments: Sequence[str] = (),
    wait: bool = True,
    runs: str = "runs",
) -> int:
    """Ship `working_dir` to the cluster whose job server is at `address` and run the recipe there.

    With `wait`, the job's output is written to stdout as it comes and its exit code is returned (130 when it was
    stopped); Ctrl-C leaves the job running and says how to follow and stop it. Without, returns 0 once it is accepted.

    Raises PathError for a recipe outside `working_dir` or a runs folder that the cluster cannot see, FileNotFoundError
    for a missing folder or recipe, PermissionError when the cluster refuses the token, ConnectionError when nothing
    answers at `address`.
    """
    entrypoint = command(recipe_path, address, working_dir, arguments, runs)
    client = _client(address)
    job = f"{_PREFIX}{os.path.splitext(os.path.basename(recipe_path))[0]}-{uuid.uuid4().hex[:8]}"
    client.submit_job(
        entrypoint=entrypoint,
        submission_id=job,
        runtime_env={"working_dir": os.path.abspath(working_dir), "excludes": EXCLUDES},
        metadata={"recipe": recipe_path},
    )
    print(f"submitted {job} to {address}", flush=True)
    hint = f"danlu jobs logs {job} --follow --address {shlex.quote(address)}  (to end it: danlu jobs stop)"
    if not wait:
        print(f"follow it with: {hint}", flush=True)
        return 0
    try:
        return asyncio.run(_follow(client, job))
    except KeyboardInterrupt:
        print(f"\n{job} goes on without us; follow it with: {hint}", flush=True)
        return _STOPPED


@dataclass(frozen=True)
class Job:
    """A job as the cluster tells of it. Times are seconds since 1970, 0.0 where there is none yet."""

    name: str
    status: str
    recipe: str
    began: float
    ended: float
    message: str


def listed(address: str, everything: bool = False) -> list[Job]:
    """The jobs of the cluster, the newest first: those that `submit` started, or `everything` that was submitted.

    Raises PermissionError and ConnectionError as `submit`.
    """
    found = []
    for details in _client(address).list_jobs():
        name = details.submission_id or ""
        if name and (everything or name.startswith(_PREFIX)):
            began, ended = ((moment or 0) / 1000 for moment in (details.start_time, details.end_time))
            recipe = (details.metadata or {}).get("recipe", "")
            found.append(Job(name, str(details.status), recipe, began, ended, details.message or ""))
    return sorted(found, key=lambda job: (-job.began, job.name))


def logs(address: str, job: str, follow: bool = False) -> int:
    """Write a job's output to stdout. With `follow`, until it ends: returns its exit code, 130 when it was stopped.

    Raises FileNotFoundError with the nearest names when the cluster knows no such job; else as `submit`.
    """
    client = _client(address)
    _known(client, address, job)
    if follow:
        return asyncio.run(_follow(client, job))
    sys.stdout.write(client.get_job_logs(job))
    return 0


def stop(address: str, job: str, patience_s: float = 60.0) -> str:
    """Ask a job to stop, as Ctrl-C does, and return its status once it has ended (or after `patience_s`). Raises as `logs`."""
    client = _client(address)
    _known(client, address, job)
    client.stop_job(job)
    deadline = time.monotonic() + patience_s
    while not (status := client.get_job_status(job)).is_terminal() and time.monotonic() < deadline:
        time.sleep(0.5)
    return str(status)


def _known(client: JobSubmissionClient, address: str, job: str) -> None:
    names = [details.submission_id or "" for details in client.list_jobs()]
    if job not in names:
        near = difflib.get_close_matches(job, names, 3) or sorted(name for name in names if name.startswith(_PREFIX))[-3:]
        raise FileNotFoundError(f"{address} knows no job {job!r}" + (f"; did you mean {' or '.join(near)}?" if near else ""))


def command(recipe_path: str, address: str, working_dir: str, arguments: Sequence[str], runs: str) -> str:
    """The job's entry point, each argument quoted: `python -m pipelines run RECIPE --runs RUNS ARGUMENTS...`.

    Raises as `submit` does.
    """
    root = os.path.realpath(working_dir)
    if not os.path.isfile(os.path.join(root, "pipelines", "__main__.py")):
        raise FileNotFoundError(f"{working_dir} is not a checkout of Danlu: it has no pipelines/__main__.py")
    recipe = os.path.realpath(recipe_path)
    if not os.path.isfile(recipe):
        raise FileNotFoundError(f"no such recipe: {recipe_path}")
    if os.path.commonpath([root, recipe]) != root:
        raise PathError(f"recipe {recipe_path} lies outside {working_dir}, which is all that is shipped: copy it in there")
    words = ["python", "-m", "pipelines", "run", os.path.relpath(recipe, root), "--runs", visible(runs, address), *arguments]
    return shlex.join(words)


def visible(runs: str, address: str) -> str:
    """The folder of runs as the job will name it: the job's own directory is thrown away with the job.

    A relative path is taken from here, which only a job server on this machine sees. Raises PathError for another one, and for
    credentials in a URI.
    """
    if storage.is_remote(runs):
        remote.pieces(runs)  # the command line of a job is shown to whoever may list jobs
        return runs
    if os.path.isabs(runs):
        return runs
    if not _on_this_machine(address):
        raise PathError(
            f"--runs {runs!r} is a folder of this machine: name a URI (s3://...) or an absolute path that {address} sees"
        )
    return os.path.abspath(runs)


def _on_this_machine(address: str) -> bool:
    host = urlsplit(address if "//" in address else f"//{address}").hostname or ""
    if host in ("localhost", socket.gethostname()):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _client(address: str) -> JobSubmissionClient:
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    token.use(_on_this_machine(address))
    try:
        return JobSubmissionClient(address)
    except (AuthenticationError, RuntimeError) as error:
        if isinstance(error, AuthenticationError) or "401" in str(error) or "403" in str(error):
            raise token.refusal(address) from None
        raise


async def _follow(client: JobSubmissionClient, job: str) -> int:
    """Copy the job's output to stdout until it ends; a dropped connection is taken up again where it broke off."""
    import aiohttp

    written, failures = 0, 0
    while True:
        position = 0
        try:
            async for piece in client.tail_job_logs(job):
                fresh = piece[max(0, written - position) :]
                position += len(piece)
                if fresh:
                    sys.stdout.write(fresh)
                    sys.stdout.flush()
                    written = position
        except (aiohttp.ClientError, RuntimeError) as error:  # the connection broke; the job may well go on
            failures += 1
            if failures > _MOST_RECONNECTIONS:
                raise ConnectionError(f"lost the connection to {job} {failures} times: {error}") from error
        details = client.get_job_info(job)
        if details.status.is_terminal():
            break
        await asyncio.sleep(1)
    if details.status == "STOPPED":
        return _STOPPED
    if details.driver_exit_code is not None:
        return int(details.driver_exit_code)
    if details.status == "SUCCEEDED":
        return 0
    print(f"{job} failed: {details.message}", file=sys.stderr)
    return 1
