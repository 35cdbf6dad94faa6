"""The results of a group's operations since the last boundary that all ranks have passed.

They are the same on all members, so a rank that begins again at the boundary can be given them by
any other, and so can one that had not got to the end of an operation when another had.
"""

from __future__ import annotations

import threading
from collections import Counter
from typing import TYPE_CHECKING, NamedTuple

import torch

from mnemo.comm.operation import size_of

if TYPE_CHECKING:
    from collections.abc import Sequence

LIMIT_BYTES = 8 << 30
"""Of one group. What comes after is not kept, so the group cannot be replayed until results go."""
STARTUP_BYTES = 64 << 10
"""Longest result that is kept before the first boundary."""


class Boundary:
    """Where this process is among the step boundaries."""

    def __init__(self) -> None:
        self.latest = -1
        """Tick of the last one it reached."""
        self.let_gone = -1
        """Tick of the last one that all ranks are known to have reached."""
        self.updating: tuple[int, int] | None = None
        """Tick of the last one before an update, and the place of the world's barrier there."""


boundary = Boundary()
"""Of this process."""


class Entry(NamedTuple):
    """One operation that has ended.

    Attributes:
        signature: Of the operation.
        data: Its result as bytes; None if it was not kept.
        recorded: It belongs to the record of the start.
    """

    signature: str
    data: torch.Tensor | None
    recorded: bool = True


class Mark(NamedTuple):
    """Where a group was at a boundary.

    Attributes:
        asked: Operations asked for until then.
        messages: Messages asked for until then.
    """

    asked: int
    messages: int


class Kept:
    """Results by the place of their operation; of some of them, nothing but that they ended."""

    def __init__(self) -> None:
        self.marks: dict[int, Mark] = {}
        """By tick."""
        self._lock = threading.Lock()
        self._base = 0
        self._entries: list[Entry] = []
        self._bytes = 0
        self._free: dict[int, list[torch.Tensor]] = {}

    @property
    def known(self) -> int:
        """Place of the first operation that has not ended here, and was not given."""
        return self._base + len(self._entries)

    @property
    def first(self) -> int:
        """Place from which on all results are here, up to `known`."""
        with self._lock:
            for back, entry in enumerate(reversed(self._entries)):
                if entry.data is None:
                    return self._base + len(self._entries) - back
            return self._base

    def room(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor | None:
        """Memory for a result like these, None if it is not to be kept."""
        size = size_of(tensors)
        with self._lock:
            if size > (LIMIT_BYTES - self._bytes if self.marks else STARTUP_BYTES):
                return None
            if free := self._free.get(size):
                return free.pop()
        return torch.empty(size, dtype=torch.uint8)

    def add(self, entry: Entry) -> None:
        """The operation at `known` has ended."""
        with self._lock:
            self._entries.append(entry)
            self._bytes += 0 if entry.data is None else entry.data.numel()

    def at(self, place: int) -> Entry | None:
        """What is known of the operation there; None if it has not ended."""
        with self._lock:
            here = place - self._base
            assert here >= 0
            return self._entries[here] if here < len(self._entries) else None

    def between(self, begin: int, end: int) -> list[Entry]:
        """What is known of these."""
        with self._lock:
            return self._entries[begin - self._base : end - self._base]

    def mark(self, tick: int, mark: Mark) -> list[Entry]:
        """A boundary is reached; returns what was kept until then if it is the first."""
        with self._lock:
            begun = [] if self.marks else self._entries[: mark.asked - self._base]
            self.marks[tick] = mark
            return begun

    def let_go(self, tick: int) -> None:
        """Nobody begins again before this boundary."""
        with self._lock:
            mark = self.marks.get(tick)
            if mark is None:
                return
            self.marks = {each: m for each, m in self.marks.items() if each >= tick}
            gone = self._entries[: max(0, mark.asked - self._base)]
            del self._entries[: len(gone)]
            self._base += len(gone)
            old = [entry.data for entry in gone if entry.data is not None]
            self._bytes -= sum(each.numel() for each in old)
            if old:  # to be used again: new memory costs a page fault each 4 KiB
                sizes = Counter(each.numel() for each in old)
                self._free = {size: [] for size in sizes}
                for each in old:
                    self._free[each.numel()].append(each)

    def begin(self, tick: int, place: int) -> None:
        """Of a rank that joins: its boundary. Nothing before is known."""
        with self._lock:
            self._base, self._entries, self._bytes = place, [], 0
            self.marks = {tick: Mark(place, 0)}
