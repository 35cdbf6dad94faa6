"""Runs what is asked of a group, one after the other, in threads of its own.

Futures get their values by a thread that has handed its turn on: hooks of users' run in there, and
may wait for what is asked later.
"""

from __future__ import annotations

import queue
import threading
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from mnemo.comm.work import Collective


class Line:
    """Those that wait, and the threads.

    Args:
        run: Has an operation end, in any way, except for telling who waits for it.
    """

    def __init__(self, run: Callable[[Collective], None]) -> None:
        self._run = run
        self._asked: queue.SimpleQueue[Collective | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._turn = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._ready = 0

    def put(self, work: Collective) -> None:
        """Have it run after all that were asked for before."""
        self._asked.put(work)
        self._start()

    def close(self, within_s: float) -> None:
        """End, after all that was asked for."""
        self._asked.put(None)
        deadline = time.monotonic() + within_s
        for each in self._threads:
            if each is not threading.current_thread():
                each.join(max(0.0, deadline - time.monotonic()))

    def _start(self) -> None:
        """Have a thread that takes the next turn."""
        with self._lock:
            if self._ready == 0:
                self._ready += 1
                thread = threading.Thread(target=self._serve, name="mnemo-comm", daemon=True)
                self._threads.append(thread)
                thread.start()

    def _serve(self) -> None:
        while True:
            with self._turn:
                work = self._asked.get()
                if work is None:
                    self._asked.put(None)
                    return
                self._run(work)
                settle = work.end()
                if settle:
                    with self._lock:
                        self._ready -= 1
            if settle:
                self._start()
                work.settle()
                with self._lock:
                    self._ready += 1
            del work
