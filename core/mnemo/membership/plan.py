"""Who decides, who acts, and who takes which place: functions without state."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

from mnemo.membership.records import KEEPS, Epoch, Member


def is_quorum(epoch: Epoch, keys: Iterable[str], lost: Collection[str] = ()) -> bool:
    """Whether ``keys`` decide what follows ``epoch``.

    More than half of its members do, and exactly half if its anchor is among them: any two such
    sets have a member in common. All that the operator has not confirmed to be lost do as well;
    what that means is in ``docs/membership.md``.
    """
    present = set(keys)
    there = sum(member.key in present for member in epoch.members)
    if 2 * there + (epoch.anchor in present) > len(epoch.members):
        return True
    left = [member for member in epoch.members if member.key not in lost]
    return 0 < len(left) == len([m for m in left if m.key in present]) < len(epoch.members)


def echo_of_quorum(epoch: Epoch, echoes: Mapping[str, int], lost: Collection[str]) -> int:
    """The newest round that a quorum of ``epoch`` has read; 0 if there is none."""
    for echo in sorted({echoes.get(member.key, 0) for member in epoch.members}, reverse=True):
        if is_quorum(epoch, (key for key, has in echoes.items() if has >= echo), lost):
            return echo
    return 0


def anchor_of(members: Iterable[Member], place: str) -> str:
    """The key of the member that hosts the Store at ``place``; empty if none does."""
    return next((member.key for member in members if place and member.store == place), "")


def heirs(epoch: Epoch, host: str) -> tuple[Member, ...]:
    """Who would host a Store after the one at ``host``, first the next in the list after it."""
    places = [member.store for member in epoch.members]
    at = places.index(host) + 1 if host in places else 0
    turned = epoch.members[at:] + epoch.members[:at]
    return tuple(member for member in turned if member.store)


def successors(
    epoch: Epoch | None, living: Sequence[Member], nodes: int
) -> tuple[Member, ...] | None:
    """The members of the next epoch; None if there are not enough.

    Whoever was a member and lives keeps its node rank. A free place goes to an agent on the same
    node if there is one, else to whoever joined first, if it has as many ranks. Where none of them
    lives, the run is launched (again), and whoever keeps the state of ranks has their place.

    Args:
        epoch: The one before; None at the start of a run.
        living: All nodes that could be members, in the order in which they joined.
        nodes: How many are needed.
    """
    alive = {member.key for member in living}
    if epoch is None or is_launch(epoch, alive):
        return _first_members(living, nodes)
    members = {member.key for member in epoch.members}
    spares = [member for member in living if member.key not in members]
    gone = [member for member in epoch.members if member.key not in alive]
    chosen: dict[str, Member] = {}
    for same_node in (True, False):
        for member in gone:
            fits = (s for s in spares if s.ranks == member.ranks)
            spare = next((s for s in fits if not same_node or s.node == member.node), None)
            if member.key not in chosen and spare is not None:
                chosen[member.key] = spare
                spares.remove(spare)
    if len(chosen) < len(gone):
        return None
    return tuple(chosen.get(member.key, member) for member in epoch.members)


def is_launch(epoch: Epoch | None, keys: Collection[str]) -> bool:
    """Whether none of ``epoch`` is among ``keys``: those begin a run, or go on with one."""
    return epoch is None or all(member.key not in keys for member in epoch.members)


def awaits_more(living: Sequence[Member], nodes: int, spares: int) -> bool:
    """Whether somebody may be about to come who keeps state of ranks that nobody here keeps."""
    return len(living) < nodes + spares and len(_kept(living, nodes)) < nodes


def _first_members(living: Sequence[Member], nodes: int) -> tuple[Member, ...] | None:
    """Whoever keeps the state of ranks has their place again; others fill up the rest, by name."""
    places = _kept(living, nodes)
    kept = {member.key for member in places.values()}
    others = [member for member in living if member.key not in kept][: nodes - len(kept)]
    if len(kept) + len(others) < nodes:
        return None
    rest = iter(sorted(others, key=lambda member: member.node))
    return tuple(places[place] if place in places else next(rest) for place in range(nodes))


def _kept(living: Sequence[Member], nodes: int) -> dict[int, Member]:
    """By place, who keeps the state of its ranks."""
    uniform = len({member.ranks for member in living}) == 1
    places: dict[int, Member] = {}
    for member in living:
        place = _keeps(member) // member.ranks
        if uniform and 0 <= place < nodes:
            places.setdefault(place, member)
    return places


def _keeps(member: Member) -> int:
    """The first rank whose state its node's memory has, from an earlier launch; -1 for none."""
    return next(
        (int(label[len(KEEPS) :]) for label in member.labels if label.startswith(KEEPS)), -1
    )
