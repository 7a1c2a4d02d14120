"""Units of work on a cluster of several Ray nodes, of which some are killed, frozen and added: every unit is done once."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.nodes import CONFIGURATION, Node, Nodes, wait_until
from tests.conftest import ROOT

_END_S = 150.0  # a busy machine takes its time


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    found = Nodes(tmp_path_factory.mktemp("nodes"), redis=True)
    yield found
    found.close()


@pytest.fixture(scope="module")
def steady(nodes: Nodes) -> Node:
    """A node that nothing happens to."""
    return nodes.add(cpus=2)


class Driver:
    """A driver process of its own, which is what a control process or a node is lost to."""

    def __init__(
        self, nodes: Nodes, directory: Path, how: str = "", *, units: int, workers: int = 4, seconds: float = 0.2,
        deadline_s: float = 600.0,
    ) -> None:  # fmt: skip
        self.directory = directory
        values = [str(directory), how, str(units), str(workers), str(seconds), str(deadline_s)]
        self._log = directory / "log"
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.faults.units", nodes.address, *values],
                cwd=ROOT, env={**os.environ, **CONFIGURATION}, stdout=log, stderr=subprocess.STDOUT, text=True,
            )  # fmt: skip

    def told(self) -> list[dict[str, Any]]:
        lines = self._log.read_text("utf-8").splitlines()
        return [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]

    def wait(self, what: str, holds: Callable[[list[dict[str, Any]]], bool]) -> None:
        def seen() -> bool:
            assert self._process.poll() is None, self._log.read_text("utf-8")[-3000:]
            return holds(self.told())

        wait_until(what, seen)

    def _ended(self) -> None:
        try:
            code: int | None = self._process.wait(timeout=_END_S)
        except subprocess.TimeoutExpired:
            code = None
            self._process.send_signal(signal.SIGUSR1)
            time.sleep(1.0)
            self._process.kill()
        assert code == 0, (code, self.attempts(), self._log.read_text("utf-8")[-3000:])

    def finish(self, units: int) -> list[dict[str, Any]]:
        """Every unit came back once and left its file; what was told on the way."""
        self._ended()
        told = self.told()
        assert told[-1] == {"end": "done"}, told[-3:]
        results = {line["index"]: line["result"] for line in told if "result" in line}
        assert results == {number: number * number for number in range(units)}
        assert sum("result" in line for line in told) == units
        written = {int(path.name): path.read_text() for path in (self.directory / "out").iterdir() if path.name[0] != "."}
        assert written == {number: str(number * number) for number in range(units)}
        return told

    def end(self) -> str:
        self._ended()
        return str(self.told()[-1]["end"])

    def wait_for_work_on(self, node: Node) -> None:
        """Wait until a node has begun a unit, then let go those that "gate" holds back until now."""
        self.wait("the node works", lambda told: node.id in {place for _, place in self.attempts()})
        (self.directory / "go").touch()

    def attempts(self) -> list[tuple[int, str]]:
        """(unit, node) of each attempt."""
        names = [path.name.split("-") for path in (self.directory / "attempts").glob("*")]
        return [(int(name[0]), name[1]) for name in names]


def started(told: list[dict[str, Any]]) -> bool:
    return sum("result" in line for line in told) >= 3


@pytest.mark.usefixtures("steady")
def test_a_worker_that_is_killed_costs_its_unit_one_more_attempt(nodes: Nodes, tmp_path: Path) -> None:
    driver = Driver(nodes, tmp_path, "crash once", units=6, seconds=0.05)
    again = [line for line in driver.finish(6) if line.get("event") == "unit started again"]
    assert [line["unit"] for line in again] == [1] and "worker" in again[0]["failed"][0].lower()
    assert sorted(unit for unit, _ in driver.attempts()) == [0, 1, 1, 2, 3, 4, 5]


@pytest.mark.slow
@pytest.mark.usefixtures("steady")
def test_a_unit_that_always_ends_its_worker_ends_the_stage_and_says_so(nodes: Nodes, tmp_path: Path) -> None:
    driver = Driver(nodes, tmp_path, "crash", units=1)
    assert "UnitLost" in (end := driver.end()) and "5 times" in end and "run again" in end
    assert [unit for unit, _ in driver.attempts()] == [0] * 5


@pytest.mark.slow
@pytest.mark.usefixtures("steady")
def test_an_error_of_a_unit_ends_the_stage_at_once(nodes: Nodes, tmp_path: Path) -> None:
    driver = Driver(nodes, tmp_path, "raise", units=4)
    assert "unit one is wrong" in driver.end()
    assert sum(unit == 1 for unit, _ in driver.attempts()) == 1


def test_a_node_that_is_lost_and_one_that_is_added_while_units_run(nodes: Nodes, steady: Node, tmp_path: Path) -> None:
    doomed = nodes.add(cpus=2)
    driver = Driver(nodes, tmp_path, "gate", units=40, workers=6, seconds=0.3)
    driver.wait("both nodes work", lambda told: {node for _, node in driver.attempts()} == {doomed.id, steady.id})
    doomed.kill()
    added = nodes.add(cpus=2)
    driver.wait_for_work_on(added)
    told = driver.finish(40)
    places = {node for _, node in driver.attempts()}
    assert places == {doomed.id, steady.id, added.id}
    again = {line["unit"] for line in told if line.get("event") == "unit started again"}
    twice = {unit for unit, _ in driver.attempts() if sum(other == unit for other, _ in driver.attempts()) > 1}
    assert twice <= again and 1 <= len(again) <= 4, "only what was in work on the lost node is done again"
    added.kill()


def test_a_node_that_freezes_at_the_end_delays_by_a_deadline_and_one_result_counts(
    nodes: Nodes, steady: Node, tmp_path: Path
) -> None:
    """The workers stand still, their node answers: nobody but the deadline notices."""
    slow = nodes.add(cpus=2)
    driver = Driver(nodes, tmp_path, units=12, workers=4, seconds=1.0, deadline_s=3.0)
    driver.wait("both nodes work", lambda told: {node for _, node in driver.attempts()} == {slow.id, steady.id})
    driver.wait("most is done", lambda told: sum("result" in line for line in told) >= 7)
    frozen = slow.workers()
    slow.signal(signal.SIGSTOP, frozen)
    told = driver.finish(12)
    copied = [line for line in told if line.get("event") == "unit copied"]
    assert copied and steady.id in {line["to"] for line in copied}
    slow.signal(signal.SIGCONT, frozen)
    time.sleep(1.5)  # the frozen copies end now, if they were not cancelled: nothing changes
    assert sorted(path.name for path in (tmp_path / "out").iterdir() if path.name[0] != ".") == sorted(map(str, range(12)))
    slow.kill()


@pytest.mark.slow
def test_a_node_that_freezes_whole_is_given_up(nodes: Nodes, steady: Node, tmp_path: Path) -> None:
    lost = nodes.add(cpus=2)
    driver = Driver(nodes, tmp_path, units=30, workers=4, seconds=0.3)
    driver.wait("both nodes work", lambda told: {node for _, node in driver.attempts()} == {lost.id, steady.id})
    lost.signal(signal.SIGSTOP)
    told = driver.finish(30)
    assert any(line.get("event") in ("unit started again", "unit copied") for line in told)
    lost.kill()


def test_the_control_process_is_killed_and_started_again_and_the_run_goes_on(nodes: Nodes, steady: Node, tmp_path: Path) -> None:
    """Behind Redis it knows its nodes and drivers again: even a node that comes afterwards gets units."""
    driver = Driver(nodes, tmp_path, "gate", units=40, workers=4, seconds=0.4)
    driver.wait("it has begun", started)
    nodes.kill_control_process()
    added = nodes.add(cpus=2)
    driver.wait_for_work_on(added)
    driver.finish(40)
    assert {node for _, node in driver.attempts()} == {steady.id, added.id}
    added.kill()


@pytest.fixture
def cable(tmp_path: Path) -> Iterator[tuple[str, str, str]]:
    """A host of its own (a network namespace) beside this one: its name, its end of the cable and both addresses' prefix."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and iproute2")
    name, ours, theirs = (f"{kind}{os.getpid() % 100_000}" for kind in ("danlu", "dla", "dlb"))
    prefix = f"10.{os.getpid() % 100 + 100}.{os.getpid() // 100 % 256}"
    commands = [
        f"netns add {name}", f"link add {ours} type veth peer name {theirs}", f"link set {theirs} netns {name}",
        f"addr add {prefix}.1/24 dev {ours}", f"link set {ours} up", f"-n {name} addr add {prefix}.2/24 dev {theirs}",
        f"-n {name} link set {theirs} up", f"-n {name} link set lo up",
    ]  # fmt: skip
    try:
        for command in commands:
            done = subprocess.run(["ip", *command.split()], capture_output=True, text=True, check=False)
            if done.returncode:
                pytest.skip(f"this machine makes no network namespaces: {done.stderr.strip()}")
        yield name, ours, prefix
    finally:
        subprocess.run(["ip", "link", "del", ours], check=False, capture_output=True)
        subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


