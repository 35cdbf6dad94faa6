"""Nodes on one machine that share nothing but a wire: a network namespace each.

They hang on one switch, a bridge in a namespace of its own, so that the machine's own network is
not touched. What is lost is killed; what is cut is cut at the switch (silently, as a dead switch
port does), at the node's own link (loudly), or from one node to another only; what is slow is so
in a process between the node's link and the switch (`slow_link`).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

SUBNET: Final = "10.77.0"
_NOBODY: Final = "02:00:00:00:00:01"
_PATIENCE_S: Final = 10.0
_SLOW_LINK: Final = Path(__file__).parent / "slow_link.py"


def _ip(*words: str) -> str:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"ip {' '.join(words)}: {done.stderr.strip()}"
    return done.stdout


def missing() -> str:
    """Why there can be no namespaces here; empty if there can."""
    if shutil.which("ip") is None:
        return "ip (iproute2) is missing"
    if os.geteuid() != 0:
        return "only root may make network namespaces"
    name = f"mnemo-{uuid.uuid4().hex[:6]}"
    if subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False).returncode:
        return "the kernel refuses network namespaces"
    _ip("netns", "delete", name)
    return ""


@dataclass
class Host:
    """One node: its namespace, its address, its directory."""

    number: int
    namespace: str
    home: Path
    network: Network
    started: list[subprocess.Popen[Any]] = field(default_factory=list)
    slowed_by: subprocess.Popen[Any] | None = None

    @property
    def address(self) -> str:
        return f"{SUBNET}.{10 + self.number}"

    @property
    def _port(self) -> str:
        """The far end of its wire."""
        return f"port{self.number}"

    @property
    def _plug(self) -> str:
        """What hangs on the switch for it."""
        return f"slow{self.number}" if self.slowed_by else self._port

    def start(
        self, command: Sequence[str], environ: Mapping[str, str], **options: Any
    ) -> subprocess.Popen[Any]:
        """A process of this node, in a session of its own."""
        process = subprocess.Popen(
            ["ip", "netns", "exec", self.namespace, *command],
            env=dict(environ),
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            **options,
        )
        self.started.append(process)
        return process

    def pids(self) -> list[int]:
        """All that run in it now."""
        return [int(pid) for pid in _ip("netns", "pids", self.namespace).split()]

    def lose(self) -> None:
        """The node is gone: every process killed, its directory removed. A new one may follow."""
        deadline = time.monotonic() + _PATIENCE_S
        while pids := self.pids():
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            assert time.monotonic() < deadline, f"{pids} cannot be killed"
            time.sleep(0.01)
        for process in self.started:
            process.wait()
        self.started.clear()
        shutil.rmtree(self.home, ignore_errors=True)
        self.home.mkdir(mode=0o700)

    def add_dead_end(self, name: str) -> None:
        """An interface that leads to no other node: its address is 10.66.0.1."""
        _ip("-n", self.namespace, "link", "add", name, "type", "veth", "peer", "name", f"{name}2")
        _ip("-n", self.namespace, "addr", "add", "10.66.0.1/24", "dev", name)
        for end in (name, f"{name}2"):
            _ip("-n", self.namespace, "link", "set", end, "up")

    def cut(self) -> None:
        """Nothing leaves or reaches it any more, and nobody is told."""
        _ip("-n", self.network.switch, "link", "set", self._plug, "nomaster")

    def pull(self) -> None:
        """Its own link goes down, which its own processes are told."""
        _ip("-n", self.namespace, "link", "set", "wire", "down")

    def mend(self) -> None:
        """Undo `cut`, `pull` and `deafen`."""
        _ip("-n", self.network.switch, "link", "set", self._plug, "master", "switch")
        _ip("-n", self.namespace, "link", "set", "wire", "up")
        _ip("-n", self.namespace, "neigh", "flush", "dev", "wire")
        for other in self.network.hosts:
            if other is not self:
                with contextlib.suppress(AssertionError):
                    _ip("-n", self.namespace, "neigh", "del", other.address, "dev", "wire")

    def slow(self, delay_s: float, rate: float = float("inf")) -> None:
        """Its link is slow from now on, or as fast as it can be again.

        Args:
            delay_s: By how much later everything arrives, each way, in seconds.
            rate: Bytes per second, each way.
        """
        if self.slowed_by is None:
            self._interpose()
        link = self.slowed_by
        assert link is not None
        assert link.stdin is not None
        assert link.stdout is not None
        link.stdin.write(f"{delay_s} {rate}\n".encode())
        link.stdin.flush()
        assert link.stdout.readline()

    def _interpose(self) -> None:
        """Take its wire off the switch, and have a process between the two."""
        switch, far, slow = self.network.switch, f"far{self.number}", f"slow{self.number}"
        _ip("-n", switch, "link", "add", slow, "type", "veth", "peer", "name", far)
        _ip("-n", switch, "link", "set", far, "up")
        _ip("-n", switch, "link", "set", self._port, "nomaster")
        _ip("-n", switch, "link", "set", slow, "master", "switch", "up")
        self.slowed_by = subprocess.Popen(
            ["ip", "netns", "exec", switch, sys.executable, str(_SLOW_LINK), self._port, far],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def end_slowness(self) -> None:
        """Have the process end that makes its link slow, at the end of all."""
        if self.slowed_by is not None:
            self.slowed_by.communicate()

    def mute_to(self, other: Host) -> None:
        """What this one sends to ``other`` is lost; the other direction works."""
        words = ("replace", other.address, "lladdr", _NOBODY, "nud", "permanent", "dev", "wire")
        _ip("-n", self.namespace, "neigh", *words)


@dataclass
class Network:
    """Nodes on one switch."""

    switch: str
    hosts: list[Host]

    def split(self, *sides: Sequence[Host]) -> None:
        """Hosts of different sides do not reach each other; silently."""
        for number, side in enumerate(sides):
            bridge = "switch" if number == 0 else f"side{number}"
            if number:
                with contextlib.suppress(AssertionError):
                    _ip("-n", self.switch, "link", "add", bridge, "type", "bridge")
                _ip("-n", self.switch, "link", "set", bridge, "up")
            for host in side:
                _ip("-n", self.switch, "link", "set", host._plug, "master", bridge)

    def join(self) -> None:
        """Undo `split`."""
        for host in self.hosts:
            host.mend()


@contextlib.contextmanager
def network(directory: Path, hosts: int) -> Iterator[Network]:
    """So many nodes; all that they run ends with the block, and their namespaces are removed."""
    if why := missing():
        pytest.skip(why)
    tag = f"mnemo-{uuid.uuid4().hex[:6]}"
    switch = f"{tag}-switch"
    made: list[str] = []
    found = Network(switch, [])

    def add(name: str) -> None:
        _ip("netns", "add", name)
        made.append(name)
        _ip("-n", name, "link", "set", "lo", "up")

    try:
        add(switch)
        _ip("-n", switch, "link", "add", "switch", "type", "bridge")
        _ip("-n", switch, "link", "set", "switch", "up")
        for number in range(hosts):
            name = f"{tag}-{number}"
            add(name)
            home = directory / f"host-{number}"
            home.mkdir(mode=0o700)
            host = Host(number, name, home, found)
            found.hosts.append(host)
            words = ("link", "add", "wire", "type", "veth", "peer", "name", host._port)
            _ip("-n", name, *words, "netns", switch)
            _ip("-n", name, "addr", "add", f"{host.address}/24", "dev", "wire")
            _ip("-n", name, "link", "set", "wire", "up")
            _ip("-n", switch, "link", "set", host._port, "master", "switch", "up")
        yield found
    finally:
        for host in found.hosts:
            host.lose()
            host.end_slowness()
        for name in made:
            _ip("netns", "delete", name)


def names() -> Iterator[str]:
    """Of all namespaces of this lab that there are on the machine, other tests' too."""
    for line in _ip("netns", "list").splitlines():
        if line.startswith("mnemo-"):
            yield line.split()[0]
