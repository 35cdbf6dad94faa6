"""Jobs of `benchmarks.recovery` that others keep running, each in an environment of its own."""

from __future__ import annotations

import subprocess
import sysconfig
import venv
from pathlib import Path
from typing import TYPE_CHECKING, Final

from benchmarks.recovery_jobs import Job, Loss, after
from tests.ports import held_port

if TYPE_CHECKING:
    import random

    from benchmarks.recovery_marks import Mark

NVRX: Final = "nvidia-resiliency-ext==0.4.1"
TORCHFT: Final = "torchft-nightly==2026.10.26"
_PIP_S: Final = 300.0
_HERE: Final = Path(__file__).parent


class CannotInstallError(Exception):
    """Says why."""


def environment(directory: Path, requirement: str) -> Path:
    """Make one with that installed, which sees this one's packages, torch among them; its programs.

    Raises:
        CannotInstallError: pip cannot.
    """
    venv.create(directory, with_pip=True)
    variables = {"base": str(directory), "platbase": str(directory)}
    packages = Path(sysconfig.get_path("purelib", "venv", variables))
    (packages / "beside.pth").write_text(sysconfig.get_path("purelib") + "\n")
    programs = directory / "bin"
    command = (programs / "python", "-m", "pip", "install", "--quiet", requirement)
    try:
        subprocess.run(command, capture_output=True, check=True, text=True, timeout=_PIP_S)
    except subprocess.CalledProcessError as error:
        raise CannotInstallError(error.stderr.strip().splitlines()[-1]) from None
    except subprocess.TimeoutExpired:
        msg = f"pip takes longer than {_PIP_S:g} s"
        raise CannotInstallError(msg) from None
    return programs


class NvrxJob(Job):
    """NVRx's in-process restart, with one rank more in reserve; loses one rank, once.

    Rank 0 is not killed, for it hosts the stores.
    """

    def __init__(self, directory: Path, ranks: int, chance: random.Random, programs: Path) -> None:
        super().__init__(directory, ranks, chance)
        ports = [self.held.enter_context(held_port()) for _ in range(3)]
        self.environ |= {
            "WORLD_SIZE": str(ranks + 1),
            "MASTER_ADDR": "127.0.0.1",
            "STORE_PORTS": " ".join(map(str, ports)),
        }
        for rank in range(ranks + 1):
            variables = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            script = str(_HERE / "recovery_nvrx.py")
            self.start(script, python=programs / "python", **variables)

    def settle(self, share: float) -> None:
        """See `Job.settle`."""
        del share
        self.train(10)

    def choose(self) -> int:
        """See `Job.choose`."""
        return self.chance.randrange(1, self.ranks)

    def phases(self, victim: Mark, at: float, end: float) -> tuple[dict[str, float], str]:
        """See `Job.phases`."""
        del victim
        times = [
            at,
            *(
                max(m["at"] for m in after(self.marks.of(what), at))
                for what in ("called", "group", "ready")
            ),
        ]
        spans = [b - a for a, b in zip(times, [*times[1:], end], strict=True)]
        return dict(
            zip(("called_s", "groups_s", "state_s", "redo_s"), spans, strict=True)
        ), "reserve"


class TorchftJob(Job):
    """torchft; whoever is killed is started again at once."""

    def __init__(self, directory: Path, ranks: int, chance: random.Random, programs: Path) -> None:
        super().__init__(directory, ranks, chance)
        self._python = programs / "python"
        port = self.held.enter_context(held_port())
        words = ("--min_replicas", "1", "--quorum_tick_ms", "100", "--join_timeout_ms", "1000")
        self.start(*words, "--bind", f"[::]:{port}", python=programs / "torchft_lighthouse")
        self.environ |= {
            "WORLD_SIZE": str(ranks),
            "TORCHFT_LIGHTHOUSE": f"http://127.0.0.1:{port}",
        }
        for rank in range(ranks):
            self._start_rank(rank)

    def _start_rank(self, rank: int) -> None:
        self.start(str(_HERE / "recovery_torchft.py"), python=self._python, RANK=str(rank))

    def settle(self, share: float) -> None:
        """See `Job.settle`."""
        del share
        self.train(10)

    def measure(self) -> Loss:
        """See `Job.measure`; until all ranks take part in a step again.

        The interrupted step is done without the lost rank's batch, after *stall*.
        """
        victim, at = self.kill()
        self._start_rank(victim["rank"])

        def steps(**fields: float) -> list[Mark]:
            return [m for m in after(self.marks.of("step", **fields), at) if m["step"] >= step]

        step = victim["step"]
        whole = self.until(lambda: steps(rank=victim["rank"], ranks=self.ranks))[0]["at"]
        self.train(5)
        usual = self.usual_s()
        stall = min(mark["at"] for mark in steps()) - at - usual
        return Loss(whole - at - usual, usual, {"stall_s": stall}, by="new process")
