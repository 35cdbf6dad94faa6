"""Replaces communicators while what was asked of the groups waits, and brings all members level."""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import msgspec
import torch
import torch.distributed as dist

from mnemo.comm.c10d import PrefixStore
from mnemo.comm.group import groups
from mnemo.comm.kept import Entry, boundary
from mnemo.comm.losses import losses
from mnemo.comm.modes import mode
from mnemo.comm.standing import (
    Belonging,
    First,
    Second,
    Standing,
    plan_all,
    touched,
)
from mnemo.comm.stream import receive, send
from mnemo.comm.waiting import PATIENCE, wait_for
from mnemo.errors import CommError

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from mnemo.comm.c10d import Gloo, Store
    from mnemo.comm.gloo import GlooLinks
    from mnemo.comm.group import Group
    from mnemo.comm.standing import Plan

    Said = TypeVar("Said", bound=msgspec.Struct)

_GLANCE_S = 0.002


def hold(membership_epoch: int, ranks: Collection[int], why: str) -> None:
    """Have all groups with one of these members wait, at once; ends nothing.

    From any thread. A `reconfigure` or `handover` for an older membership epoch is given up, be it
    under way or called later, with `GroupBrokenError` for who called it.

    Args:
        membership_epoch: Which the loss begins.
        ranks: Global ranks.
        why: What happened to them, for messages.
    """
    with losses.changing:
        losses.hear(membership_epoch)
        for group in list(groups.values()):
            if not set(ranks).isdisjoint(group.ranks):
                group.hold(why)


class Replacement:
    """One membership epoch's.

    Args:
        epoch: The membership epoch.
        members: For each rank, since which epoch its process is there.
        store: What all reach, for this alone.
        joining: The boundary at which each new rank begins.
        whole: This one is new, and has the state of its boundary.
    """

    def __init__(
        self,
        epoch: int,
        members: Sequence[int],
        store: Store,
        joining: Mapping[int, int],
        *,
        whole: bool,
    ) -> None:
        self._epoch, self._members, self._store, self._joining = epoch, members, store, joining
        self._me, self._whole = dist.get_rank(), {dist.get_rank()} if whole else set()
        self._own = joining[self._me] if mode.alone else None

    def run(self) -> set[str]:
        """Do it; the names of the groups that have new links.

        Raises:
            ReplayError: The members cannot be brought level; raised on all of them.
            GroupBrokenError: Another rank was lost meanwhile.
            CommError: A member did not take part in time.
        """
        if self._own is None:
            self._await_boundary()
        ranks = self._touched()
        ours = {name: groups[name] for name, members in ranks.items() if self._me in members}
        plans = self._plans(ranks, ours)
        links: dict[str, GlooLinks] = {}
        given: dict[str, list[Entry]] = {}
        try:
            for name, group in sorted(ours.items()):
                links[name] = group.make_links(PrefixStore(name, self._store))
                given[name] = self._give(group, plans[name], links[name])
            with losses.changing:
                losses.see_that_it_lasts(self._epoch)
                for name, group in ours.items():
                    self._go_on(group, plans[name], links.pop(name), given[name])
                mode.epoch = self._epoch
                if self._own is not None:
                    boundary.latest, mode.alone = self._own, False
        finally:
            for each in links.values():
                each.cut(f"membership epoch {self._epoch} was not reached")
        return set(ours)

    # --- what is said -----------------------------------------------------------------------------

    def _await_boundary(self) -> None:
        """Be where those that join begin, unless something that waits keeps this rank from it."""
        tick = max(self._joining.values(), default=-1)
        deadline = time.monotonic() + PATIENCE.total_seconds()
        while boundary.latest < tick and time.monotonic() < deadline and not _waits():
            losses.see_that_it_lasts(self._epoch)
            time.sleep(_GLANCE_S)

    def _touched(self) -> dict[str, list[int]]:
        known = {
            name: Belonging(list(group.ranks), group.built, group.torn)
            for name, group in groups.items()
        }
        said = self._exchange("first", First(known, self._own, bool(self._whole)))
        self._whole = {rank for rank, each in said.items() if each.whole}
        self._joining = {rank: each.joins for rank, each in said.items() if each.joins is not None}
        return touched([said[rank] for rank in range(len(self._members))], self._members)

    def _plans(self, ranks: Mapping[str, list[int]], ours: Mapping[str, Group]) -> dict[str, Plan]:
        broken = None
        for group in ours.values():
            group.hold(f"it gets new links for membership epoch {self._epoch}")
            if group.broken is not None:
                broken = str(group.broken)
            elif not group.quiet():
                broken = f"an operation of process group {group.label} does not come to an end"
        standings = {name: _standing(group) for name, group in ours.items() if not group.alone}
        said = self._exchange("second", Second(standings, boundary.updating, broken))
        return plan_all(ranks, said, self._joining, self._whole)

    def _exchange(self, what: str, mine: Said) -> dict[int, Said]:
        self._store.set(f"{what}/{self._me}", msgspec.json.encode(mine))
        everybody = range(len(self._members))
        keys = [f"{what}/{rank}" for rank in everybody]
        late = wait_for(self._store, keys, PATIENCE, lambda: losses.over(self._epoch))
        losses.see_that_it_lasts(self._epoch)
        if late:
            absent = [rank for rank, key in zip(everybody, keys, strict=True) if key in late]
            msg = f"ranks {absent} did not take part in the reconfiguration within {PATIENCE}"
            raise CommError(msg)
        answers = self._store.multi_get(keys)
        decoder = msgspec.json.Decoder(type(mine))
        return {
            rank: decoder.decode(answer) for rank, answer in zip(everybody, answers, strict=True)
        }

    # --- what is done -----------------------------------------------------------------------------

    def _give(self, group: Group, how: Plan, links: GlooLinks) -> list[Entry]:
        """Results to or from others, as planned."""
        if how.source is None or (self._me != how.source and self._me not in how.needs):
            return []
        with torch.inference_mode(), losses.cutting(links, self._epoch):
            if self._me != how.source:
                source = group.ranks.index(how.source)
                return links.use_with([source], lambda gloo: _take(gloo, source))
            assert group.kept is not None
            for rank, begin in how.needs.items():
                to = group.ranks.index(rank)
                job = partial(_hand, to=to, entries=group.kept.between(begin, how.end))
                links.use_with([to], job)
        return []

    def _go_on(self, group: Group, how: Plan, links: GlooLinks, given: list[Entry]) -> None:
        assert group.kept is not None
        if self._me in how.begins:
            group.join(*how.begins[self._me])
        for entry in given:
            group.kept.add(entry)
        group.resume(links, self._epoch)


