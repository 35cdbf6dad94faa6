"""A trainer's standing connection to its SMP: joins, and after a crash of the SMP joins another.

The trainer keeps the descriptors of its segments, so a new SMP is handed them back and no committed
generation is lost with the old one.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable
from typing import Final, TypeVar

from mnemo.errors import IdentityError, RunInUseError, SmpError
from mnemo.smp import lifecycle
from mnemo.smp import messages as m
from mnemo.smp.board import Board
from mnemo.smp.client import REPLY_TIMEOUT_S, SmpClient
from mnemo.smp.memory import rank_above
from mnemo.smp.paths import RunPaths
from mnemo.transport.local import MAX_FDS, ConnectionLostError, close_all

log = logging.getLogger("mnemo")
R = TypeVar("R", bound=m.Message)

_FAREWELL_S: Final = 10.0
"""How long the end of a process may wait for the SMP, which has nothing to do for it."""
_LOOK_WHETHER_FREE_S: Final = 0.005
_LOOK_AGAIN_S: Final = 30.0
"""After how long an SMP that could not be replaced is looked for again between two snapshots."""


class Link:
    """One rank's place at the SMP."""

    def __init__(
        self,
        paths: RunPaths,
        join: m.Join,
        on_loss: Callable[[str], None] | None = None,
        *,
        patience_s: float = 0.0,
    ) -> None:
        """Start or find the SMP and join it.

        Args:
            paths: The run's files.
            join: Who this is.
            on_loss: Told, in words, whenever the SMP was found dead and replaced.
            patience_s: Seconds that a process which has the place, and is known to have been
                killed, may take until the kernel has closed its connection.

        Raises:
            SmpError: No SMP to be had.
            IdentityError: The place is taken, or the launch has another shape.
        """
        self.paths = paths
        self._join = join
        self._on_loss = on_loss
        self._free_at = time.monotonic() + patience_s
        self._lock = threading.Lock()
        """Around the choice of the SMP and what it has to be handed."""
        self._segments: dict[int, int] = {}
        self._ledger = -1
        self._board: Board | None = None
        self._look_at = 0.0
        self.newest: m.Generation | None = None
        self._client = self._connect()

    def _connect(self) -> SmpClient:
        client = lifecycle.ensure(self.paths)
        try:
            given = [] if self._board is None else [self._board.fd]
            joined, fds = self._sit(client, given)
            if self._board is None:
                self._board = Board(fds[0])
            else:
                close_all(fds)  # it took over the one that this rank has mapped
            self.newest = joined.newest
            held = sorted(self._segments.items())
            for i in range(0, len(held), MAX_FDS):
                part = held[i : i + MAX_FDS]
                client.tell(m.Adopt(tuple(k for k, _ in part)), [fd for _, fd in part])
            if self._ledger >= 0:
                client.tell(m.KeepLedger(), [self._ledger])
        except BaseException:
            client.close()
            raise
        rank_above(client.pid)
        return client

    def _sit(self, client: SmpClient, given: list[int]) -> tuple[m.Joined, list[int]]:
        while True:
            try:
                return client.ask(self._join, m.Joined, given)
            except RunInUseError:
                if time.monotonic() >= self._free_at:
                    raise
            time.sleep(_LOOK_WHETHER_FREE_S)

    @property
    def board(self) -> Board:
        """The board of this training; the same one as long as this object lives."""
        assert self._board is not None
        return self._board

    @property
    def smp_pid(self) -> int:
        """Process id of the SMP at the other end."""
        return self._client.pid

    def ask(
        self, request: m.Message, answer: type[R], *, timeout_s: float = REPLY_TIMEOUT_S
    ) -> tuple[R, list[int]]:
        """As `SmpClient.ask`. A dead SMP is replaced, and the request fails all the same.

        Raises:
            SmpError: The SMP died or did not answer; the next request goes to its successor.
        """
        client = self._client
        try:
            return client.ask(request, answer, timeout_s=timeout_s)
        except ConnectionLostError as error:
            self._replace(client, str(error))
            raise

    def look(self) -> None:
        """Replace the SMP if it has died since the last request; call it now and then.

        Until then the memory is this process's alone, and would be lost with it.
        """
        if time.monotonic() >= self._look_at and self._client.is_lost():
            self._replace(self._client, "found dead between two snapshots")

    def _replace(self, lost: SmpClient, why: str) -> None:
        with self._lock:
            if self._client is not lost:
                return  # another thread was faster
            lost.close()
            try:
                self._client = self._connect()
            except (SmpError, IdentityError) as error:
                self._look_at = time.monotonic() + _LOOK_AGAIN_S
                log.warning("the snapshot process was lost and not replaced: %s; %s", why, error)
                return
        if self._on_loss is not None:
            self._on_loss(f"process {lost.pid} was lost ({why}); process {self._client.pid} serves")

    def hold(self, index: int, fd: int) -> None:
        """Keep segment ``index``'s descriptor for a later SMP; this object owns it from here on."""
        with self._lock:
            old = self._segments.pop(index, None)
            if old is not None:
                os.close(old)
            self._segments[index] = fd

    def keep_ledger(self, fd: int) -> None:
        """Have the ledger behind ``fd`` held, which stays the caller's until the next one is kept.

        Raises:
            SmpError: As `ask`; the successor will hold it.
        """
        with self._lock:
            self._ledger = fd
        client = self._client
        try:
            client.tell(m.KeepLedger(), [fd])
        except ConnectionLostError as error:
            self._replace(client, str(error))
            raise

    def forget(self, keep: set[int]) -> None:
        """Let go of segments other than those in ``keep``."""
        with self._lock:
            for index in [i for i in self._segments if i not in keep]:
                os.close(self._segments.pop(index))

    def close(self) -> None:
        """Hang up. What the SMP holds it goes on holding."""
        self._client.close()
        self._let_go()

    def _let_go(self) -> None:
        """Of all memory that is the SMP's; harmless a second time."""
        self.board.close()
        close_all(list(self._segments.values()))
        self._segments.clear()

    def finish(self) -> None:
        """This fit ended well: its newest generation, now the SMP's alone, waits for `say_over`."""
        with contextlib.suppress(SmpError):
            self._client.tell(m.Finish())
        self._let_go()

    def say_over(self) -> None:
        """The program ended well, and not just this fit: tell, and hang up."""
        with contextlib.suppress(SmpError):
            self._client.tell(m.Over(), timeout_s=_FAREWELL_S)
        self.close()

    def leave(self, *, finished: bool, timeout_s: float = REPLY_TIMEOUT_S) -> None:
        """End this fit and hang up; ``finished`` gives its memory back once all ranks say so."""
        with contextlib.suppress(SmpError):
            self._client.tell(m.Leave(finished), timeout_s=timeout_s)
        self.close()
