"""The shelf under histories of ranks that write, fail, die, resume, and readers that pin."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from mnemo.smp.shelf import Shelf
from mnemo.types import GenerationState

if TYPE_CHECKING:
    from mnemo.smp.shelf import Slot

WRITING, SEALED = GenerationState.WRITING, GenerationState.SEALED
SIZES = st.sampled_from([100, 100, 100, 200])


class ShelfMachine(RuleBasedStateMachine):
    """Every rank wants one tick after the other; the server's part is played by this class."""

    @initialize(members=st.integers(1, 4))
    def start(self, members: int) -> None:
        self.shelf = Shelf(members)
        self.ticks = dict.fromkeys(range(members), 0)
        self.sizes = dict.fromkeys(range(members), 100)
        self.waiting: set[int] = set()
        self.writing: dict[int, int] = {}
        self.dead: set[int] = set()
        self.pinned: list[Slot] = []
        self.safe: tuple[int, int] | None = None
        """Newest generation that was ever committed in this lineage."""
        for rank in range(members):
            self.shelf.rank(rank)

    def _try(self, rank: int) -> None:
        """What the server does for a rank that waits."""
        size = self.sizes[rank]
        while True:
            index, surplus, create = self.shelf.grant(rank, size)
            for old in surplus:
                assert not self.shelf.rank(rank).slots[old].pins
                del self.shelf.rank(rank).slots[old]
            if index is None and create:
                self.shelf.add(rank, size)
                continue
            break
        if index is None:
            return
        slot = self.shelf.rank(rank).slots[index]
        assert not slot.pins, "a segment that is being read was granted"
        before = self.shelf.committed()
        self.shelf.write(rank, index, self.ticks[rank], self.ticks[rank] * 10)
        assert self.shelf.committed() == before, "the committed generation was granted for writing"
        self.waiting.discard(rank)
        self.writing[rank] = index

    def _changed(self) -> None:
        """What the server does after every change."""
        for rank, shelf in self.shelf.ranks.items():
            for index in self.shelf.surplus(rank):
                assert not shelf.slots[index].pins
                del shelf.slots[index]
        for rank in sorted(self.waiting):
            self._try(rank)

    def _idle(self) -> list[int]:
        return [
            r for r in self.ticks if r not in self.waiting | self.dead and r not in self.writing
        ]

    @precondition(lambda self: self._idle())
    @rule(data=st.data(), skip=st.integers(1, 2), size=SIZES)
    def begin(self, data: st.DataObject, skip: int, size: int) -> None:
        rank = data.draw(st.sampled_from(self._idle()))
        self.ticks[rank] += skip
        self.sizes[rank] = size
        self.shelf.begin(rank, self.ticks[rank])
        self.waiting.add(rank)
        self._changed()

    @precondition(lambda self: self.writing)
    @rule(data=st.data())
    def seal(self, data: st.DataObject) -> None:
        rank = data.draw(st.sampled_from(sorted(self.writing)))
        assert self.shelf.seal(rank, self.writing.pop(rank), self.ticks[rank])
        self._changed()

    @precondition(lambda self: self.writing)
    @rule(data=st.data())
    def fail(self, data: st.DataObject) -> None:
        rank = data.draw(st.sampled_from(sorted(self.writing)))
        del self.writing[rank]
        self.shelf.drop(rank, self.ticks[rank])
        self._changed()

    @precondition(lambda self: self._idle())
    @rule(data=st.data())
    def drop_without_writing(self, data: st.DataObject) -> None:
        rank = data.draw(st.sampled_from(self._idle()))
        self.ticks[rank] += 1
        self.shelf.drop(rank, self.ticks[rank])
        self._changed()

    @precondition(lambda self: len(self.dead) < len(self.ticks))
    @rule(data=st.data())
    def die(self, data: st.DataObject) -> None:
        rank = data.draw(st.sampled_from(sorted(set(self.ticks) - self.dead)))
        self.dead.add(rank)
        self.waiting.discard(rank)
        index = self.writing.pop(rank, None)
        if index is not None:
            self.shelf.void(rank, index)
        self._changed()

    @precondition(lambda self: self.dead)
    @rule()
    def restart_all(self) -> None:
        """All ranks go on from the newest committed generation, as after a crash."""
        newest = self.shelf.committed()
        tick = newest[0] if newest else -1
        for rank in self.ticks:
            index = self.writing.pop(rank, None)
            if index is not None:
                self.shelf.void(rank, index)
            self.shelf.forget_after(rank, tick)
            self.ticks[rank] = max(tick, 0)
        self.dead.clear()
        self.waiting.clear()
        assert self.shelf.committed() == newest
        self._changed()

    @precondition(lambda self: not self.pinned and self.shelf.committed())
    @rule()
    def pin(self) -> None:
        newest = self.shelf.committed()
        assert newest is not None
        held = self.shelf.members_of(newest[0])
        assert sorted(held) == sorted(self.ticks)
        self.pinned = [self.shelf.rank(rank).slots[index] for rank, index in held.items()]
        for slot in self.pinned:
            slot.pins += 1

    @precondition(lambda self: self.pinned)
    @rule()
    def unpin(self) -> None:
        for slot in self.pinned:
            slot.pins -= 1
        self.pinned = []
        self._changed()

    @precondition(lambda self: not self.dead)
    @rule()
    def keep_going(self) -> None:
        """With every rank alive and going on, whoever waits is granted sooner or later."""
        if self.pinned:
            self.unpin()
        for _ in range(4):
            for rank in sorted(self.writing):
                assert self.shelf.seal(rank, self.writing.pop(rank), self.ticks[rank])
                self._changed()
            if not self.waiting:
                break
            goal = max(self.ticks.values())
            for rank in self._idle():
                if self.ticks[rank] < goal:
                    self.ticks[rank] = goal
                    self.shelf.begin(rank, goal)
                    self.waiting.add(rank)
            self._changed()
        assert not self.waiting, f"ranks {self.waiting} wait for ever: {self.shelf.ranks}"

    @invariant()
    def at_most_two_segments(self) -> None:
        for shelf in self.shelf.ranks.values():
            pinned = any(slot.pins for slot in shelf.slots.values())
            assert len(shelf.slots) <= Shelf.BUFFERS + pinned

    @invariant()
    def the_newest_generation_only_grows(self) -> None:
        now = self.shelf.committed()
        if self.safe is not None:
            assert now is not None, "a committed generation was lost"
            assert now[0] >= self.safe[0], "a committed generation was lost"
        self.safe = now


