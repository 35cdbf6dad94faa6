"""One rank dies, another process takes its place, the others stay: ranks that only speak of it."""

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

# A rank that says what it is and what it hears, and goes back at once; `before` may do otherwise.
RANK = """
import os, signal, sys, time
from mnemo.recovery import control
from mnemo.recovery.control import Back, Cannot, Replaceable

rank, life = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
epoch = control.joins()
signal.signal(signal.SIGTERM, lambda *_: os._exit(75))
channel = control.connect()


def say(*words):
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())


say("pid", rank, os.getpid(), life, epoch)
{before}
assert channel.tell(Replaceable(True))
say("ready", rank)
if epoch is not None:
    channel.tell(Back(epoch, 4, {{"state": 2.5}}, source=2 - rank))
while message := channel.receive():
    say("lost", rank, message.epoch, list(message.ranks), list(message.members))
    {then}
    channel.tell(Back(message.epoch, 4))
"""


def write(tmp_path: Path, before: str = "", then: str = "") -> str:
    (tmp_path / "train.py").write_text(RANK.format(before=before, then=then))
    return "train.py"


class Job:
    """A ``mnemo run``, read line by line as it goes."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.seen: list[str] = []
        self.pids: dict[int, int] = {}
        """Of the newest process of each rank that has spoken."""
        self._threads = [
            threading.Thread(target=self._read, args=(file,))
            for file in (process.stdout, process.stderr)
        ]
        for thread in self._threads:
            thread.start()

    def _read(self, file: Any) -> None:
        for line in file:
            self._lines.put(line.rstrip("\n"))

    def until(self, *wanted: str) -> list[str]:
        """Read until there has been a line with each of these; the lines, in this order."""
        found: dict[str, str] = {}
        while len(found) < len(wanted):
            try:
                line = self._lines.get(timeout=TIMEOUT_S)
            except queue.Empty:
                said = "\n".join(self.seen)
                pytest.fail(f"no {set(wanted) - set(found)} in:\n{said}")
            self.seen.append(line)
            _, _, told = line.partition("] pid ")
            if told:
                rank, pid, *_ = told.split()
                self.pids[int(rank)] = int(pid)
            match = next((each for each in wanted if each in line and each not in found), None)
            if match:
                found[match] = line
        return [found[each] for each in wanted]

    def ready(self, *ranks: int) -> None:
        """Wait until these are."""
        self.until(*(f"ready {rank}" for rank in ranks))

    def warm(self) -> str:
        """Wait until there is a standby; what is said of it."""
        (line,) = self.until("is replaced in the running job")
        return line

    def kill(self, *ranks: int) -> None:
        """At once."""
        for rank in ranks:
            os.kill(self.pids[rank], signal.SIGKILL)

    def stop(self) -> int:
        """Ask it to end; its exit code."""
        self._process.terminate()
        return self.wait()

    def wait(self) -> int:
        """Its exit code."""
        code = self._process.wait(timeout=TIMEOUT_S)
        for thread in self._threads:
            thread.join(TIMEOUT_S)
        while not self._lines.empty():
            self.seen.append(self._lines.get())
        return code

    def records(self, event: str) -> list[dict[str, Any]]:
        return [record for record in all_records() if record["event"] == event]


@contextmanager
def job(*words: str, cwd: Path, ranks: int = 3, **environ: str) -> Iterator[Job]:
    command = ("recover.grace=10s", f"--nproc-per-node={ranks}", *words)
    with started(*command, cwd=cwd, **environ) as process:
        made = Job(process)
        try:
            yield made
        finally:
            process.kill()
            made.wait()


def test_a_killed_rank_is_replaced_by_the_standby(tmp_path: Path) -> None:
    with job(write(tmp_path), cwd=tmp_path) as run:
        run.ready(0, 1, 2)
        assert "(1 warm standby, " in run.warm()
        before = dict(run.pids)
        run.kill(1)
        run.until("lost 0 1 [1] [0, 1, 0]", "lost 2 1 [1] [0, 1, 0]", "ready 1")
        (said,) = run.until(
            "mnemo: ",
        )
        assert "rank 1 killed by SIGKILL → standby, state from rank 1, 0." in said
        assert said.endswith(" s, 0 steps lost, exact")
        assert {0: before[0], 2: before[2]} == {0: run.pids[0], 2: run.pids[2]}
        assert run.stop() == 75
    (record,) = run.records("replaced")
    assert record["by"] == {"1": "standby"}
    assert record["worker_pids"] == {"1": run.pids[1]}
    assert record["phases_ms"] == {"0": {}, "1": {"state": 2.5}, "2": {}}
    assert (record["epoch"], record["tick"], record["sources"]) == (1, 4, [1])
    assert run.records("failure") == []
    assert len(run.records("launch")) == 1
