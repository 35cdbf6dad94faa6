"""A job of ``mnemo run --nnodes`` on hosts of `netns`, and what came of it."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest

from mnemo.errors import SmpError
from mnemo.smp.client import SmpClient
from mnemo.smp.paths import RunPaths
from mnemo.transport import auth

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from netns import Host, Network

SCRIPTS: Final = Path(__file__).parents[1] / "scripts"
MNEMO: Final = (sys.executable, "-c", "from mnemo.cli import main; main()")
PATIENCE_S: Final = 120.0


def until(what: str, ready: Callable[[], object], patience_s: float = PATIENCE_S) -> None:
    """Wait until ``ready``, for what shows in nothing that could be waited on."""
    deadline = time.monotonic() + patience_s
    while not ready():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


@dataclass
class Job:
    """One training, on as many of the hosts as are started.

    Args:
        network: Its hosts.
        directory: Where the ranks write to; not in any host's memory.
        nnodes: ``--nnodes``.
        steps: How long it trains.
        settings: Environment of all agents.
        flags: More of ``mnemo run``'s.
        etcd: Where one is; else the nodes host a Store themselves.
        meet_at: Hosts of ``--rdzv-endpoint``, if not all.
    """

    network: Network
    directory: Path
    nnodes: str
    steps: int
    settings: dict[str, str] = field(default_factory=dict)
    flags: tuple[str, ...] = ()
    etcd: str = ""
    meet_at: tuple[Host, ...] = ()
    agents: dict[int, subprocess.Popen[Any]] = field(default_factory=dict)
    """By host."""

    def __post_init__(self) -> None:
        self.directory.mkdir()
        self.secret = auth.load_or_create_secret(self.directory / "secret")

    def start(self, *hosts: Host) -> None:
        """An agent on each of ``hosts``."""
        places = self.meet_at or self.network.hosts
        meeting = self.etcd or ",".join(host.address for host in places)
        backend = "etcd" if self.etcd else "c10d"
        for host in hosts:
            command = (
                *(*MNEMO, "run", f"--nnodes={self.nnodes}", f"--rdzv-backend={backend}"),
                *(f"--rdzv-endpoint={meeting}", "--rdzv-id=job", "--max-restarts=99", *self.flags),
                *(str(SCRIPTS / "nodes_train.py"), str(self.directory), str(self.steps)),
            )
            with self.log(host).open("a") as log:
                self.agents[host.number] = host.start(
                    command, self._environ(host), stdout=log, stderr=log
                )

    def _environ(self, host: Host) -> dict[str, str]:
        return {
            **os.environ,
            "MNEMO_PROTECT__RATE": "1GB/s",
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "wire",
            "MNEMO_SECRET_FILE": str(self.directory / "secret"),
            "MNEMO_NETWORK__INTERFACE": "wire",
            "MNEMO_RUN__DIR": str(host.home / "run"),
            "MNEMO_RUN__JOURNAL": str(host.home / "journal"),
            "MNEMO_SNAPSHOT__EVERY": "1",
            **self.settings,
        }

    def log(self, host: Host) -> Path:
        """What its agents and ranks said, one after another."""
        return self.directory / f"log-{host.number}"

    def said(self, *hosts: Host) -> str:
        """All of it, of ``hosts`` or all."""
        logs = [self.log(host) for host in hosts or self.network.hosts]
        return "\n".join(log.read_text() for log in logs if log.exists())

    @contextlib.contextmanager
    def explained(self) -> Iterator[None]:
        """Show what all nodes said where the block fails."""
        try:
            yield
        except BaseException:
            for host in self.network.hosts:
                print(f"--- host {host.number}\n{self.said(host)[-6000:]}")
            raise

    def steps_done(self) -> int:
        """The newest step of rank 0."""
        return max(self.losses(0), default=0)

    def reach(self, step: int) -> None:
        """Wait until it has been done."""
        until(f"step {step} is not reached", lambda: self.steps_done() >= step)

    def protected_step(self, *hosts: Host) -> int:
        """Step that all of ``hosts`` keep protected, -1 for none."""
        return min(self._protected(host) for host in hosts)

    def _protected(self, host: Host) -> int:
        paths = RunPaths.of("job", host.home / "run")
        try:
            with SmpClient.connect(paths, self.secret, PATIENCE_S) as client:
                fits = client.status()["fits"]
        except (SmpError, OSError):
            return -1
        return fits[0]["protect"]["step"] if fits and fits[0]["protect"] else -1

    def codes(self, *hosts: Host) -> list[int]:
        """Exit codes of the agents of ``hosts``, which end by themselves."""
        agents = [self.agents[host.number] for host in hosts or self.network.hosts]
        return [agent.wait(PATIENCE_S) for agent in agents]

    def losses(self, rank: int) -> dict[int, str]:
        """Every step's loss; one that was done again had the same."""
        found: dict[int, str] = {}
        with contextlib.suppress(FileNotFoundError):
            for line in (self.directory / f"losses-{rank}").read_text().splitlines():
                if match := re.fullmatch(r"(\d+) (\S+)", line):
                    step, loss = int(match[1]), match[2]
                    assert found.setdefault(step, loss) == loss, f"rank {rank}, step {step}"
        return found

    def result(self, ranks: int) -> list[tuple[str, dict[int, str]]]:
        """Of each rank, the hash of its parameters at the end, and all losses."""
        return [
            ((self.directory / f"hash-{rank}").read_text(), self.losses(rank))
            for rank in range(ranks)
        ]


@contextlib.contextmanager
def etcd(host: Host) -> Iterator[str]:
    """A real one on ``host``; where it is."""
    program = shutil.which("etcd")
    if program is None:
        pytest.skip("etcd is missing (Debian: etcd-server)")
    url = f"http://{host.address}:2379"
    flags = {
        "data-dir": host.home / "etcd",
        "listen-client-urls": url,
        "advertise-client-urls": url,
        "listen-peer-urls": "http://127.0.0.1:2380",
        "log-level": "error",
    }
    words = [program, *(f"--{name}={value}" for name, value in flags.items())]
    with (host.home / "log").open("w") as log:
        host.start(words, os.environ, stdout=log, stderr=log)
    yield f"{host.address}:2379"


def keys_in_etcd(host: Host, place: str) -> int:
    """How many there are, asked from ``host``."""
    everything = '{"key": "AA==", "range_end": "AA==", "count_only": true}'
    program = (
        "import json, sys, urllib.request\n"
        "answer = urllib.request.urlopen(sys.argv[1], sys.argv[2].encode())\n"
        "print(json.load(answer).get('count', 0))"
    )
    command = [sys.executable, "-c", program, f"http://{place}/v3/kv/range", everything]
    asks = host.start(command, os.environ, stdout=subprocess.PIPE)
    return int(asks.communicate()[0])
