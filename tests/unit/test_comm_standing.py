"""How the members of a group go on, decided from what each of them says."""

from __future__ import annotations

import pytest

from mnemo.comm.standing import (
    Belonging,
    First,
    Plan,
    Second,
    Standing,
    plan,
    plan_all,
    touched,
)
from mnemo.errors import ReplayError

RANKS = [0, 1, 2]


def _at(known: int, *, first: int = 0, mark: int = 10, pending: bool = False) -> Standing:
    """One that reached boundary 4 at operation ``mark``."""
    return Standing(known, first, {4: (mark, 0)}, 0, pending)


def test_who_joins_is_given_all_that_anybody_has_from_its_boundary_on() -> None:
    made = plan("g", RANKS, {0: _at(12), 2: _at(15)}, {1: 4})
    assert made == Plan(source=2, end=15, begins={1: (4, 10)}, needs={0: 12, 1: 10})


def test_of_several_that_have_all_the_first_gives() -> None:
    assert plan("g", RANKS, {0: _at(12), 1: _at(15), 2: _at(15)}, {}).source == 1


def test_nothing_is_given_where_all_are_level() -> None:
    made = plan("g", RANKS, {0: _at(10), 2: _at(10)}, {1: 4})
    assert made == Plan(source=None, end=10, begins={1: (4, 10)}, needs={})


def test_one_that_reached_the_boundary_is_enough_to_know_where_it_is() -> None:
    behind = Standing(9, 0, {2: (3, 0)}, 0, pending=False)
    made = plan("g", RANKS, {0: behind, 2: _at(12)}, {1: 4})
    assert made == Plan(source=2, end=12, begins={1: (4, 10)}, needs={0: 9, 1: 10})


def test_a_group_that_was_lost_altogether_begins_anew() -> None:
    assert plan("g", [1, 2], {}, {1: 4, 2: 4}).begins == {1: (4, 0), 2: (4, 0)}
    with pytest.raises(ReplayError, match="at different boundaries"):
        plan("g", [1, 2], {}, {1: 4, 2: 6})


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ({0: _at(12), 2: _at(12, mark=11)}, "not all at the same operation reached boundary 4"),
        ({0: Standing(9, 0, {2: (3, 0)}, 0, pending=False)}, "none reached boundary 4 of rank 1"),
        ({0: _at(9), 2: _at(8)}, "an operation from before boundary 4 of rank 1 has not ended"),
        ({0: _at(15, first=11), 2: _at(12)}, "rank 0 has no results of operations 10 to 10"),
        ({0: _at(15), 2: _at(12, pending=True)}, "rank 2 waits for an operation that cannot"),
        ({0: Standing(12, 0, {4: (10, 0)}, 1, pending=False)}, "rank 0 asked for messages since"),
    ],
)
def test_what_cannot_be_replayed(said: dict[int, Standing], why: str) -> None:
    with pytest.raises(ReplayError, match=why):
        plan("g", RANKS, said, {1: 4})


def test_messages_from_before_the_boundary_do_not_matter() -> None:
    said = {0: Standing(12, 0, {4: (10, 7)}, 7, pending=False)}
    assert plan("g", [0, 1], said, {1: 4}).needs == {1: 10}


@pytest.mark.parametrize(
    ("tick", "place", "passes"), [(4, 11, True), (4, 12, False), (2, 9, False)]
)
def test_an_update_is_passed_once_anybody_has_the_barrier(
    tick: int, place: int, passes: bool
) -> None:
    said = {
        0: Second({"world": _at(12)}, (tick, place), None),
        1: Second({}, None, None),
        2: Second({"world": _at(10)}, (tick, place), None),
    }
    if not passes:
        assert plan_all({"world": RANKS}, said, {1: 4})["world"].end == 12
        return
    with pytest.raises(ReplayError, match="rank 0 has begun the update after boundary 4"):
        plan_all({"world": RANKS}, said, {1: 4})
    assert plan_all({"world": RANKS}, said, {1: 4}, whole={1})["world"].end == 12


def test_one_that_cannot_keeps_all_from_going_on() -> None:
    said = {0: Second({}, None, "it is out of order"), 1: Second({}, None, None)}
    with pytest.raises(ReplayError, match="rank 0 cannot go on: it is out of order"):
        plan_all({}, said, {})


def test_groups_that_get_new_links() -> None:
    def first(joins: int | None = None, **groups: Belonging) -> First:
        return First(groups, joins)

    def pair(ranks: list[int], built: int = 0, *, held: bool = False) -> Belonging:
        return Belonging(ranks, built, held)

    kept, lost, torn = pair([0, 1]), pair([1, 2]), pair([0, 1], held=True)
    said = [first(a=kept, c=torn), first(a=kept, b=lost, c=kept), first(4, b=lost)]
    assert touched(said, [0, 0, 1]) == {"b": [1, 2], "c": [0, 1]}
    half = [first(a=pair([0, 1], 1)), first(a=pair([0, 1], 0)), first()]
    assert touched(half, [0, 0, 0]) == {"a": [0, 1]}
    with pytest.raises(ReplayError, match=r"ranks \[2\] have no group 'b' of ranks \[1, 2\]"):
        touched([first(), first(b=lost), first(4)], [0, 0, 1])
