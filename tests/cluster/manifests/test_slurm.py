"""The Slurm script: its syntax, and what it does where `srun`, `scontrol`, `ray` and `python` write down how they were called."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from cluster.manifests.overrides import with_overrides
from cluster.manifests.settings import ManifestError
from cluster.manifests.slurm import slurm

# Slurm's part: srun runs the command once a node, with the node's number, and passes a SIGTERM on.
SRUN = r"""#!/bin/bash
echo "srun $*" >> "$LOG"
while [ "$1" != bash ]; do shift; done
pids=()
for ((n = 0; n < SLURM_JOB_NUM_NODES; n++)); do SLURM_NODEID=$n "$@" & pids+=($!); done
trap 'kill -TERM "${pids[@]}" 2> /dev/null; wait; exit 143' TERM
wait
"""
SCONTROL = r"""#!/bin/bash
echo "scontrol $*" >> "$LOG"
if [ "$1" = show ]; then printf 'localhost\nother\n' | head -n "$SLURM_JOB_NUM_NODES"; fi
"""
# Ray's part: listens on the head's port until it is ended.
RAY = r"""#!/bin/bash
echo "ray $* token=${#RAY_AUTH_TOKEN}" >> "$LOG"
if [[ "$*" = *--head* ]]; then
    exec "$REAL_PYTHON" -c "import socket; s = socket.create_server(('127.0.0.1', $PORT)); [s.accept() for _ in iter(int, 1)]"
fi
exec sleep 60
"""
PYTHON = r"""#!/bin/bash
case "$*" in
    -c*) exec "$REAL_PYTHON" "$@" ;;
    "-m cluster.ready"*) echo "python $*" >> "$LOG"; 
        for _ in $(seq 60); do [ "$(grep -c '^ray start' "$LOG")" -ge 2 ] && break; sleep 0.1; done
        exit "${READY:-0}" ;;
    *)
        echo "python $*" >> "$LOG"
        trap 'echo stopped >> "$LOG"; sleep 0.2; exit 130' TERM
        for _ in $(seq "${DRIVER_TENTHS:-1}"); do sleep 0.1; done
        exit "${DRIVER:-0}"
        ;;
