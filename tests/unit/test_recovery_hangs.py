from __future__ import annotations

import math

import pytest

from mnemo.recovery.control import Doing, InGroup
from mnemo.recovery.hangs import Hang, Vigil

WORLD = tuple(range(4))


def doing(tick: int, asked: int, ended: int, *, messages: int = 0) -> Doing:
    return Doing(0, tick, {"world": InGroup(WORLD, asked, ended)}, messages)


def waits(tick: int = 4, at: int = 7) -> Doing:
    return doing(tick, at + 1, at)


def works(tick: int = 4, at: int = 7) -> Doing:
    return doing(tick, at, at)


class Ranks:
    """What they answer, every half a second."""

    def __init__(self, vigil: Vigil, ranks: int = 4) -> None:
        self.vigil = vigil
        self.now = 100.0
        vigil.begin(range(ranks), self.now)

    def answer(self, seconds: float, *said: Doing | None) -> Hang | None:
        end = self.now + seconds
        while self.now < end:
            self.now += 0.5
            for rank, each in enumerate(said):
                if each is not None:
                    self.vigil.hear(rank, each, self.now)
        return self.vigil.find(self.now)

    def step(self, seconds: float, first: int, count: int = 4) -> None:
        """Steps of that many seconds."""
        for number in range(first, first + count):
            self.answer(seconds, *[works(2 * number, number)] * 4)


def test_the_one_that_all_others_wait_for_hangs_beyond_the_limit() -> None:
    ranks = Ranks(Vigil(10))
    said = waits(), waits(), works(), waits()
    ranks.answer(0.5, *[works()] * 4)
    assert ranks.answer(10, *said) is None  # the others have come half a second later
    assert ranks.answer(1, *said) == Hang((2,), 11.5, 10)


def test_who_moves_does_not_hang() -> None:
    ranks = Ranks(Vigil(10))
    for number in range(20):
        moving = doing(4, 7, 7, messages=number)
        assert ranks.answer(5, waits(), waits(), moving, waits()) is None


@pytest.mark.parametrize(
    "said",
    [
        (works(), works(), works(), works()),  # all do something slow
        (waits(), works(), works(), waits()),  # two of them
        (waits(), waits(), waits(), waits()),  # all have asked
    ],
)
def test_it_is_not_one_rank(said: tuple[Doing, ...]) -> None:
    ranks = Ranks(Vigil(10))
    assert ranks.answer(10, *said) is None
    assert ranks.answer(0.5, *said) == Hang((), 10.5, 10)


def test_who_waits_for_somebody_who_waits() -> None:
    """Of a mesh: 0 and 1 share a group, 1 and 2 another one."""

    def member(first: InGroup | None, second: InGroup | None) -> Doing:
        groups = {"first": first, "second": second}
        return Doing(0, 4, {name: group for name, group in groups.items() if group})

    ranks = Ranks(Vigil(10), 3)
    said = (
        member(InGroup((0, 1), 8, 7), None),
        member(InGroup((0, 1), 7, 7), InGroup((1, 2), 5, 4)),
        member(None, InGroup((1, 2), 4, 4)),
    )
    assert ranks.answer(10.5, *said) == Hang((2,), 10.5, 10)
    crossed = (
        member(InGroup((0, 1), 8, 7), InGroup((0, 1), 4, 4)),
        member(InGroup((0, 1), 7, 7), InGroup((0, 1), 5, 4)),
    )
    ranks = Ranks(Vigil(10), 2)
    assert ranks.answer(10.5, *crossed) == Hang((), 10.5, 10)


def test_who_answers_nothing_hangs_if_somebody_waits() -> None:
    ranks = Ranks(Vigil(10))
    ranks.answer(0.5, works(), waits(), works(), works())
    assert ranks.answer(11, works(), None, works(), works()) is None
    found = ranks.answer(0.5, waits(), None, works(), works())
    assert found is not None
    assert found.ranks == (1,)


def test_who_answers_again_has_the_whole_limit() -> None:
    ranks = Ranks(Vigil(10))
    ranks.answer(0.5, *[works()] * 4)
    assert ranks.answer(9.5, waits(), None, waits(), waits()) is None
    said = waits(), works(), waits(), waits()
    assert ranks.answer(9.5, *said) is None
    found = ranks.answer(1, *said)
    assert found is not None
    assert found.ranks == (1,)


def test_also_two_of_them() -> None:
    ranks = Ranks(Vigil(10))
    ranks.answer(0.5, *[works()] * 4)
    found = ranks.answer(11, waits(), None, None, waits())
    assert found is not None
    assert found.ranks == (1, 2)


