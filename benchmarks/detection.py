"""How long until the other ranks are told that one is lost, by what has become of it.

The ranks are small processes that speak the agent's protocol, with half a GiB of memory each, which
the kernel takes back before it says that a process has ended. What a hang is measured from is the
moment in which the rank stops; the limit is part of the time.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.harness import Samples

if TYPE_CHECKING:
    from typing_extensions import Self

    from benchmarks.harness import Report

RANKS = 3
LIMIT_S = 2.0
MEMORY = 512 << 20
MNEMO = (sys.executable, "-c", "from mnemo.cli import main; main()")

RANK = f"""
import itertools, os, signal, sys, time
from pathlib import Path
from mnemo.recovery import control
from mnemo.recovery.control import Ask, Back, Doing, InGroup, Replaceable

rank, joins, hung = int(os.environ["RANK"]), control.joins(), Path("hung")
ticks, memory = itertools.count(0, 2), b"x" * {MEMORY}


def say(*words):
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())


def fail(number, frame):
    say("struck", rank, time.monotonic())
    raise RuntimeError("of its own")


def hang(number, frame):
    hung.write_text(str(rank))
    say("struck", rank, time.monotonic())


def doing(number):
    if not hung.exists():  # from step to step, and waits for the others
        return Doing(number, next(ticks), {{"0": InGroup(tuple(range({RANKS})), 8, 7)}})
    asked = 7 + (hung.read_text() != str(rank))  # all but one wait for that one
    return Doing(number, 0, {{"0": InGroup(tuple(range({RANKS})), asked, 7)}}, place="work")


signal.signal(signal.SIGTERM, lambda *_: os._exit(75))
signal.signal(signal.SIGUSR1, fail)
signal.signal(signal.SIGUSR2, hang)
channel = control.connect()
channel.tell(Replaceable(True))
say("is", rank, os.getpid())
while message := channel.receive():
    if isinstance(message, Ask):
        channel.tell(doing(message.number))
        continue
    say("told", rank, time.monotonic())
    hung.unlink(missing_ok=True)
    channel.tell(Back(message.epoch, 4, source=None if joins is None else 0))
"""

CASES = {
    "SIGKILL": signal.SIGKILL,
    "exception": signal.SIGUSR1,
    "SIGSTOP": signal.SIGSTOP,
    "hang": signal.SIGUSR2,
}
FROM_WITHIN = frozenset({"exception", "hang"})
"""The rank says itself when it begins."""


def run(quick: bool, report: Report) -> None:
    """Strike one rank after the other, in turns by what happens to it."""
    rounds = 2 if quick else 8
    taken: dict[str, list[float]] = {name: [] for name in CASES}
    with tempfile.TemporaryDirectory() as place, _Job(Path(place)) as job:
        for number in range(rounds):
            for name, what in CASES.items():
                taken[name].append(job.strike(number % RANKS, what, said=name in FROM_WITHIN))
    medians = {}
    for name, seconds in taken.items():
        samples = Samples([1000 * each for each in seconds])
        low, high = samples.quartiles
        medians[name] = samples.median
        report.row(
            what=name,
            rounds=rounds,
            told_ms=samples.median,
            quartile_ms=low,
            third_quartile_ms=high,
            longest_ms=max(samples.values),
            limit_s=LIMIT_S if name in {"SIGSTOP", "hang"} else None,
        )
    report.bar("death_ms", medians["SIGKILL"], 50, "lower")
    worst = max(medians["SIGSTOP"], medians["hang"])
    report.bar("hang_over_limit", worst / 1000 / LIMIT_S, 2, "lower")


class _Job:
    """A ``mnemo run`` whose ranks are replaced for as long as it is asked to."""

    def __init__(self, place: Path) -> None:
        (place / "train.py").write_text(RANK)
        command = [*MNEMO, "run", f"--nproc-per-node={RANKS}", "--max-restarts=1000"]
        settings = [f"recover.hang={LIMIT_S:g}s", "recover.standbys=0", f"run.dir={place}/run"]
        self._process = subprocess.Popen(
            [*command, *settings, "train.py"],
            cwd=place,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._pids: dict[int, int] = {}

    def __enter__(self) -> Self:
        while len(self._pids) < RANKS:
            self._read()
        return self

    def __exit__(self, *exc: object) -> None:
        self._process.terminate()
        self._process.communicate()

    def strike(self, rank: int, what: signal.Signals, *, said: bool) -> float:
        """Have a rank lost; seconds until the last of the others is told.

        Args:
            rank: Which one.
            what: The signal that does it, or has it do it.
            said: It says itself when it begins.
        """
        began = time.monotonic()
        os.kill(self._pids[rank], what)
        told: list[float] = []
        while (words := self._read())[-1:] != ["exact"]:
            match words[2:]:
                case ["struck", _, at] if said:
                    began = float(at)
                case ["told", who, at] if who != str(rank):
                    told.append(float(at))
        return max(told) - began

    def _read(self) -> list[str]:
        """The next line's words, behind ``[rank N]`` where it is a rank's."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            msg = "the job has ended"
            raise RuntimeError(msg)
        words = line.split()
        if words[2:3] == ["is"]:
            self._pids[int(words[3])] = int(words[4])
        return words
