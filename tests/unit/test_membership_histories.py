"""Membership through arbitrary histories of deaths, joins, cuts, pauses and late messages."""

from __future__ import annotations

import random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from membership_lab import ETCD, World

from mnemo.membership import Rules

NAMES = "abcdefgh"
BACK_S = 60.0
"""How long the job may take to come back once the network is whole and enough nodes are there."""


class Histories(RuleBasedStateMachine):
    """`World` asserts at every instant that one side goes on, and who belongs to it.

    What is asserted here is that the job comes back: whenever a quorum of what was decided lives,
    spares are there and messages arrive.
    """

    world: World

    @initialize(
        nodes=st.integers(2, 5),
        spares=st.integers(0, 2),
        arbiter=st.booleans(),
        seed=st.integers(0, 2**32),
    )
    def begin(self, nodes: int, spares: int, arbiter: bool, seed: int) -> None:
        rules = Rules(nodes=nodes, spares=spares, arbiter=arbiter, give_up_s=1e9)
        self.world = World(rules, random.Random(seed))
        for name in NAMES[: nodes + 1]:
            self.world.start(name)

    @rule(seconds=st.sampled_from([0.1, 0.4, 1.0, 3.0, 5.0, 8.0, 15.0]))
    def pass_time(self, seconds: float) -> None:
        self.world.run(seconds)

    @rule(seconds=st.sampled_from([0.4, 5.0]))
    def pass_more_time(self, seconds: float) -> None:
        self.world.run(seconds)

    @precondition(lambda self: len(self.world.living()) > 1)
    @rule(data=st.data())
    def lose_a_node(self, data: st.DataObject) -> None:
        self.world.kill(data.draw(st.sampled_from(self.world.living()), label="lost"))

    @precondition(lambda self: len(self.world.living()) < len(NAMES))
    @rule(data=st.data())
    def start_a_node(self, data: st.DataObject) -> None:
        free = sorted(set(NAMES) - {node.name for node in self.world.living()})
        self.world.start(data.draw(st.sampled_from(free), label="started"))

    @rule(side=st.sets(st.sampled_from([*NAMES, ETCD]), min_size=1), both=st.booleans())
    def part(self, side: set[str], both: bool) -> None:
        others = {*NAMES, ETCD} - side
        self.world.cuts |= {(one, other) for one in side for other in others}
        if both:
            self.world.cuts |= {(other, one) for one in side for other in others}

    @rule()
    def heal(self) -> None:
        self.world.cuts.clear()

    @rule(slowness=st.sampled_from([1.0, 5.0, 20.0, 40.0]))
    def slow(self, slowness: float) -> None:
        self.world.slowness = slowness

    @rule(name=st.sampled_from(NAMES), seconds=st.sampled_from([0.0, 0.1, 0.2, 0.4, 1.5]))
    def slow_a_link(self, name: str, seconds: float) -> None:
        self.world.latency[name] = seconds

    @precondition(lambda self: self.world.living())
    @rule(data=st.data(), seconds=st.sampled_from([0.5, 3.0, 6.0, 20.0]))
    def sleep(self, data: st.DataObject, seconds: float) -> None:
        node = data.draw(st.sampled_from(self.world.living()), label="asleep")
        self.world.sleep(node, seconds)

    @rule()
    def confirm_what_is_lost(self) -> None:
        """The operator vouches for the truth: who is dead, and that nothing was decided since."""
        newest = self.world.newest
        for node in self.world.living():
            if newest and node.machine.committed == newest:
                keys = {each.key for each in self.world.living()}
                for member in newest.members:
                    if member.key not in keys:
                        node.machine.confirm_lost(member.key)
                return

    @precondition(lambda self: self.world.can_decide())
    @rule()
    def come_back(self) -> None:
        self.world.cuts.clear()
        self.world.latency.clear()
        self.world.slowness = 0.1
        for name in NAMES:
            living = self.world.living()
            if len(living) > self.world.rules.nodes:
                break
            if all(node.name != name for node in living):
                self.world.start(name)
        assert self.world.run(BACK_S, until=self.world.is_running), "the job did not come back"


class TestHistories(Histories.TestCase):
    settings = settings(max_examples=120, stateful_step_count=30, deadline=None)


@pytest.mark.campaign
@pytest.mark.timeout(3600)
class TestManyHistories(Histories.TestCase):
    settings = settings(max_examples=5000, stateful_step_count=30, deadline=None, derandomize=False)
