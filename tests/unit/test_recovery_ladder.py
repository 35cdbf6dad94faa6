from __future__ import annotations

from itertools import chain, combinations

import pytest

from mnemo.recovery import Inventory, Policy, RecoveryPlan, Rung, plan
from mnemo.recovery.classes import Failure, Kind

KILLED = Failure(Kind.PEER_LOST, "killed by SIGKILL")
ALL = frozenset(range(4))
MEMORY, PARITY, STORAGE = Rung.SNAPSHOT, Rung.PARITY, Rung.CHECKPOINT


def of(*lost: int, **what: object) -> Inventory:
    """Four ranks that can be replaced, some of which were killed."""
    found = {"lost": dict.fromkeys(lost, KILLED), "ready": ALL, **what}
    return Inventory(ranks=4, **found)  # type: ignore[arg-type]


def test_who_is_lost_gets_what_the_others_hold() -> None:
    expected = RecoveryPlan(rung=Rung.REPLICA, sources=(0, 3))
    assert plan(of(1, 2), Policy()) == expected


def test_a_link_alone_costs_nobody_anything() -> None:
    assert plan(of(), Policy()) == RecoveryPlan(rung=Rung.RETRY, sources=(0, 1, 2, 3))


@pytest.mark.parametrize(
    ("inventory", "policy", "why_not"),
    [
        (of(1, ready=frozenset({0, 1, 2})), Policy(), "not all ranks can be replaced"),
        (of(*ALL), Policy(), "no rank is left that has the state"),
        (of(1), Policy(again=False), "it has happened too often"),
        (
            of(1, ended_in_place=[KILLED, Failure(Kind.EXCEPTION, "exited with code 3")]),
            Policy(most_in_place=2),
            "what came in its place exited with code 3",
        ),
        (
            of(lost={2: Failure(Kind.LEFT, "exited with code 0")}),
            Policy(),
            "rank 2 exited with code 0",
        ),
    ],
)
def test_else_all_restart_and_it_is_said_why(
    inventory: Inventory, policy: Policy, why_not: str
) -> None:
    assert plan(inventory, policy) == RecoveryPlan(rung=MEMORY, why_not=why_not)


def test_one_may_end_in_a_lost_ones_place() -> None:
    assert plan(of(1, ended_in_place=[KILLED]), Policy(most_in_place=2)).rung is Rung.REPLICA


@pytest.mark.parametrize(
    ("kind", "rung"), [(Kind.PREEMPTION, Rung.LEAVE), (Kind.REFUSAL, Rung.STOP)]
)
def test_where_nothing_helps_all_end(kind: Kind, rung: Rung) -> None:
    lost = {0: KILLED, 2: Failure(kind, "said so")}
    decided = plan(of(lost=lost, generations={MEMORY: 8}), Policy())
    assert decided == RecoveryPlan(rung=rung, why_not="rank 2 said so")


@pytest.mark.parametrize(
    ("generations", "rung", "number"),
    [
        ({MEMORY: 8, STORAGE: 8}, MEMORY, 8),
        ({MEMORY: 6, PARITY: 8, STORAGE: 8}, PARITY, 8),
        ({MEMORY: 6, STORAGE: 8}, STORAGE, 8),
        ({STORAGE: 0}, STORAGE, 0),
        ({}, Rung.LEAVE, None),
    ],
)
def test_the_newest_generation_and_of_those_what_is_nearest(
    generations: dict[Rung, int], rung: Rung, number: int | None
) -> None:
    decided = plan(of(1, ready=frozenset(), generations=generations), Policy())
    assert (decided.rung, decided.generation) == (rung, number)


def test_the_lost_are_never_the_source_and_somebody_always_is() -> None:
    for lost in chain.from_iterable(combinations(range(4), n) for n in range(1, 5)):
        decided = plan(of(*lost), Policy())
        assert not set(decided.sources) & set(lost)
        assert bool(decided.sources) == (decided.rung is Rung.REPLICA) == (len(lost) < 4)
