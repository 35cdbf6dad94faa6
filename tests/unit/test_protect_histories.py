"""Several groups through arbitrary histories: words that arrive late, deaths, losses, restarts."""

from __future__ import annotations

import pytest
from groups_lab import World
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

SHAPES = [(1, 2, 1), (2, 1, 1), (2, 2, 1), (3, 1, 1), (2, 2, 2)]
"""Groups, data, parities."""


class Histories(RuleBasedStateMachine):
    """`World` says what is promised; it is asserted at every instant."""

    world: World

    def __init__(self) -> None:
        super().__init__()
        self._patch = pytest.MonkeyPatch()

    @initialize(shape=st.sampled_from(SHAPES))
    def begin(self, shape: tuple[int, int, int]) -> None:
        self.world = World(*shape, self._patch)
        self.go_on_all(commits=1)

    def one(self, data: st.DataObject) -> str:
        return data.draw(st.sampled_from([node.name for node in self.world.nodes]), label="node")

    def some(self, data: st.DataObject) -> set[str]:
        names = [node.name for node in self.world.nodes]
        return data.draw(st.sets(st.sampled_from(names)), label="nodes")

    @rule(commits=st.integers(1, 3))
    def go_on_all(self, commits: int) -> None:
        for _ in range(commits):
            self.world.commit()
            self.world.go_on()

    @rule(data=st.data())
    def commit(self, data: st.DataObject) -> None:
        self.world.commit(late=self.some(data))

    @rule()
    def all_begin_an_attempt(self) -> None:
        self.world.commit()
        self.world.go_on(stuck=[node.name for node in self.world.nodes])

    @rule(data=st.data())
    def some_are_stuck(self, data: st.DataObject) -> None:
        self.world.go_on(stuck=self.some(data))

    @rule(data=st.data())
    def some_are_deaf(self, data: st.DataObject) -> None:
        self.world.go_on(deaf=self.some(data))

    @rule(group=st.integers(0, 2), data=st.data())
    def a_group_goes_on(self, group: int, data: st.DataObject) -> None:
        found = self.world.groups[group % len(self.world.groups)]
        self.world.go_on({*found.nodes, *self.some(data)})

    @rule(data=st.data(), count=st.integers(1, 4))
    def words_to_the_leader_arrive(self, data: st.DataObject, count: int) -> None:
        node = self.world.node(self.one(data))
        for _ in range(count):
            node.say()

    @rule(data=st.data(), count=st.integers(1, 4))
    def words_of_the_leader_arrive(self, data: st.DataObject, count: int) -> None:
        node = self.world.node(self.one(data))
        for _ in range(count):
            node.listen()

    @rule(data=st.data(), well=st.booleans())
    def an_attempt_ends_somewhere(self, data: st.DataObject, well: bool) -> None:
        self.world.node(self.one(data)).finish(well=well)

    @rule(data=st.data())
    def a_connection_breaks(self, data: st.DataObject) -> None:
        node = self.world.node(self.one(data))
        if node.is_connected:
            node.hang_up()

    @rule(data=st.data())
    def a_connection_is_made_anew(self, data: st.DataObject) -> None:
        node = self.world.node(self.one(data))
        if not node.is_connected and node.name not in self.world.resuming:
            node.connect()

    @rule(data=st.data())
    def a_snapshot_process_dies_alone(self, data: st.DataObject) -> None:
        self.world.replace_process(self.one(data))

    @precondition(lambda self: self.world.protected >= 0 and any(self.world.losses()))
    @rule(data=st.data())
    def nodes_are_lost(self, data: st.DataObject) -> None:
        losses = sorted(self.world.losses(), key=sorted)
        self.world.lose(data.draw(st.sampled_from(losses), label="lost"))

    @rule(data=st.data())
    def some_resume(self, data: st.DataObject) -> None:
        for name in sorted(self.some(data)):
            self.world.resume(name)

    @rule()
    def all_resume(self) -> None:
        for name in list(self.world.resuming):
            self.world.resume(name)

    @precondition(lambda self: not self.world.resuming)
    @rule()
    def what_follows_is_protected(self) -> None:
        """Once all can hear each other, whatever was before."""
        for node in self.world.nodes:
            if not node.is_connected:
                node.connect()
        before = self.world.protected
        for _ in range(8):
            self.go_on_all(commits=1)
        assert self.world.protected > before

    @invariant()
    def holds(self) -> None:
        if hasattr(self, "world"):
            self.world.check()

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.world.close()
        self._patch.undo()


class TestHistories(Histories.TestCase):
    settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


@pytest.mark.campaign
@pytest.mark.timeout(3600)
class TestManyHistories(Histories.TestCase):
    settings = settings(max_examples=2000, stateful_step_count=50, deadline=None, derandomize=False)
