"""Jobs that lose nodes, for `benchmarks.node_loss`: of ``mnemo run``, and of torchrun."""

from __future__ import annotations

import json
import os
import random
import sys
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from mnemo.errors import SmpError
from mnemo.recovery import journal
from mnemo.smp.client import SmpClient
from mnemo.smp.paths import RunPaths
from mnemo.transport import auth

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from tests.cluster.netns import Host, Network

NODES: Final = 4
LIMIT_S: Final = 150.0
"""More is not waited for."""
_PORT: Final = 29400
_SEED: Final = 4
_SCRIPT: Final = Path(__file__).with_name("node_loss_train.py")
_SPARE: Final = "this node is a spare"
Mark = dict[str, Any]


@dataclass(frozen=True)
class Loss:
    """What one loss cost; in seconds, those of its phases in order."""

    total_s: float
    phases: dict[str, float] = field(default_factory=dict)
    steps_again: int = 0


class Job(ABC):
    """One training, of which all ranks write `Mark` after `Mark` to ``directory``."""

    arguments: tuple[str, ...] = ()
    """Of the script."""

    def __init__(self, network: Network, directory: Path) -> None:
        self.network = network
        self.directory = directory
        directory.mkdir()
        self._marks: list[Mark] = []
        self._read: dict[Path, int] = {}
        """So many bytes of each file are in `_marks`."""

    @abstractmethod
    def command(self, host: Host) -> tuple[str, ...]:
        """What stands between ``python`` and the script."""

    def environ(self, host: Host) -> dict[str, str]:
        """Of the launcher."""
        del host
        return {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "wire"}

    def start(self, *hosts: Host) -> None:
        """A launcher on each."""
        for host in hosts:
            words = (*self.command(host), str(_SCRIPT), str(self.directory), *self.arguments)
            with self._log(host).open("w") as log:
                host.start((sys.executable, *words), self.environ(host), stdout=log, stderr=log)

    def said(self, host: Host) -> str:
        """What the launcher there has said, and its ranks."""
        log = self._log(host)
        return log.read_text() if log.exists() else ""

    def _log(self, host: Host) -> Path:
        return self.directory / f"log-{host.number}"

    def marks(self) -> list[Mark]:
        """Of all ranks, by time."""
        for file in self.directory.glob("rank-*"):
            with file.open("rb") as new:
                new.seek(self._read.get(file, 0))
                for line in new:
                    if line.endswith(b"\n"):
                        self._marks.append({**json.loads(line), "rank": file.name})
                        self._read[file] = self._read.get(file, 0) + len(line)
        self._marks.sort(key=lambda mark: mark["at"])
        return self._marks

    def newest(self, what: str = "step") -> int:
        """The highest step that any rank has marked so."""
        return max((mark["step"] for mark in self.marks() if mark["what"] == what), default=0)

    def until(self, what: str, ready: Callable[[], object]) -> None:
        """Wait for it.

        Raises:
            TimeoutError: It takes longer than `LIMIT_S`.
        """
        deadline = time.monotonic() + LIMIT_S
        while not ready():
            if time.monotonic() > deadline:
                said = "\n".join(self.said(host)[-1500:] for host in self.network.hosts)
                raise TimeoutError(f"no {what} within {LIMIT_S:.0f} s:\n{said}")
            time.sleep(0.1)  # what is measured has times of its own

    def train(self, steps: int) -> None:
        """Wait until so many more are done."""
        goal = self.newest() + steps
        self.until(f"step {goal}", lambda: self.newest() >= goal)

    def measure(self, lose: Callable[[], None], others: Sequence[Host]) -> Loss:
        """Lose nodes; what came of it once the next new step is done.

        Args:
            lose: Does it, and what an operator would do right after.
            others: Nodes that were training and are not lost.
        """
        begun = time.time()
        lose()
        try:
            self.until("new step", lambda: _first_new(self.marks(), begun))
        except TimeoutError as error:
            print(error, file=sys.stderr)
            return Loss(LIMIT_S)
        marks = self.marks()
        new = _first_new(marks, begun)
        assert new is not None
        mine = [m for m in marks if (m["rank"], m["begun"]) == (new["rank"], new["begun"])]
        at = {m["what"]: m["at"] for m in mine if m["what"] != "step"}
        again = [m for m in mine if m["what"] == "step" and m["at"] < new["at"]]
        caught_up = max((m["at"] for m in again), default=at["ready"])
        known = self.known(begun, others)
        return Loss(
            new["at"] - begun,
            {
                **({"detect_s": known - begun} if known else {}),
                ("agree_s" if known else "detect_and_agree_s"): new["begun"] - (known or begun),
                "imports_s": at["imported"] - new["begun"],
                "group_s": at["group"] - at["imported"],
                "model_s": at["built"] - at["group"],
                "state_s": at["ready"] - at["built"],
                "again_s": caught_up - at["ready"],
                "step_s": new["at"] - caught_up,
            },
            len(again),
        )

    def known(self, begun: float, others: Sequence[Host]) -> float | None:
        """When the first of ``others`` noticed, in Unix seconds; None if nobody says that."""
        del begun, others
        return None