esac
"""


@dataclass
class Node:
    """A folder with the script and stand-ins for the commands that it calls."""

    folder: Path
    script: Path

    def start(self, **environment: str) -> subprocess.Popen[str]:
        job = str(1000 + os.getpid() % 30000)
        variables = {
            "SLURM_JOB_ID": job, "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_NUM_NODES": "2", "SLURM_CPUS_ON_NODE": "16",
            "SLURM_SUBMIT_DIR": str(self.folder), "LOG": str(self.folder / "log"), "REAL_PYTHON": sys.executable,
            "PATH": f"{self.folder / 'bin'}:/usr/bin:/bin", **environment,
        }  # fmt: skip
        return subprocess.Popen(
            ["bash", str(self.script)], env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def log(self) -> list[str]:
        path = self.folder / "log"
        return path.read_text("utf-8").splitlines() if path.exists() else []

    def wait_for(self, beginning: str) -> None:
        deadline = time.monotonic() + 20
        while not any(line.startswith(beginning) for line in self.log()):
            assert time.monotonic() < deadline, self.log()
            time.sleep(0.05)


@pytest.fixture
def node(tmp_path: Path) -> Node:
    (tmp_path / "bin").mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("ray", RAY), ("python", PYTHON)):
        path = tmp_path / "bin" / name
        path.write_text(text)
        path.chmod(0o755)
    getent = tmp_path / "bin" / "getent"
    getent.write_text("#!/bin/bash\n")  # no address that others reach
    getent.chmod(0o755)
    ip = tmp_path / "bin" / "ip"
    ip.write_text("#!/bin/bash\necho '1: ib0    inet 127.0.0.1/8 scope host lo'\n")
    ip.chmod(0o755)
    script = tmp_path / "job.sbatch"
    script.write_text(
        slurm(with_overrides(["slurm.nodes=2", "slurm.interface=ib0", "slurm.requeues=3"]), "my recipe.yaml", "s3://b/r")
    )
    return Node(tmp_path, script)


def test_the_header_asks_for_what_was_set_and_nothing_breaks_out_of_it() -> None:
    assignments = [
        "name=corpus", "slurm.nodes=4", "slurm.gpus_per_node=8", "slurm.partition=gpu", "slurm.memory_per_node=400G",
        "slurm.time=2-12:00:00",
    ]  # fmt: skip
    text = slurm(with_overrides(assignments), "r.yaml", "/mnt/runs")
    header = [line.removeprefix("#SBATCH --") for line in text.splitlines() if line.startswith("#SBATCH")]
    assert header == [
        "job-name=corpus", "nodes=4", "ntasks-per-node=1", "exclusive", "gpus-per-node=8", "mem=400G", "time=2-12:00:00",
        "partition=gpu", "output=danlu-%j.log", "open-mode=append", "requeue", "signal=B:USR1@300",
    ]  # fmt: skip
    with pytest.raises(ManifestError, match="partition"):
        slurm(with_overrides(["slurm.partition=a\n#SBATCH --uid=0"]), "r.yaml", "/mnt/runs")


def test_the_script_is_sound_shell(tmp_path: Path) -> None:
    settings = with_overrides(["slurm.environment=[module load cuda]", "env.GREETING=it's here", "slurm.srun=[--label]"])
    script = tmp_path / "job.sbatch"
    script.write_text(slurm(settings, "a 'quoted' recipe.yaml", "/mnt/my runs"))
    assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0
    linter = Path(sys.executable).parent / "shellcheck"
    found = str(linter) if linter.exists() else shutil.which("shellcheck")
    if found is not None:
        done = subprocess.run([found, "--exclude=SC2050", str(script)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout


def test_every_node_runs_ray_the_first_one_the_run_and_all_of_it_ends(node: Node) -> None:
    done = node.start()
    output, _ = done.communicate(timeout=60)
    log = node.log()
    assert done.returncode == 0, output
    assert any(line.startswith("srun --nodes=2 --ntasks=2 --ntasks-per-node=1") for line in log)
    heads = [line for line in log if line.startswith("ray start --head --node-ip-address=127.0.0.1")]
    others = [line for line in log if line.startswith("ray start --address=127.0.0.1:")]
    assert len(heads) == len(others) == 1
    assert all("--num-cpus=16 --num-gpus=0" in line and line.endswith("token=64") for line in (*heads, *others))
    (run,) = (line for line in log if line.startswith("python -m pipelines"))
    assert run.startswith("python -m pipelines run my recipe.yaml --runs s3://b/r --address 127.0.0.1:") and run.endswith(
        "--workers 32"
    )
    assert not any(line.startswith("scontrol requeue") for line in log)


@pytest.mark.parametrize("code", ["1", "2"])
def test_the_exit_code_is_the_runs_own(node: Node, code: str) -> None:
    done = node.start(DRIVER=code)
    output, _ = done.communicate(timeout=60)
    assert done.returncode == int(code), output
    assert not any(line.startswith("scontrol requeue") for line in node.log())


def test_nodes_that_do_not_join_end_the_job_before_the_run(node: Node) -> None:
    done = node.start(READY="1")
    done.communicate(timeout=60)
    assert done.returncode == 1 and not any(line.startswith("python -m pipelines") for line in node.log())


@pytest.mark.parametrize(("restarts", "requeued"), [("2", True), ("3", False)])
def test_before_the_time_limit_the_run_stops_at_a_commit_and_the_job_is_queued_again(
    node: Node, restarts: str, requeued: bool
) -> None:
    done = node.start(DRIVER_TENTHS="300", SLURM_RESTART_COUNT=restarts)
    node.wait_for("python -m pipelines")
    time.sleep(0.3)  # the stand-in has set its trap
    done.send_signal(signal.SIGUSR1)
    output, _ = done.communicate(timeout=60)
    assert done.returncode == 130, output
    assert "stopped" in node.log()
    assert any(line.startswith("scontrol requeue") for line in node.log()) == requeued


def test_a_job_that_is_cancelled_stops_its_run_and_is_not_queued_again(node: Node) -> None:
    done = node.start(DRIVER_TENTHS="300")
    node.wait_for("python -m pipelines")
    time.sleep(0.3)
    done.send_signal(signal.SIGTERM)
    done.communicate(timeout=60)
    assert done.returncode == 130 and "stopped" in node.log()
    assert not any(line.startswith("scontrol requeue") for line in node.log())


def test_a_warning_that_comes_while_ray_starts_is_not_forgotten(node: Node) -> None:
    done = node.start(DRIVER_TENTHS="300")
    node.wait_for("python -m cluster.ready")
    done.send_signal(signal.SIGUSR1)
    done.communicate(timeout=60)
    assert done.returncode != 0
    assert any(line.startswith("scontrol requeue") for line in node.log())


def test_a_head_without_an_address_that_others_reach_is_told(node: Node) -> None:
    node.script.write_text(slurm(with_overrides(["slurm.nodes=2"]), "r.yaml", "s3://b/r"))
    done = node.start()
    output, _ = done.communicate(timeout=60)
    assert done.returncode == 2 and "set slurm.interface" in output
