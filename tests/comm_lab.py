"""Ranks of a test, real processes over a Store of their own, and what each returned."""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import signal
import threading
import time
import traceback
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch._dynamo  # what an optimizer imports when it is made, in each fork
import torch.distributed as dist

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from multiprocessing.connection import Connection
    from multiprocessing.process import BaseProcess

    Program = Callable[..., Any]

PATIENCE_S = 40


def connect(port: int) -> dist.TCPStore:
    """A client of the test's Store."""
    return dist.TCPStore(
        "127.0.0.1", port, None, is_master=False, timeout=timedelta(seconds=PATIENCE_S)
    )


class Talk:
    """A rank's line to the test."""

    def __init__(self, line: Connection) -> None:
        self._line = line
        self.hear: Callable[[], Any] = line.recv

    def say(self, value: Any) -> None:
        """To `Rank.hear`."""
        self._line.send(("said", value))


class Rank:
    """One process that runs a program."""

    def __init__(self, process: BaseProcess, line: Connection) -> None:
        self._process = process
        self._line = line
        assert process.pid is not None
        self.pid = process.pid

    def hear(self) -> Any:
        """What it said next, by its program's `Talk.say`."""
        assert self._line.poll(PATIENCE_S), "it said nothing"
        kind, value = self._line.recv()
        assert kind == "said", value
        return value

    def tell(self, value: Any) -> None:
        """To its program's `Talk.hear`."""
        self._line.send(value)

    def result(self) -> Any:
        """What its program returned; the process has ended then."""
        value = self.hear()
        self._process.join(PATIENCE_S)
        assert self._process.exitcode == 0
        return value

    def join(self) -> None:
        """Wait until it has killed itself."""
        self._process.join(PATIENCE_S)
        assert self._process.exitcode == -signal.SIGKILL, self._process.exitcode

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal; after SIGKILL it is gone."""
        os.kill(self.pid, number)
        if number == signal.SIGKILL:
            self._process.join()

    def close(self) -> None:
        """Kill it, if it is still there."""
        self._process.kill()
        self._process.join()
        self._process.close()
        self._line.close()


class World:
    """Starts ranks, and new ones in the places of lost ones."""

    def __init__(self) -> None:
        self._life, theirs = multiprocessing.Pipe()
        self._host = multiprocessing.get_context("fork").Process(
            target=_host, args=(theirs, self._life), daemon=True
        )
        self._host.start()
        theirs.close()
        self.port: int = self._life.recv()
        self._ranks: list[Rank] = []

    def start(self, program: Program, rank: int, *given: Any) -> Rank:
        """``program(rank, port of the Store, talk, *given)`` in a process of its own."""
        ours, theirs = multiprocessing.Pipe()
        context = multiprocessing.get_context("fork")
        process = context.Process(
            target=_live, args=(program, rank, self.port, theirs, given), daemon=True
        )
        process.start()
        theirs.close()
        self._ranks.append(Rank(process, ours))
        return self._ranks[-1]

    def start_all(self, program: Program, size: int, *given: Any) -> list[Rank]:
        """One process each for ``size`` ranks."""
        return [self.start(program, rank, *given) for rank in range(size)]

    def close(self) -> None:
        """Nothing is left."""
        for rank in self._ranks:
            rank.close()
        self._life.close()
        self._host.kill()
        self._host.join()
        self._host.close()


@contextlib.contextmanager
def world() -> Iterator[World]:
    """Ranks that are gone at the end of the block."""
    made = World()
    try:
        yield made
    finally:
        made.close()


def run_all(program: Program, size: int, *given: Any) -> list[Any]:
    """What each of ``size`` ranks returned."""
    with world() as made:
        return [rank.result() for rank in made.start_all(program, size, *given)]


def _host(line: Connection, other_end: Connection) -> None:
    other_end.close()
    store = dist.TCPStore("127.0.0.1", 0, None, is_master=True, wait_for_workers=False)
    line.send(store.port)
    with contextlib.suppress(EOFError):
        line.recv()
    os._exit(0)


def _live(program: Program, rank: int, port: int, line: Connection, given: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"
    _tell_where_it_is()
    try:
        value = program(rank, port, Talk(line), *given)
    except BaseException:  # noqa: BLE001 - told to the test
        line.send(("failed", f"rank {rank}: {traceback.format_exc()}"))
        os._exit(1)
    line.send(("said", value))
    line.close()
    os._exit(0)  # as a fork of the tests' process it has their threads' locks


def wait_for_state(pid: int, state: str) -> None:
    """Wait until a process is in this state, as /proc/PID/stat names it."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        with open(f"/proc/{pid}/stat") as file:  # noqa: PTH123
            now = file.read().rpartition(")")[2].split()[0]
        if now == state:
            return
        assert time.monotonic() < deadline, f"it is still {now}"
        time.sleep(0.005)  # a stopped process announces nothing


def _tell_where_it_is() -> None:
    """Say what all threads do shortly before the test gives up."""
    # Not faulthandler's own: it waits for a thread that a fork of the tests' process has not.
    timer = threading.Timer(PATIENCE_S - 5, faulthandler.dump_traceback)
    timer.daemon = True
    timer.start()


@contextlib.contextmanager
def group(backend: str, rank: int, size: int, port: int, life: str = "0") -> Iterator[Any]:
    """The default group of ``backend``; the Store's client is yielded."""
    store = connect(port)
    dist.init_process_group(
        backend,
        store=dist.PrefixStore(f"{backend}/{life}", store),
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=PATIENCE_S),
    )
    try:
        yield store
    finally:
        if backend == "mnemo":  # gloo's own, destroyed, hangs now and then
            dist.destroy_process_group()