def _waits() -> bool:
    """Whether something that this process asked for waits."""
    return any(
        group.held and group.kept is not None and group.kept.known < group.asked
        for group in list(groups.values())
    )


def _standing(group: Group) -> Standing:
    kept = group.kept
    assert kept is not None
    marks = {tick: (mark.asked, mark.messages) for tick, mark in kept.marks.items()}
    messages = group.sent.total() + group.received.total()
    return Standing(kept.known, kept.first, marks, messages, group.unkept >= kept.known)


def _hand(gloo: Gloo, to: int, entries: Sequence[Entry]) -> None:
    """Send these results, with what they are of."""
    said = [(entry.signature, _data(entry).numel()) for entry in entries]
    what = torch.frombuffer(bytearray(msgspec.json.encode(said)), dtype=torch.uint8)
    send(gloo, [to], [torch.tensor([what.numel()]).view(torch.uint8)])
    send(gloo, [to], [what])
    send(gloo, [to], [_data(entry) for entry in entries])


def _take(gloo: Gloo, source: int) -> list[Entry]:
    """Receive what `_hand` sends."""
    length = torch.empty(1, dtype=torch.int64)
    receive(gloo, source, [length.view(torch.uint8)])
    what = torch.empty(int(length), dtype=torch.uint8)
    receive(gloo, source, [what])
    said = msgspec.json.decode(what.numpy().tobytes(), type=list[tuple[str, int]])
    entries = [Entry(name, torch.empty(size, dtype=torch.uint8)) for name, size in said]
    receive(gloo, source, [_data(entry) for entry in entries])
    return entries


def _data(entry: Entry) -> torch.Tensor:
    assert entry.data is not None
    return entry.data
