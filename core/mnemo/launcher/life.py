"""One set of this node's ranks, from start to end."""

from __future__ import annotations

import os
from functools import partial
from typing import TYPE_CHECKING

from mnemo.errors import LaunchError
from mnemo.launcher.worker import Start, Worker, hold_port, rank_environ

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from mnemo.launcher.options import LaunchOptions
    from mnemo.launcher.output import Terminal
    from mnemo.launcher.seat import Seat


class Life:
    """Its ranks, once they are started, and how they ended.

    Args:
        parent: The launch's log directory, in which this life gets one of its own, also where an
            earlier launch left some.

    Raises:
        LaunchError: It cannot be made.
    """

    def __init__(self, parent: Path) -> None:
        try:
            parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            numbers = [path.name.removeprefix("life-") for path in parent.glob("life-*")]
            self.number = 1 + max((int(n) for n in numbers if n.isdigit()), default=-1)
            self.log_dir = parent / f"life-{self.number}"
            self.log_dir.mkdir()
        except OSError as error:
            msg = f"cannot write logs to {parent} ({error.strerror}); set --log-dir or run.journal"
            raise LaunchError(msg) from error
        self._port = hold_port()
        self.workers: dict[int, Worker] = {}
        """By rank."""
        self.replaced: dict[int, Worker] = {}
        """Who was in the place of a rank before, where it has ended and that is not over yet."""
        self.exits: dict[int, int] = {}
        """Exit code by rank, in the order noticed."""
        self.noticed: dict[int, float] = {}
        """Seconds since the Unix epoch at which each exit was noticed."""

        self._gone: list[Worker] = []

    @property
    def pids(self) -> set[int]:
        """Processes of its ranks, also such as are just ending."""
        return {worker.pid for worker in (*self.workers.values(), *self._gone)}

    @property
    def port(self) -> int:
        """Where rank 0 can listen; nobody else can until `close`."""
        number: int = self._port.getsockname()[1]
        return number

    def start(
        self,
        options: LaunchOptions,
        seat: Seat,
        *,
        terminal: Terminal,
        on_exit: Callable[[Worker, int], None],
        start: Callable[[int], Start],
    ) -> None:
        """Start this node's ranks.

        Args:
            options: The launch.
            seat: Where this node's ranks stand.
            terminal: Where their output goes.
            on_exit: See `Worker`.
            start: How each rank's process comes to be.

        Raises:
            LaunchError: The program cannot be started.
        """
        self._worker = partial(
            Worker,
            options=options,
            shows_rank=seat.world_size > 1,
            log_dir=self.log_dir,
            terminal=terminal,
            on_exit=on_exit,
        )
        self._environ = partial(rank_environ, options, os.environ, seat)
        self._first_rank = seat.first_rank
        for local_rank in range(options.ranks):
            rank = seat.first_rank + local_rank
            self.place(rank, start(rank))

    def place(self, rank: int, start: Start) -> None:
        """Start a rank of this node's; who was in its place has ended.

        Raises:
            LaunchError: It cannot be started.
        """
        local_rank = rank - self._first_rank
        worker = self._worker(
            rank, local_rank=local_rank, environ=self._environ(local_rank), start=start
        )
        if rank in self.workers:
            self._gone.append(self.workers[rank])
            self.replaced.setdefault(rank, self.workers[rank])
        self.workers[rank] = worker

    def kill(self) -> None:
        """Kill the ranks that still run."""
        for worker in (*self.workers.values(), *self._gone):
            worker.kill()

    def close(self) -> None:
        """Take the last of the output; nobody writes any more."""
        for worker in (*self.workers.values(), *self._gone):
            worker.close()
        self._port.close()
