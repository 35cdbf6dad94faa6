"""The ladder: by which rung a loss is recovered, as a pure function of who has what.

Rungs are ordered by the work that is lost. What stands in the way of a higher one is said.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from mnemo.recovery.classes import Failure


class Rung(str, Enum):
    """What is done, the best first."""

    RETRY = "retry"
    """Nobody is lost: what was under way is done again over new links."""
    REPLICA = "replica"
    """Another process takes a lost rank's place, and gets what the others still hold."""
    SNAPSHOT = "snapshot"
    """All ranks restart from the memory of the snapshot process."""
    PARITY = "parity"
    """The same, with what lost nodes held, rebuilt from parities."""
    CHECKPOINT = "checkpoint"
    """All ranks restart from storage."""
    LEAVE = "leave"
    """All ranks end: the state is saved, or cannot be; another launch may go on."""
    STOP = "stop"
    """Nothing: it would end the same way."""


_RESTARTS: Final = (Rung.SNAPSHOT, Rung.PARITY, Rung.CHECKPOINT)
"""All ranks start again, from a generation of the state."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Inventory:
    """What there is when a process has ended, or a link has.

    Attributes:
        ranks: World size.
        lost: The ranks whose state has gone with their process, and what ended each.
        ready: Ranks that have said that they hold what all hold alike, and can wait; also lost
            ones that had said so.
        ended_in_place: What ended processes that had come in lost ones' places, before they had the
            state.
        generations: The newest generation of the state, by its number, for each rung that has one;
            None as long as nobody has looked.
    """

    ranks: int
    lost: Mapping[int, Failure]
    ready: frozenset[int] = frozenset()
    ended_in_place: Sequence[Failure] = ()
    generations: Mapping[Rung, int] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Policy:
    """What may be done.

    Attributes:
        most_in_place: So many processes may come in a lost rank's place, one after the other.
        again: There may be another loss; else it has happened too often.
    """

    most_in_place: int = 2
    again: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class RecoveryPlan:
    """What is done.

    Attributes:
        rung: How.
        sources: Ranks whose state the lost ones may be given.
        generation: The number of that which all ranks begin with; None where it is not needed, or
            yet to be found.
        why_not: What is in the way of going on without a restart; empty where that is done.
    """

    rung: Rung
    sources: tuple[int, ...] = ()
    generation: int | None = None
    why_not: str = ""


def plan(inventory: Inventory, policy: Policy) -> RecoveryPlan:
    """The rung that loses least of those that can be taken."""
    why_not = _why_not_replaced(inventory, policy)
    if not why_not:
        rung = Rung.REPLICA if inventory.lost else Rung.RETRY
        return RecoveryPlan(rung=rung, sources=_left(inventory))
    for failure in inventory.lost.values():
        if failure.rung in (Rung.LEAVE, Rung.STOP):
            return RecoveryPlan(rung=failure.rung, why_not=why_not)
    found = inventory.generations
    if found is None:
        return RecoveryPlan(rung=Rung.SNAPSHOT, why_not=why_not)
    there = [rung for rung in _RESTARTS if rung in found]
    if not there:
        return RecoveryPlan(rung=Rung.LEAVE, why_not=why_not)
    rung = max(there, key=lambda rung: found[rung])  # the first of those that are as new
    return RecoveryPlan(rung=rung, generation=found[rung], why_not=why_not)


def _left(inventory: Inventory) -> tuple[int, ...]:
    return tuple(sorted(inventory.ready - inventory.lost.keys()))


def _why_not_replaced(inventory: Inventory, policy: Policy) -> str:
    if len(inventory.ready) < inventory.ranks:
        return "not all ranks can be replaced"
    if not _left(inventory):
        return "no rank is left that has the state"
    for rank, failure in sorted(inventory.lost.items()):
        if failure.rung is not Rung.REPLICA:
            return f"rank {rank} {failure.words}"
    if len(inventory.ended_in_place) >= policy.most_in_place:
        return f"what came in its place {inventory.ended_in_place[-1].words}"
    return "" if policy.again else "it has happened too often"