def _first_new(marks: Sequence[Mark], begun: float) -> Mark | None:
    """The first step that no rank had done that was there by then."""
    steps = [mark for mark in marks if mark["what"] == "step"]
    done = max(mark["step"] for mark in steps if mark["begun"] < begun)
    return next((m for m in steps if m["begun"] > begun and m["step"] > done), None)


class MnemoJob(Job):
    """Of ``mnemo run``; 3+1, and otherwise as it is by default.

    Args:
        network: Its nodes.
        directory: Where it writes.
        nnodes: ``--nnodes``.
    """

    def __init__(self, network: Network, directory: Path, nnodes: str) -> None:
        super().__init__(network, directory)
        self._nnodes = nnodes
        self._secret = auth.load_or_create_secret(directory / "secret")
        self._chance = random.Random(_SEED)
        self.members = network.hosts[:NODES]
        """Nodes that train."""

    def command(self, host: Host) -> tuple[str, ...]:
        """See `Job.command`."""
        del host
        places = ",".join(host.address for host in self.network.hosts)
        run = ("-c", "from mnemo.cli import main; main()", "run", f"--nnodes={self._nnodes}")
        where = ("--rdzv-backend=c10d", f"--rdzv-endpoint={places}", "--rdzv-id=job")
        return (*run, *where, "--max-restarts=99", "protect.nodes=3+1")

    def environ(self, host: Host) -> dict[str, str]:
        """See `Job.environ`."""
        return {
            **super().environ(host),
            "MNEMO_SECRET_FILE": str(self.directory / "secret"),
            "MNEMO_NETWORK__INTERFACE": "wire",
            "MNEMO_RUN__DIR": str(host.home / "run"),
            "MNEMO_RUN__JOURNAL": str(host.home / "journal"),
        }

    def settle(self) -> None:
        """Wait until what is done by now is protected, and others than members are spares."""
        step = self.newest()
        self.until(
            f"protected step {step}",
            lambda: all(self._protected(host) >= step for host in self.members),
        )
        for host in self.network.hosts:
            if host not in self.members:
                self.until("spare", lambda host=host: _SPARE in self.said(host))
        time.sleep(self._chance.uniform(0, 4))

    def _protected(self, host: Host) -> int:
        paths = RunPaths.of("job", host.home / "run")
        try:
            with SmpClient.connect(paths, self._secret, LIMIT_S) as client:
                fits = client.status()["fits"]
        except (SmpError, OSError):
            return -1
        return fits[0]["protect"]["step"] if fits and fits[0]["protect"] else -1

    def victim(self, *, store: bool) -> Host:
        """The member with the Store, or another one."""
        return self._chance.choice([h for h in self.members if _has_store(h) == store])

    def known(self, begun: float, others: Sequence[Host]) -> float | None:
        """See `Job.known`; as the agents' journals have it."""
        records = [r for h in others for r in journal.read(h.home / "journal" / "job.jsonl")]
        told = [
            float(r["noticed"]) for r in records if r["event"] == "failure" and r["time"] > begun
        ]
        return min(told, default=None)


def _has_store(host: Host) -> bool:
    """Whether somebody listens there where agents meet."""
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{host.pids()[0]}/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *_ = line.split()
            if state == "0A" and local.endswith(f":{_PORT:04X}"):
                return True
    return False


class TorchrunJob(Job):
    """Of torchrun, with a checkpoint."""

    arguments = ("--file",)

    def command(self, host: Host) -> tuple[str, ...]:
        """See `Job.command`."""
        first = self.network.hosts[0]
        run = ("-m", "torch.distributed.run", f"--nnodes={NODES}", f"--local-addr={host.address}")
        where = ("--rdzv-backend=c10d", f"--rdzv-endpoint={first.address}:{_PORT}", "--rdzv-id=job")
        # It cannot know by itself that this is its own address, for the machine has another name.
        return (*run, *where, f"--rdzv-conf=is_host={int(host is first)}", "--max-restarts=99")

    def until(self, what: str, ready: Callable[[], object]) -> None:
        """See `Job.until`; one that has given up is started again at once, as a scheduler would."""

        def go_on() -> object:
            for host in self.network.hosts:
                if host.started and host.started[-1].poll() is not None:
                    self.start(host)
            return ready()

        super().until(what, go_on)

    def interval(self) -> Mark:
        """How often a checkpoint is made; ``every`` steps."""
        self.until("interval", lambda: self._marked("interval"))
        return self._marked("interval")[0]

    def settle(self, share: float) -> None:
        """Wait until ``share`` of an interval after a checkpoint."""
        every = self.interval()["every"]
        saved = self.newest("saved")
        self.until("checkpoint", lambda: self.newest("saved") > saved + every)
        steps = [m["at"] for m in self._marked("step") if m["rank"] == "rank-0"][-6:]
        time.sleep(share * every * (steps[-1] - steps[0]) / (len(steps) - 1))

    def _marked(self, what: str) -> list[Mark]:
        return [mark for mark in self.marks() if mark["what"] == what]


def lose(hosts: Iterable[Host]) -> None:
    """All processes of ``hosts`` are killed, and what is in their memory is gone."""
    for host in hosts:
        host.lose()
