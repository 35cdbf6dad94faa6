"""Jobs on this machine that lose ranks, for `benchmarks.recovery`."""

from __future__ import annotations

import itertools
import os
import signal
import statistics
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import psutil

from benchmarks.recovery_marks import WHERE, Marks
from mnemo.recovery import journal
from mnemo.smp import lifecycle
from mnemo.smp import messages as m
from mnemo.smp.paths import RunPaths

if TYPE_CHECKING:
    import random
    from collections.abc import Callable

    from benchmarks.recovery_marks import Mark

LIMIT_S: Final = 120.0
"""More is not waited for."""
_ROOT: Final = Path(__file__).parents[1]
_LOOK_S: Final = 1.0
_SETTLING: Final = 10
"""Steps that are done before anything is killed, and between two kills."""
_WARM_S: Final = 1.0
"""A process that has used no processor for so long waits for something."""


@dataclass(frozen=True)
class Loss:
    """What one kill cost, in seconds.

    Attributes:
        total_s: From the kill until all ranks have done the step that it interrupted, less a step.
        usual_s: A step.
        phases: Of it, in order, by name.
        again: Forward passes that ranks which were not killed have repeated.
        steps_again: Steps that were done before, and are done again.
        by: What came in the lost rank's place.
    """

    total_s: float
    usual_s: float
    phases: dict[str, float] = field(default_factory=dict)
    again: int = 0
    steps_again: int = 0
    by: str = ""


