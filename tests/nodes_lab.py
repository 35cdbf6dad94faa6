"""Several nodes on one machine: each a directory of runs, a snapshot process, and its ranks.

They are told apart as real ones are, by what they share; losing one kills every process that it
has and removes its directory, so that its memory is really gone.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import smp_lab
from ports import held_port

from mnemo.errors import SmpError
from mnemo.smp.client import SmpClient
from mnemo.smp.paths import RunPaths
from mnemo.transport import auth

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from warm import Life, Zygote

SCRIPTS = Path(__file__).parent / "scripts"
RUN = "cluster"
PATIENCE_S = 180.0


def until(what: str, ready: Callable[[], object]) -> None:
    """Wait until ``ready``, for what shows in nothing that could be waited on."""
    deadline = time.monotonic() + PATIENCE_S
    while not ready():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


@dataclass
class Cluster:
    """A training of ``nodes`` nodes with ``ranks`` ranks each, life after life."""

    zygote: Zygote
    directory: Path
    nodes: int
    ranks: int
    steps: int
    settings: dict[str, str]
    """Environment of all ranks."""
    script: str = "nodes_train.py"
    own: dict[int, dict[str, str]] = field(default_factory=dict)
    ranks_own: dict[int, dict[str, str]] = field(default_factory=dict)
    """What single nodes have besides."""
    lives: int = 0
    said: list[str] = field(default_factory=list)
    """What the ranks wrote to standard error, by life."""

    def __post_init__(self) -> None:
        self.directory.mkdir()
        self.secret = auth.load_or_create_secret(self.directory / "secret")

    def paths(self, node: int) -> RunPaths:
        return RunPaths.of(RUN, self.home(node))

    def home(self, node: int) -> str:
        return str(self.directory / f"node-{node}")

    @contextlib.contextmanager
    def life(self) -> Iterator[list[Life]]:
        """All ranks, started; killed at the end of the block where they still run."""
        self.lives += 1
        words = (SCRIPTS / self.script, self.directory, self.steps)
        with contextlib.ExitStack() as stack:
            port = stack.enter_context(held_port())
            out = stack.enter_context((self.directory / f"said-{self.lives}").open("w+"))
            started = [
                stack.enter_context(
                    self.zygote.start(*words, out=out, err=out, environ=self._environ(rank, port))
                )
                for rank in range(self.nodes * self.ranks)
            ]
            try:
                yield started
            finally:
                out.seek(0)
                self.said.append(out.read())

    def _environ(self, rank: int, port: int) -> dict[str, str]:
        return {
            "RANK": str(rank),
            "WORLD_SIZE": str(self.nodes * self.ranks),
            "LOCAL_RANK": str(rank % self.ranks),
            "LOCAL_WORLD_SIZE": str(self.ranks),
            "GROUP_RANK": str(rank // self.ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "MNEMO_RUN_ID": RUN,
            "MNEMO_RUN__DIR": self.home(rank // self.ranks),
            "MNEMO_SECRET_FILE": str(self.directory / "secret"),
            "MNEMO_NETWORK__INTERFACE": "lo",
            "MNEMO_PROTECT__RATE": "1GB/s",
            **self.settings,
            **self.own.get(rank // self.ranks, {}),
            **self.ranks_own.get(rank, {}),
        }

    def run(self) -> str:
        """A life to its good end; what was said."""
        assert self.codes() == [0] * self.nodes * self.ranks, self.said[-1]
        return self.said[-1]

    def codes(self) -> list[int]:
        """Exit codes of a life that ends by itself."""
        with self.life() as ranks:
            return [rank.wait() for rank in ranks]

    def lose(self, ranks: list[Life], nodes: list[int]) -> None:
        """Kill all processes of ``nodes``; the ranks of the others end by themselves, or are."""
        for node in nodes:
            for rank in ranks[node * self.ranks : (node + 1) * self.ranks]:
                rank.kill()
            self._lose_memory(node)
        deadline = time.monotonic() + PATIENCE_S
        for rank in ranks:
            select.select([rank], [], [], max(0.0, deadline - time.monotonic()))

    def _lose_memory(self, node: int) -> None:
        record = self.paths(node).read_record()
        if record is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(record.pid, signal.SIGKILL)
            smp_lab.wait_for_exit(record.pid)
        shutil.rmtree(self.home(node), ignore_errors=True)

    def steps_done(self) -> int:
        """Of rank 0, all lives together."""
        return max(self.losses(0), default=0)

    def losses(self, rank: int) -> dict[int, str]:
        """Every step's loss; one that was done again had the same."""
        found: dict[int, str] = {}
        with contextlib.suppress(FileNotFoundError):
            for line in (self.directory / f"losses-{rank}").read_text().splitlines():
                step, _, loss = line.partition(" ")
                assert found.setdefault(int(step), loss) == loss, f"rank {rank}, step {step}"
        return found

    def outcome(self) -> list[tuple[dict[int, str], str]]:
        """Of each rank, every loss and the hash of all parameters."""
        return [
            (self.losses(rank), (self.directory / f"hash-{rank}").read_text())
            for rank in range(self.nodes * self.ranks)
        ]

    def status(self, node: int) -> dict[str, Any] | None:
        """What a node's snapshot process says of the training, if it is there and has one."""
        try:
            with SmpClient.connect(self.paths(node), self.secret, PATIENCE_S) as client:
                fits = client.status()["fits"]
        except (SmpError, OSError):
            return None
        return fits[0] if fits else None

    def protected_step(self) -> int:
        """Step that all nodes keep protected, -1 for none."""
        told = [self.status(node) for node in range(self.nodes)]
        return min(fit["protect"]["step"] if fit and fit["protect"] else -1 for fit in told)

    def stored_steps(self) -> list[int]:
        """Step of each node's newest checkpoint, -1 for none."""
        told = [self.status(node) for node in range(self.nodes)]
        return [fit["persist"]["newest_step"] if fit else -1 for fit in told]

    def close(self) -> None:
        """End the snapshot processes that are left."""
        for node in range(self.nodes):
            self._lose_memory(node)
