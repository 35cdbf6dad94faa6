"""What becomes of a process's groups when ranks are lost, and when others take their places."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from mnemo.comm.c10d import PrefixStore
from mnemo.comm.group import Group, groups
from mnemo.comm.waiting import wait_for
from mnemo.errors import CommError

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from mnemo.comm.c10d import Store

PATIENCE = timedelta(seconds=60)
"""How long all members of an epoch may take to say how they left the last one."""


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


def check() -> None:
    """Raise if any result may be poisoned; to be called before a result changes the state.

    Raises:
        GroupBrokenError: A group of this process is broken.
    """
    for group in list(groups.values()):
        if group.broken is not None:
            raise group.broken.again()


def reconfigure(membership_epoch: int, members: Sequence[int], store: Store) -> Changes:
    """Replace the communicators that have to be, and no others. Called by all ranks.

    Those of groups with a member that has come since they were made; and of those which were caught
    in the middle of something: where members have asked for different numbers of operations, or one
    saw it break. What is under way in these ends as broken. Group objects stay as they are. Nothing
    is connected before it is used.

    Args:
        membership_epoch: Greater than all before.
        members: For each rank, the membership epoch since which its process is a member; 0 for
            those that were there at first.
        store: What all members reach. Keys are put below ``mnemo/<membership epoch>``.

    Returns:
        What was done.

    Raises:
        CommError: A member did not take part in time, or ``members`` does not fit.
    """
    if len(members) != dist.get_world_size() or max(members) > membership_epoch:
        msg = (
            f"members {list(members)} do not fit a world of {dist.get_world_size()} ranks at "
            f"membership epoch {membership_epoch}: one epoch per rank, none of the future"
        )
        raise CommError(msg)
    here = PrefixStore(f"mnemo/{membership_epoch}", store)
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
