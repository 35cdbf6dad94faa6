"""Agents in processes of their own agree through Stores of torch's."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from ports import held_port

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SCRIPT = Path(__file__).parent.parent / "scripts" / "membership_agent.py"


class Agents:
    """Processes, and what they have said."""

    def __init__(self) -> None:
        self._ports = contextlib.ExitStack()
        self.first = f"127.0.0.1:{self._port()}"
        self.processes: dict[str, subprocess.Popen[str]] = {}
        self.said: dict[str, list[dict[str, Any]]] = {}
        self._news = threading.Condition()
        self._readers: list[threading.Thread] = []
        self._all: list[subprocess.Popen[str]] = []

    def _port(self) -> int:
        return self._ports.enter_context(held_port())

    def start(self, name: str, nodes: int) -> None:
        port = self.first.rpartition(":")[2] if name == "a" else str(self._port())
        command = [sys.executable, str(SCRIPT), name, port, str(nodes), self.first]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self.processes[name] = process
        self._all.append(process)
        self.said[name] = []
        reader = threading.Thread(target=self._read, args=(name, process))
        reader.start()
        self._readers.append(reader)
        self.wait(lambda: bool(self.said[name]))

    def _read(self, name: str, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            with self._news:
                self.said[name].append(json.loads(line))
                self._news.notify_all()

    def wait(self, condition: Callable[[], bool], seconds: float = 60) -> None:
        with self._news:
            assert self._news.wait_for(condition, seconds), self.said

    def running(self) -> dict[str, dict[str, Any]]:
        """What each that runs was told."""
        last = {name: said[-1] for name, said in self.said.items() if said}
        return {
            name: said
            for name, said in last.items()
            if said["event"] == "start" and self.processes[name].poll() is None
        }

    def run(self, *names: str) -> bool:
        """Whether exactly these run, in one epoch."""
        running = self.running()
        return set(running) == set(names) and len({r["epoch"] for r in running.values()}) == 1

    def lose(self, name: str) -> float:
        """Kill it and all its processes; when that was."""
        self.processes[name].send_signal(signal.SIGKILL)
        self.processes[name].wait()
        return time.monotonic()

    def close(self) -> None:
        for process in self._all:
            process.kill()
            process.wait()
        for reader in self._readers:
            reader.join()
        for process in self._all:
            assert process.stdout is not None
            process.stdout.close()
        self._ports.close()


@pytest.fixture
def agents() -> Iterator[Agents]:
    made = Agents()
    yield made
    made.close()


@pytest.mark.campaign
def test_four_nodes_agree_and_replace_one_and_then_the_host(agents: Agents) -> None:
    for name in "abcde":
        agents.start(name, nodes=4)
    agents.wait(lambda: agents.run(*"abcd"))
    assert {name: told["rank"] for name, told in agents.running().items()} == {
        name: rank for rank, name in enumerate("abcd")
    }
    lost = agents.lose("c")
    agents.wait(lambda: agents.run(*"abde"))
    first = agents.running()["e"]
    assert first["rank"] == 2
    print(f"a node: {first['at'] - lost:.2f} s")
    assert first["at"] - lost < 8

    lost = agents.lose("a")
    agents.start("a", nodes=4)  # whose Store is empty, and whose place is known to all
    agents.wait(lambda: agents.run(*"abde"))
    second = agents.running()["a"]
    assert second["members"] == list("abed")
    print(f"the host: {second['at'] - lost:.2f} s")
    assert second["epoch"] == first["epoch"] + 1