TestShelf = ShelfMachine.TestCase
TestShelf.settings = settings(
    max_examples=120, stateful_step_count=60, deadline=None, derandomize=True
)


def sealed(shelf: Shelf, rank: int, tick: int, size: int = 100) -> int:
    """Rank ``rank`` writes and seals ``tick``."""
    shelf.begin(rank, tick)
    index, surplus, create = shelf.grant(rank, size)
    assert not surplus
    if index is None:
        assert create
        index = shelf.add(rank, size)
    shelf.write(rank, index, tick, tick)
    assert shelf.seal(rank, index, tick)
    return index


def test_a_generation_counts_once_all_members_have_it() -> None:
    shelf = Shelf(2)
    sealed(shelf, 0, 1)
    assert shelf.committed() is None
    sealed(shelf, 1, 1)
    assert shelf.committed() == (1, 1)
    assert shelf.committed(below=1) is None


def test_two_ticks_of_the_same_number_but_other_steps_are_no_generation() -> None:
    shelf = Shelf(2)
    for rank, step in ((0, 7), (1, 8)):
        shelf.begin(rank, 1)
        index = shelf.add(rank, 100)
        shelf.write(rank, index, 1, step)
        shelf.seal(rank, index, 1)
    assert shelf.committed() is None


def test_a_rank_waits_while_its_other_buffer_may_still_become_the_committed_one() -> None:
    shelf = Shelf(2)
    for rank in (0, 1):
        sealed(shelf, rank, 1)
    sealed(shelf, 0, 2)
    shelf.begin(0, 3)
    assert shelf.grant(0, 100) == (None, [], False)
    shelf.drop(1, 2)  # the other one gives up on it: it can never be committed
    assert shelf.grant(0, 100)[0] is not None


def test_a_closed_shelf_wants_the_newest_generation_alone() -> None:
    shelf = Shelf(2)
    for rank in (0, 1):
        sealed(shelf, rank, 1)
    newest = [sealed(shelf, rank, 2) for rank in (0, 1)]
    never = sealed(shelf, 0, 3)  # rank 1 stops before it
    assert shelf.surplus(0) == []
    shelf.closed = True
    read = shelf.rank(1).slots[0]
    read.pins += 1
    assert (shelf.surplus(0), shelf.surplus(1)) == ([never], [])
    read.pins -= 1
    assert shelf.surplus(1) == [0]
    assert shelf.members_of(2) == dict(enumerate(newest))


def test_what_was_not_granted_is_not_sealed() -> None:
    shelf = Shelf(1)
    index = sealed(shelf, 0, 1)
    assert not shelf.seal(0, index, 1)
    assert not shelf.seal(0, 99, 1)
    shelf.begin(0, 2)
    other = shelf.add(0, 100)
    shelf.write(0, other, 2, 2)
    assert not shelf.seal(0, other, 3)
    assert shelf.seal(0, other, 2)


def test_resuming_from_an_older_one_voids_what_is_newer_though_it_is_being_read() -> None:
    shelf = Shelf(1)
    sealed(shelf, 0, 1)
    newer = sealed(shelf, 0, 2)
    slot = shelf.rank(0).slots[newer]
    slot.pins += 1
    assert shelf.forget_after(0, 1) == [newer]
    assert shelf.committed() == (1, 1)
    shelf.begin(0, 2)
    assert shelf.grant(0, 100) == (None, [], True)  # a third one, while that is read
    slot.pins -= 1
    assert shelf.grant(0, 100)[0] == newer


def test_segments_of_another_size_are_given_back() -> None:
    shelf = Shelf(1)
    old = sealed(shelf, 0, 1)
    sealed(shelf, 0, 2)
    shelf.begin(0, 3)
    assert shelf.grant(0, 200) == (None, [old], True)
