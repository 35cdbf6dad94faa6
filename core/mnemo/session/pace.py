"""When the next snapshot is due, and after which step training stops: the same for all ranks."""

from __future__ import annotations

import time

from mnemo.config import SnapshotConfig
from mnemo.session.accord import AHEAD, Accord, Words
from mnemo.session.place import Place
from mnemo.session.sources import NOTHING
from mnemo.smp.board import Board
from mnemo.snapshot.frequency import Cadence


class Pace:
    """One rank's view. The first rank of a node decides and says it on the board of the node.

    Where there are several nodes, their first ranks decide together (`Accord`). Boundaries are
    numbered; no rank can pass one before the others are past the one before it.
    """

    def __init__(
        self,
        settings: SnapshotConfig,
        place: Place,
        board: Board,
        accord: Accord | None,
        store_every: float | None = None,
    ) -> None:
        """Begin with nothing due.

        Args:
            settings: Section ``snapshot``.
            place: Where this process stands.
            board: Of this node.
            accord: With the other nodes, if there are any.
            store_every: Seconds between snapshots that go to storage, on all of several nodes.
        """
        self._every = settings.every
        self._cadence = Cadence(settings.every, settings.overhead)
        self._board = board
        self._accord = accord
        self._leads = place.local_rank == 0
        self._leads_all = place.rank == 0
        self._alone = place.members == 1
        self._last: float | None = None
        """When the boundary before was reached, seconds of the performance counter."""
        self._taken_beside = False
        """Whether a snapshot was being copied since then."""
        self._due = NOTHING
        """Boundary of the next snapshot, which the other nodes are still to be told."""
        self._store_every = store_every
        self._stored = time.perf_counter()
        """When rank 0 last said that one should go to storage."""

    def begin(self, boundary: int, *, anew: bool = True) -> None:
        """Training goes on behind ``boundary``; the first snapshot is due after one step.

        Args:
            boundary: The newest that is done.
            anew: On all ranks; else this one takes a lost one's place, and the board's word counts.
        """
        if not self._leads:
            return
        if anew:
            self._board.reset()
        if anew or self._board.scheduled() <= boundary:
            self._board.schedule(boundary + 1)

    def reach(self, number: int) -> None:
        """Boundary ``number`` is reached; `leave` has to follow."""
        now = time.perf_counter()
        if self._last is not None and self._leads:
            self._cadence.observe(now - self._last, beside=self._taken_beside)
        self._last, self._taken_beside = now, False
        if self._accord is not None and self._leads:
            heard = self._accord.hear()
            if heard.stop and self._board.stop_at() < 0:
                self._board.set_stop(number + 1)
            if heard.due > number:
                self._board.schedule(heard.due)
            if heard.store > number:
                self._board.set_store(2 * heard.store)
        elif self._leads and self._board.stop_requested() and self._board.stop_at() < 0:
            self._board.set_stop(number + (not self._alone))  # others may have passed this one

    def is_due(self, number: int) -> bool:
        """Whether a snapshot is to be taken here."""
        if self._every is not None:
            return number % self._every == 0
        return self._board.is_scheduled(number)

    def stops_at(self, number: int) -> bool:
        """Whether training is to stop here."""
        return 0 <= self._board.stop_at() <= number

    def taken(self, number: int, copy_s: float, *, beside: bool) -> None:
        """The snapshot that was due here is under way, or was given up.

        Args:
            number: This boundary.
            copy_s: Seconds that copying takes.
            beside: It is copied beside the next step.
        """
        self._taken_beside = beside
        if not self._leads:
            return
        interval = self._cadence.interval(copy_s)
        if self._accord is None:
            self._board.schedule(number + interval)
        elif self._leads_all:
            self._due = number + max(interval, AHEAD)

    def leave(self, number: int) -> None:
        """All that belongs to boundary ``number`` is done."""
        if self._accord is None or not self._leads:
            return
        store = NOTHING
        if self._leads_all and self._store_every is not None:
            now = time.perf_counter()
            if now - self._stored >= self._store_every:
                store, self._stored = number + AHEAD, now
        self._accord.say(Words(self._board.stop_requested(), self._due, store))
        self._due = NOTHING

    def pause(self) -> None:
        """Something that is not a training step runs now: it does not count as step time."""
        self._last = None

    def close(self) -> None:
        """No boundary follows, on any rank."""
        if self._accord is not None:
            self._accord.close()
