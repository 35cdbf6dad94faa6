from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from mnemo.recovery.dying import await_death, dying_of

if TYPE_CHECKING:
    from collections.abc import Iterator

HOLDER = """
import sys, threading
from mnemo.recovery import dying
if sys.argv[1] == "main":
    fd = dying.hold()
else:
    fds = []
    thread = threading.Thread(target=lambda: fds.append(dying.hold()))
    thread.start(); thread.join()
    fd = fds[0]
print(fd, flush=True)
hog = bytearray(1) * int(sys.argv[2])
print("there", flush=True)
sys.stdin.read()
sys.exit(3)
"""


@contextmanager
def holder(thread: str = "main", megabytes: int = 0) -> Iterator[tuple[subprocess.Popen[str], int]]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, thread, str(megabytes << 20)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    with process:
        assert process.stdout is not None
        fd = int(process.stdout.readline())
        assert process.stdout.readline() == "there\n"
        yield process, fd
        process.kill()


def test_a_kill_is_noticed_before_the_memory_is_given_back() -> None:
    with holder(megabytes=512) as (process, fd):
        noticed = threading.Event()
        found: list[tuple[int | None, bool]] = []

        def note() -> None:
            still = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None
            found.append((dying_of(process.pid), still))
            noticed.set()

        await_death(process.pid, fd, note)
        assert dying_of(process.pid) is None
        process.send_signal(signal.SIGKILL)
        assert noticed.wait(60)
        assert found == [(signal.SIGKILL, True)]


def test_an_exit_is_no_death_by_a_signal() -> None:
    with holder() as (process, fd):
        noticed = threading.Event()
        await_death(process.pid, fd, noticed.set)
        process.communicate("")
        assert noticed.wait(60)
        assert process.returncode == 3


def test_nor_is_the_end_of_a_thread() -> None:
    with holder("another") as (process, fd):
        noticed = threading.Event()
        await_death(process.pid, fd, noticed.set)
        assert noticed.wait(60)
        assert dying_of(process.pid) is None


def test_what_is_not_held_is_not_waited_for() -> None:
    with pytest.raises(OSError, match="something else by now"):
        await_death(os.getpid(), 0, lambda: None)
    assert dying_of(1 << 22) is None
