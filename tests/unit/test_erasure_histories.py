"""Fragments through histories of losses and repairs, each by another engine."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from mnemo.erasure import Code, CodeKind, codec
from mnemo.erasure.engines import ENGINES
from mnemo.errors import TooFewFragmentsError

if TYPE_CHECKING:
    from mnemo.erasure.engines.base import Fragment

CODES = st.builds(Code, st.just(CodeKind.REED_SOLOMON), st.integers(1, 9), st.integers(1, 5))
XORS = st.builds(Code, st.just(CodeKind.XOR), st.integers(1, 9), st.just(1))
BY = st.sampled_from(list(ENGINES))
LENGTHS = st.one_of(st.integers(1, 100), st.sampled_from([4095, 70_001, 131_073]))


class Group(RuleBasedStateMachine):
    """One group's memory: what is in it is right, whatever was lost and rebuilt before."""

    @initialize(code=CODES | XORS, length=LENGTHS, seed=st.integers(0, 2**32 - 1), by=BY)
    def start(self, code: Code, length: int, seed: int, by: str) -> None:
        self.code = code
        self.random = np.random.default_rng(seed)
        self.length = length
        self.right: list[Fragment] = []
        self.there: dict[int, Fragment] = {}
        self.new_state(by)

    @rule(by=BY)
    def new_state(self, by: str) -> None:
        data = list(self.random.integers(0, 256, (self.code.k, self.length), np.uint8))
        parities = [self._room() for _ in range(self.code.m)]
        codec(self.code, by).encode(data, parities)
        self.right = [fragment.copy() for fragment in (*data, *parities)]
        self.there = dict(enumerate([*data, *parities]))

    def _room(self) -> Fragment:
        """Memory at any address, with anything in it."""
        skew = int(self.random.integers(0, 64))
        return self.random.integers(0, 256, self.length + skew, np.uint8)[skew:]

    @precondition(lambda self: self.there)
    @rule(choice=st.data())
    def lose(self, choice: st.DataObject) -> None:
        del self.there[choice.draw(st.sampled_from(sorted(self.there)), label="lost")]

    @precondition(lambda self: len(self.there) < self.code.n)
    @rule(choice=st.data(), by=BY)
    def rebuild(self, choice: st.DataObject, by: str) -> None:
        missing = [number for number in range(self.code.n) if number not in self.there]
        want = choice.draw(
            st.lists(st.sampled_from(missing), unique=True, min_size=1), label="wanted"
        )
        out = {number: self._room() for number in want}
        before = {number: fragment.copy() for number, fragment in out.items()}
        if len(self.there) >= self.code.k:
            codec(self.code, by).reconstruct(self.there, out)
            self.there.update(out)
        else:
            with pytest.raises(TooFewFragmentsError):
                codec(self.code, by).reconstruct(self.there, out)
            assert all(np.array_equal(out[number], before[number]) for number in want)

    @invariant()
    def what_is_there_is_right(self) -> None:
        for number, fragment in self.there.items():
            assert np.array_equal(fragment, self.right[number]), number


TestHistories = Group.TestCase
TestHistories.settings = settings(max_examples=150, stateful_step_count=20, deadline=None)