class Job(ABC):
    """One training, of which all ranks send marks; close it.

    Args:
        directory: Exists, and is removed by somebody else.
        ranks: How many.
        chance: Says who is killed, and when.
    """

    script: tuple[str, ...] = ()
    """And what it is told besides where marks go."""

    def __init__(self, directory: Path, ranks: int, chance: random.Random) -> None:
        self.directory = directory
        self.ranks = ranks
        self.chance = chance
        self.marks = Marks(directory)
        self.environ = {
            **os.environ,
            WHERE: self.marks.where,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(
                (str(_ROOT), str(_ROOT / "core"), str(_ROOT / "examples" / "lightning_gpt"))
            ),
        }
        self.held = ExitStack()
        """Closed with the job."""
        self._processes: list[subprocess.Popen[bytes]] = []

    def start(
        self, *words: str, python: str | Path = sys.executable, **environ: str
    ) -> subprocess.Popen[bytes]:
        """``PYTHON WORDS...``; ended with the job."""
        with (self.directory / "log").open("ab") as log:
            process = subprocess.Popen(
                (str(python), *words),
                env={**self.environ, **environ},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._processes.append(process)
        return process

    def close(self) -> None:
        """End everything."""
        for process in self._processes:
            if process.poll() is None:
                process.terminate()
        for process in self._processes:
            _end(process)
        self.marks.close()
        self.held.close()

    def said(self) -> str:
        """By launcher and ranks, the end of it."""
        return (self.directory / "log").read_text()[-30000:]

    def newest(self) -> int:
        """The highest step that all ranks have done."""
        done = [self.marks.of("step", rank=rank) for rank in range(self.ranks)]
        return min(max((mark["step"] for mark in each), default=0) for each in done)

    def until(self, ready: Callable[[], Any]) -> Any:
        """Wait until it gives something that is true, looked at with each mark; that.

        Raises:
            TimeoutError: It takes longer than `LIMIT_S`, or the job has ended.
        """
        deadline = time.monotonic() + LIMIT_S
        while not (found := self.marks.wait_for(ready, _LOOK_S)):
            codes = [each.poll() for each in self._processes]
            ended = [code for code in codes if code not in {None, -signal.SIGKILL}]
            if ended or time.monotonic() > deadline:
                why = f"it ended with {ended}" if ended else f"{LIMIT_S:g} s are over"
                raise TimeoutError(f"the training does not go on: {why}\n{self.said()}")
        return found

    def train(self, steps: int) -> None:
        """Wait until so many more are done."""
        goal = self.newest() + steps
        self.until(lambda: self.newest() >= goal)

    def usual_s(self) -> float:
        """The median of a step, of all until now."""
        at = [mark["at"] for mark in self.marks.of("step", rank=0)][2:]
        return statistics.median(b - a for a, b in itertools.pairwise(at))

    @abstractmethod
    def settle(self, share: float) -> None:
        """Wait until a rank may be killed.

        Args:
            share: Where between two checkpoints, if there are any.
        """

    def choose(self) -> int:
        """Which rank is killed."""
        return self.chance.randrange(self.ranks)

    def kill(self) -> tuple[Mark, float]:
        """SIGKILL a rank at some instant of its forward or backward pass.

        Returns:
            Its mark as the forward pass began, and when it was killed, in Unix seconds.
        """
        rank = self.choose()
        while True:
            begun = self._next_forward(rank)
            wait_s = self.chance.uniform(0.02, 0.9) * self._passes_s(rank)
            time.sleep(max(begun["at"] + wait_s - time.time(), 0))
            if not self.marks.of("backward", rank=rank, step=begun["step"]):
                at = time.time()
                os.kill(begun["pid"], signal.SIGKILL)
                return begun, at

    def _next_forward(self, rank: int) -> Mark:
        since = time.time()
        found: list[Mark] = self.until(lambda: after(self.marks.of("forward", rank=rank), since))
        return found[0]

    def _passes_s(self, rank: int) -> float:
        """How long forward and backward pass take there, of late."""
        begun = {mark["step"]: mark["at"] for mark in self.marks.of("forward", rank=rank)}
        ended = {mark["step"]: mark["at"] for mark in self.marks.of("backward", rank=rank)}
        return statistics.median([ended[step] - begun[step] for step in ended][-20:])

    def measure(self) -> Loss:
        """Kill, and wait until the step that this interrupted is done."""
        victim, at = self.kill()
        step = victim["step"]

        def done() -> bool:
            ranks = {mark["rank"] for mark in after(self.marks.of("step", step=step), at)}
            return len(ranks) == self.ranks

        self.until(done)
        ends = after(self.marks.of("step", step=step), at)
        end = max(min(m["at"] for m in ends if m["rank"] == rank) for rank in range(self.ranks))
        others = [m for m in self.marks.of("forward") if m["rank"] != victim["rank"]]
        known = {(m["rank"], m["step"]) for m in others if m["at"] < at}
        repeated = [m for m in after(others, at) if (m["rank"], m["step"]) in known]
        before = [m for m in self.marks.of("step", rank=victim["rank"]) if at < m["at"] < end]
        self.train(_SETTLING)  # what is usual is known better then
        usual = self.usual_s()
        phases, by = self.phases(victim, at, end - usual)
        steps_again = sum(mark["step"] < step for mark in before)
        return Loss(end - at - usual, usual, phases, len(repeated), steps_again, by)

    def phases(self, victim: Mark, at: float, end: float) -> tuple[dict[str, float], str]:
        """What it was spent on, and what came in the lost rank's place.

        Args:
            victim: A mark of the rank that was killed.
            at: When, in Unix seconds.
            end: When the interrupted step was done, less a step.
        """
        del victim
        newest = {mark["rank"]: mark for mark in after(self.marks.of("imported"), at)}
        started = max(psutil.Process(mark["pid"]).create_time() for mark in newest.values())
        imported = max(mark["at"] for mark in newest.values())
        forward = after(self.marks.of("forward"), imported)
        first = {mark["rank"]: mark["at"] for mark in reversed(forward)}
        begun = max(first.values())
        return {
            "restart_s": started - at,
            "imports_s": imported - started,
            "set_up_s": begun - imported,
            "again_s": end - begun,
        }, "all ranks"


class MnemoJob(Job):
    """Of ``mnemo run``; a rank's place is taken by a warm standby, unless ``standbys`` is 0."""

    def __init__(self, directory: Path, ranks: int, chance: random.Random, *more: str) -> None:
        super().__init__(directory, ranks, chance)
        self.environ |= {
            "MNEMO_RUN_ID": "benchmark",
            "MNEMO_RUN__DIR": str(directory / "run"),
            "MNEMO_RUN__JOURNAL": str(directory / "journal"),
        }
        words = ("run", f"--nproc-per-node={ranks}", "--max-restarts=99", *more)
        script = (str(_ROOT / "benchmarks" / "recovery_train.py"), str(ranks), "unused")
        self._agent = self.start("-c", "from mnemo.cli import main; main()", *words, *script)

    def close(self) -> None:
        """See `Job.close`; the memory of the snapshot process is given back, too."""
        super().close()
        client = lifecycle.find(RunPaths.of("benchmark", self.directory / "run"))
        if client is not None:
            with client:
                client.tell(m.Shutdown(force=True))
                client.wait_for_end(30)

    def settle(self, share: float) -> None:
        """See `Job.settle`: until there is a warm standby."""
        del share
        self.train(_SETTLING)
        deadline = time.monotonic() + LIMIT_S
        while not self._is_warm():
            if time.monotonic() > deadline:
                msg = f"there was no warm standby within {LIMIT_S:g} s"
                raise TimeoutError(msg)

    def _is_warm(self) -> bool:
        """Whether the standby waits for something, at the usual priority."""
        ranks = {mark["pid"] for mark in list(self.marks.all)}
        for process in psutil.Process(self._agent.pid).children():
            try:
                is_standby = "mnemo.launcher.standby" in " ".join(process.cmdline())
                if process.pid in ranks or not is_standby:
                    continue
                used = process.cpu_times()
                time.sleep(_WARM_S)
                usual = os.sched_getscheduler(process.pid) == os.SCHED_OTHER
                return usual and process.cpu_times() == used
            except (psutil.NoSuchProcess, ProcessLookupError):
                return False
        time.sleep(0.1)
        return False

    def records(self, event: str) -> list[dict[str, Any]]:
        """Of the agent's journal."""
        path = self.directory / "journal" / "benchmark.jsonl"
        return [record for record in journal.read(path) if record["event"] == event]

    def phases(self, victim: Mark, at: float, end: float) -> tuple[dict[str, float], str]:
        """See `Job.phases`."""
        records = [record for record in self.records("replaced") if record["noticed"] > at]
        if not records:
            return super().phases(victim, at, end)
        record = records[0]
        rank = victim["rank"]
        agent, ranks = record["agent_ms"], record["phases_ms"]
        own = ranks[str(rank)]
        other = ranks[str(next(r for r in range(self.ranks) if r != rank))]
        noticed = record["noticed"]
        told = noticed + next(v for k, v in agent.items() if k.startswith("told")) / 1e3
        imported = after(self.marks.of("imported", rank=rank), at)[0]["at"]
        given = told + other["wait_for_process"] / 1e3 + other.get("hand_over", 0.0) / 1e3
        bid = given - (own.get("read") or own["receive"]) / 1e3
        back = noticed + agent["all_back"] / 1e3
        groups = own["groups"] / 1e3
        return {
            "detect_s": noticed - at,
            "told_s": told - noticed,
            "started_s": imported - told,
            "set_up_s": bid - imported,
            "state_s": given - bid,
            "restore_s": back - groups - given,
            "groups_s": groups,
            "redo_s": end - back,
        }, str(record["by"][str(rank)])


class TorchrunJob(Job):
    """Of torchrun, with Lightning's checkpoint."""

    def __init__(self, directory: Path, ranks: int, chance: random.Random) -> None:
        super().__init__(directory, ranks, chance)
        # With 2.13 all lives have one Store, in which gloo finds the addresses of those before.
        self.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
        launcher = ("-m", "torch.distributed.run", "--standalone", "--max-restarts=99")
        script = (str(_ROOT / "benchmarks" / "recovery_train.py"), str(ranks))
        where = str(directory / "checkpoint.ckpt")
        self.start(*launcher, f"--nproc-per-node={ranks}", *script, where)

    def interval(self) -> Mark:
        """How often a checkpoint is made; ``every`` steps."""
        found: Mark = self.until(lambda: self.marks.of("interval", rank=0))[0]
        return found

    def settle(self, share: float) -> None:
        """See `Job.settle`."""
        every = self.interval()["every"]
        since = time.time()
        self.until(lambda: after(self.marks.of("saved", rank=0), since))
        self.train(int(share * every))


def after(marks: list[Mark], at: float) -> list[Mark]:
    """Those of a later time."""
    return [mark for mark in marks if mark["at"] > at]


def _end(process: subprocess.Popen[bytes]) -> None:
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