def test_if_nobody_answers_it_is_nobody() -> None:
    ranks = Ranks(Vigil(10))
    ranks.answer(0.5, *[waits()] * 4)
    assert ranks.answer(100, None, None, None, None) is None


def test_who_has_never_answered_hangs_as_well() -> None:
    ranks = Ranks(Vigil(10))
    said = waits(), waits(), None, waits()
    assert ranks.answer(10, *said) is None
    found = ranks.answer(0.5, *said)
    assert found is not None
    assert found.ranks == (2,)


def test_time_in_which_nobody_watched_does_not_count() -> None:
    ranks = Ranks(Vigil(10))
    said = waits(), waits(), works(), waits()
    ranks.answer(9, *said)
    ranks.now += 1000
    ranks.vigil.slept(1000)
    assert ranks.answer(0.5, *said) is None
    assert ranks.answer(2, *said) is not None


def test_what_somebody_looks_at_does_not_hang() -> None:
    ranks = Ranks(Vigil(10))
    said = waits(), waits(), works(), waits()
    for _ in range(20):
        assert ranks.answer(6, *said) is None
        ranks.vigil.excuse(2, ranks.now)


def test_off() -> None:
    assert Ranks(Vigil(math.inf)).answer(1000, waits(), waits(), works(), waits()) is None


def test_the_limit_follows_from_steps() -> None:
    ranks = Ranks(Vigil(None))
    assert ranks.vigil.limit == 300  # nothing is known of them yet
    ranks.step(0.5, 1, 4)
    assert ranks.vigil.limit == 30
    ranks.step(8, 5, 1)
    assert ranks.vigil.limit == 30  # as one takes in which something else is done, too
    ranks.step(8, 6, 9)
    assert ranks.vigil.limit == 80
    ranks.step(1, 15, 30)
    assert ranks.vigil.limit == 30  # the slow ones are long ago


@pytest.mark.parametrize("stopped", [True, False])
def test_also_in_the_first_step_of_a_life(stopped: bool) -> None:
    """Before anything is measured, and where steps are so long that nothing is for hours."""
    ranks = Ranks(Vigil(None))
    ranks.answer(0.5, *[works()] * 4)
    said = waits(), waits(), None if stopped else works(), waits()
    assert ranks.answer(299, *said) is None
    found = ranks.answer(2, *said)
    assert found is not None
    assert (found.ranks, found.limit_s) == ((2,), 300)


def test_the_limit_follows_from_pauses_that_ended() -> None:
    """A checkpoint on one rank, while the others wait."""
    ranks = Ranks(Vigil(None))
    ranks.step(1, 1)
    assert ranks.answer(25, works(6, 3), waits(6, 3), waits(6, 3), waits(6, 3)) is None
    ranks.answer(1, *[works(6, 4)] * 4)
    assert ranks.vigil.limit == pytest.approx(78, abs=3)
    ranks.step(1, 4, 30)
    assert ranks.vigil.limit == pytest.approx(78, abs=3)


def test_to_be_stopped_for_a_while_is_no_pause() -> None:
    ranks = Ranks(Vigil(None))
    ranks.step(1, 1)
    ranks.answer(25, None, waits(6, 3), waits(6, 3), waits(6, 3))
    ranks.answer(1, *[works(6, 4)] * 4)
    assert ranks.vigil.limit == 30


def test_who_works_gets_ten_times_as_long() -> None:
    ranks = Ranks(Vigil(None))
    ranks.step(1, 1)
    said = works(6, 3), waits(6, 3), waits(6, 3), waits(6, 3)
    for _ in range(29):
        assert ranks.answer(10, *said) is None
        ranks.vigil.works(0, ranks.now)
    found = ranks.answer(15, *said)
    assert found is not None
    assert (found.ranks, found.limit_s) == ((0,), 30)


def test_who_stops_working_does_not() -> None:
    ranks = Ranks(Vigil(None))
    ranks.step(1, 1)
    said = works(6, 3), waits(6, 3), waits(6, 3), waits(6, 3)
    ranks.answer(20, *said)
    ranks.vigil.works(0, ranks.now)
    assert ranks.answer(29, *said) is None
    assert ranks.answer(2, *said) is not None


def test_at_the_same_boundary_the_next_one_gets_longer() -> None:
    ranks = Ranks(Vigil(None))
    ranks.step(1, 1)
    said = works(6, 3), waits(6, 3), waits(6, 3), waits(6, 3)
    assert ranks.answer(32, *said) is not None
    ranks.vigil.condemn(0)
    ranks.vigil.begin(range(4), ranks.now)
    assert ranks.answer(88, *said) is None
    assert ranks.answer(5, *said) is not None
    ranks.vigil.begin(range(4), ranks.now)
    ranks.step(1, 8)
    assert ranks.vigil.limit == 30
