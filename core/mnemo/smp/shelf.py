"""Which rank holds which generation in which segment: the SMP's decisions, without any I/O.

A *tick* numbers generations along the run and is the same on every rank. A generation is committed
once every member has sealed its tick. A segment may be written again only when a newer generation
is committed, so two segments a rank always hold one committed generation whatever happens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from mnemo.types import GenerationState


@dataclass
class Slot:
    """One segment of one rank; ``size`` is that of its bulk in bytes, ``tick`` -1 while empty."""

    size: int
    state: GenerationState = GenerationState.RETIRED
    tick: int = -1
    step: int = -1
    pins: int = 0
    """Readers (persisting, fetching) that need it unchanged."""


@dataclass
class RankShelf:
    """The segments of one rank, and the newest tick that it has begun."""

    slots: dict[int, Slot] = field(default_factory=dict)
    begun: int = -1
    next_index: int = 0

    def sealed(self) -> Iterator[tuple[int, Slot]]:
        """Segments that hold a complete copy."""
        for index, slot in self.slots.items():
            if slot.state is GenerationState.SEALED:
                yield index, slot

    def find(self, tick: int) -> int | None:
        """Index of the sealed segment of ``tick``."""
        return next((index for index, slot in self.sealed() if slot.tick == tick), None)


class Shelf:
    """All segments of one fit on this node."""

    BUFFERS = 2

    def __init__(self, members: int) -> None:
        self.members = members
        self.ranks: dict[int, RankShelf] = {}
        self.closed = False
        """Nothing more is to come: only the newest committed generation is of use."""

    def rank(self, rank: int) -> RankShelf:
        """The shelf of ``rank``, made on first use."""
        return self.ranks.setdefault(rank, RankShelf())

    def committed(self, below: int | None = None) -> tuple[int, int] | None:
        """``(tick, step)`` of the newest generation sealed by every member, or None."""
        found = [one for one in self.all_committed().items() if below is None or one[0] < below]
        return max(found, default=None)

    def all_committed(self) -> dict[int, int]:
        """Tick to step of all generations sealed by every member."""
        if len(self.ranks) < self.members:
            return {}
        sealed = [{(s.tick, s.step) for _, s in shelf.sealed()} for shelf in self.ranks.values()]
        return dict(set.intersection(*sealed))

    def _abandoned(self, tick: int) -> bool:
        """Whether some member has gone past ``tick`` without sealing it: it can never commit."""
        return any(shelf.begun > tick and shelf.find(tick) is None for shelf in self.ranks.values())

    def _is_free(self, slot: Slot, committed: tuple[int, int] | None) -> bool:
        if slot.pins or slot.state is GenerationState.WRITING:
            return False
        if slot.state is not GenerationState.SEALED:
            return True
        newest = committed[0] if committed else -1
        if slot.tick > newest:
            return self.closed or self._abandoned(slot.tick)
        return slot.tick < newest

    def begin(self, rank: int, tick: int) -> None:
        """``rank`` wants to write ``tick``: it is through with all before."""
        shelf = self.rank(rank)
        shelf.begun = max(shelf.begun, tick)
        for index, slot in shelf.slots.items():
            if slot.state is GenerationState.WRITING:
                self.void(rank, index)

    def grant(self, rank: int, size: int) -> tuple[int | None, list[int], bool]:
        """Choose the segment for ``rank`` to write what it has begun into.

        Returns:
            ``(index, surplus, create)``: the segment to use, or None; free segments of another
            size, which are to be released; whether a new segment may be made. ``(None, [], False)``
            means: wait.
        """
        shelf = self.rank(rank)
        committed = self.committed()
        free = [i for i, slot in shelf.slots.items() if self._is_free(slot, committed)]
        surplus = [i for i in free if shelf.slots[i].size != size]
        fitting = [i for i in free if shelf.slots[i].size == size]
        if fitting:
            return min(fitting, key=lambda i: shelf.slots[i].tick), surplus, False
        kept = len(shelf.slots) - len(surplus)
        pinned = any(slot.pins for slot in shelf.slots.values())
        return None, surplus, kept < self.BUFFERS + pinned

    def surplus(self, rank: int) -> list[int]:
        """Free segments beyond the usual number: a third one is only lent while another is read.

        Once the shelf is closed, all free ones.
        """
        shelf = self.rank(rank)
        excess = len(shelf.slots) - (0 if self.closed else self.BUFFERS)
        if excess <= 0 or any(slot.pins for slot in shelf.slots.values()):
            return []
        committed = self.committed()
        free = [i for i, s in shelf.slots.items() if self._is_free(s, committed)]
        return sorted(free, key=lambda i: shelf.slots[i].tick)[:excess]  # the oldest go

    def add(self, rank: int, size: int) -> int:
        """Register a new empty segment."""
        shelf = self.rank(rank)
        index = shelf.next_index
        shelf.next_index += 1
        shelf.slots[index] = Slot(size)
        return index

    def write(self, rank: int, index: int, tick: int, step: int) -> None:
        """Segment ``index`` is being written from now on."""
        slot = self.rank(rank).slots[index]
        slot.state, slot.tick, slot.step = GenerationState.WRITING, tick, step

    def seal(self, rank: int, index: int, tick: int) -> bool:
        """Segment ``index`` is complete; False if it is not the one being written."""
        slot = self.rank(rank).slots.get(index)
        if slot is None or slot.state is not GenerationState.WRITING or slot.tick != tick:
            return False
        slot.state = GenerationState.SEALED
        return True

    def void(self, rank: int, index: int) -> None:
        """Forget what segment ``index`` holds."""
        slot = self.rank(rank).slots[index]
        slot.state, slot.tick, slot.step = GenerationState.RETIRED, -1, -1

    def drop(self, rank: int, tick: int) -> None:
        """``rank`` gives up on ``tick``."""
        shelf = self.rank(rank)
        shelf.begun = max(shelf.begun, tick + 1)
        for index, slot in shelf.slots.items():
            if slot.tick == tick and slot.state is GenerationState.WRITING:
                self.void(rank, index)

    def forget_after(self, rank: int, tick: int) -> list[int]:
        """Void everything of ``rank`` newer than ``tick``: training goes on from there.

        A pinned one is void as well: its reader goes on, and it is not granted until then.

        Returns:
            The voided segments.
        """
        shelf = self.rank(rank)
        newer = [index for index, slot in shelf.slots.items() if slot.tick > tick]
        for index in newer:
            self.void(rank, index)
        shelf.begun = tick
        return newer

    def members_of(self, tick: int) -> dict[int, int]:
        """Rank to segment index of a committed ``tick``, in rank order."""
        found = {rank: shelf.find(tick) for rank, shelf in sorted(self.ranks.items())}
        return {rank: index for rank, index in found.items() if index is not None}
