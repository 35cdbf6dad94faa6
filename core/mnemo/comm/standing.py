"""Where the members of a group stand, and whether they can go on together: a pure decision."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from mnemo.errors import ReplayError

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence


class Belonging(msgspec.Struct, frozen=True):
    """What a member says of a group first.

    Attributes:
        ranks: Of the group.
        built: Membership epoch of its communicator.
        held: It broke, or lost a member.
    """

    ranks: list[int]
    built: int
    held: bool


class First(msgspec.Struct, frozen=True):
    """What a rank says first.

    Attributes:
        groups: By name.
        joins: The boundary at which it begins, if it is new.
        whole: It has the state of that boundary, whatever has become of the others'.
    """

    groups: dict[str, Belonging]
    joins: int | None
    whole: bool = False


class Standing(msgspec.Struct, frozen=True):
    """Where a member that was there before stands in a group.

    Attributes:
        known: Place of the first operation whose result it has not.
        first: It has all results from here on.
        marks: Place of the next operation, and number of messages, at each boundary it may go back
            to.
        messages: Asked for until now.
        pending: Something waits that cannot be run again.
    """

    known: int
    first: int
    marks: dict[int, tuple[int, int]]
    messages: int
    pending: bool


class Second(msgspec.Struct, frozen=True):
    """What a rank says second.

    Attributes:
        standings: In each group that gets new links; none of one that joins.
        updating: Tick of the boundary before the last update that it has begun, and the place of
            the world's barrier there.
        broken: Why it cannot go on, whatever the others say.
    """

    standings: dict[str, Standing]
    updating: tuple[int, int] | None
    broken: str | None


class Plan(msgspec.Struct, frozen=True):
    """How a group goes on.

    Attributes:
        source: Global rank of the one that gives results; None if there are none to be given.
        end: Place up to which results are known.
        begins: Where each member that joins begins, its boundary and place.
        needs: From where on each member is given results.
    """

    source: int | None
    end: int
    begins: dict[int, tuple[int, int]]
    needs: dict[int, int]


def touched(said: Sequence[First], members: Sequence[int]) -> dict[str, list[int]]:
    """Groups that get new links, with their ranks.

    Raises:
        ReplayError: A member does not know one of them.
    """
    found: dict[str, list[int]] = {}
    for each in said:
        for name, belonging in each.groups.items():
            ranks = belonging.ranks
            known = [said[rank].groups.get(name) for rank in ranks]
            there = [one for one in known if one is not None]
            if (
                any(said[rank].joins is not None for rank in ranks)
                or any(one.held for one in there)
                or min(one.built for one in there) < max(members[rank] for rank in ranks)
                or len({one.built for one in there}) > 1
            ):
                if len(there) < len(known):
                    absent = [rank for rank, one in zip(ranks, known, strict=True) if one is None]
                    msg = f"ranks {absent} have no group {name!r} of ranks {ranks}"
                    raise ReplayError(msg)
                found[name] = ranks
    return found


def plan(
    name: str, ranks: Sequence[int], said: Mapping[int, Standing], joining: Mapping[int, int]
) -> Plan:
    """How one group goes on.

    Args:
        name: Of the group.
        ranks: Its members.
        said: Where those stand that were there before.
        joining: The boundary of each that was not.

    Raises:
        ReplayError: It cannot.
    """

    def cannot(why: str) -> ReplayError:
        return ReplayError(f"group {name!r} of ranks {list(ranks)}: {why}")

    if not said:
        if len(set(joining.values())) > 1:
            raise cannot("all of its members are lost, at different boundaries")
        return Plan(None, 0, {rank: (tick, 0) for rank, tick in joining.items()}, {})
    for rank, each in said.items():
        since = min(joining.values(), default=max(each.marks, default=-1))
        if each.messages != _messages_at(each, since):
            raise cannot(f"rank {rank} asked for messages since the boundary: they are not kept")
        if each.pending:
            raise cannot(f"rank {rank} waits for an operation that cannot be run twice")
    end = max(each.known for each in said.values())
    begins = {}
    for rank, tick in joining.items():
        places = {each.marks[tick][0] for each in said.values() if tick in each.marks}
        if len(places) != 1:
            why = "not all at the same operation" if places else "none"
            raise cannot(f"of the ranks that are left {why} reached boundary {tick} of rank {rank}")
        begins[rank] = (tick, places.pop())
        if begins[rank][1] > end:
            raise cannot(f"an operation from before boundary {tick} of rank {rank} has not ended")
    needs = {rank: each.known for rank, each in said.items() if each.known < end}
    needs |= {rank: place for rank, (_, place) in begins.items() if place < end}
    if not needs:
        return Plan(None, end, begins, {})
    source = min(rank for rank, each in said.items() if each.known == end)
    if said[source].first > min(needs.values()):
        raise cannot(
            f"rank {source} has no results of operations {min(needs.values())} to "
            f"{said[source].first - 1}: those that differ by rank, that were too long, or that all "
            f"had passed are not kept"
        )
    return Plan(source, end, begins, needs)


def _messages_at(standing: Standing, tick: int) -> int:
    """How many there were at this boundary, or at its last one if it has not got there."""
    if not standing.marks:
        return 0
    return standing.marks[tick if tick in standing.marks else max(standing.marks)][1]


def plan_all(
    ranks: Mapping[str, Sequence[int]],
    said: Mapping[int, Second],
    joining: Mapping[int, int],
    whole: Collection[int] = (),
) -> dict[str, Plan]:
    """How each of these groups goes on, decided alike by all ranks.

    Args:
        ranks: Of each group, by its name.
        said: By all ranks.
        joining: The boundary of each rank that is new.
        whole: Those of them that have its state.

    Raises:
        ReplayError: One of them cannot.
    """
    for rank, each in said.items():
        if each.broken is not None:
            msg = f"rank {rank} cannot go on: {each.broken}"
            raise ReplayError(msg)
    plans = {}
    for name, members in ranks.items():
        old = {rank: said[rank].standings[name] for rank in members if rank not in joining}
        plans[name] = plan(name, members, old, {r: t for r, t in joining.items() if r in members})
        if len(members) == len(said):
            need = {rank: tick for rank, tick in joining.items() if rank not in whole}
            _see_that_none_updates(said, plans[name].end, need)
    return plans


def _see_that_none_updates(
    said: Mapping[int, Second], world_end: int, joining: Mapping[int, int]
) -> None:
    for rank, each in said.items():
        for joiner, tick in joining.items():
            before, place = each.updating or (-1, world_end)
            if before >= tick and place < world_end:
                msg = (
                    f"rank {rank} has begun the update after boundary {tick}, where rank {joiner} "
                    f"begins"
                )
                raise ReplayError(msg)
