"""A ``mnemo run`` whose ranks only speak of being replaced, watched line by line."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
from launching import TIMEOUT_S, all_records, started

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

RANK = """
import os, signal, sys, time
from mnemo.recovery import control
from mnemo.recovery.control import Ask, Back, Cannot, Doing, InGroup, Replaceable

rank, life = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
world, joins = int(os.environ["WORLD_SIZE"]), control.joins()
signal.signal(signal.SIGTERM, lambda *_: os._exit(75))


def say(*words):
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())


def hear():
    while isinstance(message := channel.receive(), Ask):
        tick, asked, ended = progress()
        groups = {{"0": InGroup(tuple(range(world)), asked, ended)}}
        channel.tell(Doing(message.number, tick, groups, place="work (train.py:1)"))
    return message


def progress():
    return 4, 0, 0


if __name__ == "__main__":
    channel = control.connect()
    say("pid", rank, os.getpid(), life, joins)
    {before}
    assert channel.tell(Replaceable(True))
    say("ready", rank)
    while lost := hear():
        say("lost", rank, lost.epoch, list(lost.ranks), list(lost.members))
        source = None if joins is None else 0 if rank else 1
        {then}
        channel.tell(Back(lost.epoch, 4, {{"state": 2.5}}, source))
        say("back", rank, lost.epoch)
"""
"""What a rank runs, with what it does before it is ready, and before it goes back."""


def write(directory: Path, before: str = "", then: str = "", top: str = "") -> str:
    """The script, and its name; ``top`` stands before everything else."""
    (directory / "train.py").write_text(top + RANK.format(before=before, then=then))
    return "train.py"


class Job:
    """One that runs."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=self._read, args=(file,))
            for file in (process.stdout, process.stderr)
        ]
        self.pid = process.pid
        self._untaken: list[str] = []
        self.seen: list[str] = []
        """All lines so far."""
        self.pids: dict[int, int] = {}
        """Of each rank's newest process that has spoken."""
        for thread in self._threads:
            thread.start()

    def _read(self, file: Any) -> None:
        for line in file:
            self._lines.put(line.rstrip("\n"))

    def until(self, *wanted: str) -> list[str]:
        """Read until there is a line for each of these; gives them, each line once."""
        return [self._take(each) for each in wanted]

    def _take(self, wanted: str) -> str:
        while not (found := next((line for line in self._untaken if wanted in line), "")):
            try:
                self._note(self._lines.get(timeout=TIMEOUT_S))
            except queue.Empty:
                said = "\n".join(self.seen)
                pytest.fail(f"no line with {wanted!r} in:\n{said}")
        self._untaken.remove(found)
        return found

    def _note(self, line: str) -> None:
        self.seen.append(line)
        self._untaken.append(line)
        _, _, told = line.partition("] pid ")
        if told:
            rank, pid, *_ = told.split()
            self.pids[int(rank)] = int(pid)

    def ready(self, *ranks: int) -> None:
        """Wait until these are."""
        self.until(*(f"ready {rank}" for rank in ranks))

    def warm(self) -> str:
        """Wait until there is a standby; what is said of it."""
        return self.until("is replaced in the running job")[0]

    def kill(self, *ranks: int) -> None:
        """SIGKILL, at once."""
        for rank in ranks:
            os.kill(self.pids[rank], signal.SIGKILL)

    def stop(self) -> int:
        """Ask it to end; its exit code."""
        self._process.terminate()
        return self.wait()

    def wait(self) -> int:
        """Its exit code, with everything read."""
        code = self._process.wait(timeout=TIMEOUT_S)
        for thread in self._threads:
            thread.join(TIMEOUT_S)
        while not self._lines.empty():
            self._note(self._lines.get())
        return code

    def said(self) -> list[str]:
        """The agent's lines so far."""
        return [line for line in self.seen if line.startswith("mnemo: ")]


def records(event: str) -> list[dict[str, Any]]:
    """Of the journal."""
    return [record for record in all_records() if record["event"] == event]


@contextmanager
def job(*words: str, cwd: Path, ranks: int = 3, **environ: str) -> Iterator[Job]:
    """One that is killed at the end of the block if it still runs."""
    command = ("recover.grace=10s", f"--nproc-per-node={ranks}", *words)
    with started(*command, cwd=cwd, **environ) as process:
        made = Job(process)
        try:
            yield made
        finally:
            process.kill()
            made.wait()