@pytest.mark.slow
def test_a_host_that_is_cut_off_from_the_network_for_a_minute(cable: tuple[str, str, str], tmp_path: Path) -> None:
    """Its units are done elsewhere; when the cable is back, what it still does changes nothing."""
    name, device, prefix = cable
    nodes = Nodes(tmp_path, address=f"{prefix}.1")
    try:
        near = nodes.add(cpus=2)
        far = nodes.add(cpus=2, address=f"{prefix}.2", prefix=("ip", "netns", "exec", name))
        place = tmp_path / "units"
        place.mkdir()
        driver = Driver(nodes, place, units=120, workers=4, seconds=1.0)
        driver.wait("both hosts work", lambda told: {node for _, node in driver.attempts()} == {near.id, far.id})
        subprocess.run(["ip", "link", "set", device, "down"], check=True)
        cut = time.monotonic()
        before = sum("result" in line for line in driver.told())
        driver.wait("the other host goes on", lambda told: sum("result" in line for line in told) > before + 20)
        time.sleep(max(0.0, 60 - (time.monotonic() - cut)))
        subprocess.run(["ip", "link", "set", device, "up"], check=True)
        told = driver.finish(120)
        lost = {line["unit"] for line in told if line.get("event") in ("unit started again", "unit copied")}
        assert 1 <= len(lost) <= 4, "what was in work on the lost host was done elsewhere, and nothing else"
    finally:
        nodes.close()
