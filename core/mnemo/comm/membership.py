"""What becomes of a process's groups when ranks are lost, and when others take their places."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from mnemo.comm.c10d import PrefixStore
from mnemo.comm.group import Group, groups
from mnemo.comm.kept import boundary
from mnemo.comm.modes import mode
from mnemo.comm.replacing import Replacement
from mnemo.comm.waiting import PATIENCE, wait_for
from mnemo.errors import CommError

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from mnemo.comm.c10d import Store


@dataclass(frozen=True)
class Changes:
    """What `reconfigure` did in this process.

    Attributes:
        rebuilt: Names of the groups that have a new communicator.
        kept: Names of those that kept theirs.
    """

    rebuilt: frozenset[str]
    kept: frozenset[str]


def mark_broken(ranks: Collection[int], why: str) -> None:
    """End what is under way in all groups with one of these members, at once.

    From any thread. Whoever waits in them goes on within milliseconds: with `GroupBrokenError`, or,
    within backward, with poisoned results, of which `check` tells.

    Args:
        ranks: Global ranks.
        why: What happened to them, for messages.
    """
    for group in list(groups.values()):
        if not set(ranks).isdisjoint(group.ranks):
            group.mark_broken(why)


def give_up(why: str) -> None:
    """End what waits in groups that lost a member, as `mark_broken` does.

    Args:
        why: What happened, for messages.
    """
    for group in list(groups.values()):
        if group.held:
            group.mark_broken(why)


def mark(tick: int) -> None:
    """A step boundary: a process that takes this rank's place may begin here.

    Called by the thread that trains, on all ranks between the same operations, once all that such a
    process needs is kept somewhere. Results from before the last boundary that all have reached are
    let go. Without replacing of ranks this does nothing.

    Args:
        tick: Greater than all before.
    """
    if not mode.replaceable:
        return
    for group in list(groups.values()):
        group.mark(tick)
    boundary.latest = tick


def keep_nothing() -> None:
    """From here on no rank can be replaced: results are let go, and a loss breaks groups.

    Called by the thread that trains, on all ranks between the same operations.
    """
    mode.replaceable = False
    for group in list(groups.values()):
        group.kept = None


def pass_update(tick: int) -> None:
    """Wait until all ranks have come here; right before an optimizer changes what ranks share.

    Called by the thread that trains, on all ranks. Only the first update after a boundary waits.

    Args:
        tick: That of the last boundary.

    Raises:
        GroupBrokenError: A result may be poisoned, as of `check`.
    """
    world = dist.group.WORLD
    begun = boundary.updating is not None and boundary.updating[0] >= tick
    if mode.replaceable and isinstance(world, Group) and not begun:
        check()
        boundary.updating = (tick, world.asked)
        world.barrier().wait()
    check()


def check() -> None:
    """Raise if any result may be poisoned; to be called before a result changes the state.

    Raises:
        GroupBrokenError: A group of this process is broken.
    """
    for group in list(groups.values()):
        if group.broken is not None:
            raise group.broken.again()


def reconfigure(
    membership_epoch: int,
    members: Sequence[int],
    store: Store,
    joining: Mapping[int, int] | None = None,
    *,
    whole: bool = False,
) -> Changes:
    """Replace the communicators that have to be, and no others. Called by all ranks.

    Those of groups with a member that has come since they were made, and of those which saw a
    break. Group objects stay as they are. Nothing is connected before it is used.

    Where lost ranks can be replaced, what is under way goes on afterwards: what another member has
    the result of is given, the rest is run again. Otherwise it ends as broken, and groups whose
    members have asked for different numbers of operations get new communicators, too.

    Args:
        membership_epoch: Greater than all before.
        members: For each rank, the membership epoch since which its process is a member; 0 for
            those that were there at first.
        store: What all members reach. Keys are put below ``mnemo/<membership epoch>``.
        joining: The tick of the boundary at which each new process begins. A new process has to say
            its own; the others wait to reach those that they are told of.
        whole: This process is new, and has the state of its boundary from somewhere, so that it
            may begin there also when the others are behind the update that follows.

    Returns:
        What was done.

    Raises:
        CommError: A member did not take part in time, or ``members`` does not fit.
        ReplayError: What is under way cannot go on; on all members, and before any link is used.
        GroupBrokenError: Another rank was lost meanwhile; a later membership epoch may do it.
    """
    if len(members) != dist.get_world_size() or max(members) > membership_epoch:
        msg = (
            f"members {list(members)} do not fit a world of {dist.get_world_size()} ranks at "
            f"membership epoch {membership_epoch}: one epoch per rank, none of the future"
        )
        raise CommError(msg)
    here = PrefixStore(f"mnemo/{membership_epoch}", store)
    if mode.replaceable:
        new = Replacement(membership_epoch, members, here, joining or {}, whole=whole).run()
        return Changes(frozenset(new), frozenset(groups) - new)
    ours = list(groups.values())
    old = {group.key for group in ours if max(members[r] for r in group.ranks) > group.built}
    kept = [group for group in ours if group.key not in old]
    torn = _torn(kept, here)
    for group in ours:
        if group.key in old | torn:
            group.rebuild(PrefixStore(group.key, here), membership_epoch)
    return Changes(frozenset(old | torn), frozenset(g.key for g in kept) - torn)


def _torn(kept: list[Group], store: Store) -> set[str]:
    """Which of these have members that are not at one about what was done."""
    me = dist.get_rank()
    said = {group.key: _left(group) for group in kept}
    store.set(f"left/{me}", json.dumps(said))
    others = sorted({rank for group in kept for rank in group.ranks})
    keys = [f"left/{rank}" for rank in others]
    late = wait_for(store, keys, PATIENCE, lambda: False)
    if late:
        absent = [rank for rank, key in zip(others, keys, strict=True) if key in late]
        msg = f"ranks {absent} did not take part in the reconfiguration within {PATIENCE}"
        raise CommError(msg)
    answers = store.multi_get(keys) if others else []
    left = {rank: json.loads(answer) for rank, answer in zip(others, answers, strict=True)}
    return {g.key for g in kept if not _at_one([left[r].get(g.key) for r in g.ranks])}


def _left(group: Group) -> dict[str, Any]:
    return {
        "broken": group.broken is not None,
        "asked": group.asked,
        "sent": group.sent,
        "received": group.received,
    }


def _at_one(left: Sequence[Mapping[str, Any] | None]) -> bool:
    known = [each for each in left if each is not None]
    if len(known) < len(left) or any(each["broken"] for each in known):
        return False
    if len({each["asked"] for each in known}) > 1:
        return False
    sent = {(a, int(b)): n for a, each in enumerate(known) for b, n in each["sent"].items()}
    got = {(int(b), a): n for a, each in enumerate(known) for b, n in each["received"].items()}
    return sent == got


def links() -> dict[str, frozenset[int]]:
    """Inode numbers of the connections of each group, by its name, to count what was opened."""
    return {name: group.sockets() for name, group in groups.items()}
