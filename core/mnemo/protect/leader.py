"""One node decides when which generation is protected; all of all groups take part or none.

Two phases: an attempt counts once every member said that it is complete, and only when they are
told so do members let go of what was protected before. So whoever is lost at whatever instant,
those that are left have one generation in common, whole. That holds over all groups, which share
nothing else: a generation that one of them keeps is of no use unless the others have it as well.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final, TypeVar

from mnemo.erasure.stripes import Group
from mnemo.errors import ProtectionError
from mnemo.protect.keeping import Standing
from mnemo.protect.messages import (
    Complete,
    Failed,
    FromLeader,
    FromMember,
    Generation,
    Go,
    Holds,
    Lacks,
    Pinned,
    Propose,
    Protected,
    Void,
)
from mnemo.protect.plan import Plan

log = logging.getLogger("mnemo.protect")

A = TypeVar("A", Pinned, Complete)

RETRY_S: Final = 1.0
"""How long nothing is tried after an attempt that was given up."""
_MOST_AHEAD: Final = 15
"""Generations from the newest one to the one that is proposed, where they follow too fast."""
_AHEAD_S: Final = 2.0
"""How long such a one is waited for: where they are slower, none was gone."""
_TICKS_A_STEP: Final = 2


@dataclass(eq=False)
class Follower:
    """One node, as the leader knows it."""

    node: str
    tell: Callable[[FromLeader], None]
    holds: Holds | None = None
    answer: FromMember | None = None


class _GoneError(ProtectionError):
    """A generation was overwritten before it could be held: the next follow too fast."""


def _stride(known: Iterable[Holds]) -> int:
    """Ticks from one generation to the next, as far as that is seen."""
    ticks = (sorted(held.ticks) for held in known)
    return min((b - a for found in ticks for a, b in pairwise(found)), default=_TICKS_A_STEP)


class Leader:
    """Runs attempts, one after the other."""

    def __init__(self, groups: Sequence[Group], chunk: int, patience_s: float) -> None:
        """Begin without members; what is protected is what they say they keep.

        Args:
            groups: All whose nodes have to take part.
            chunk: Bytes of chunks, as long as not too many come of it.
            patience_s: How long a member may take to answer a proposal.
        """
        self._groups = groups
        self._nodes = tuple(node for group in groups for node in group.nodes)
        self._chunk = chunk
        self._patience_s = patience_s
        self._standing = Standing()
        self._base = -1
        """Epoch that members keep until another is protected."""
        self._members: dict[str, Follower] = {}
        self._changed = asyncio.Event()
        self._epoch = -1
        self._ahead = 0
        """How far ahead what is proposed has to lie, in generations; 0 if the newest will do."""
        self._trusts_base = True
        self._seen: set[str] = set()
        self._lacking: tuple[str, ...] = ()

    # --- members ------------------------------------------------------------------------------

    def join(self, node: str, tell: Callable[[FromLeader], None]) -> Follower:
        """``node`` is there; an earlier connection of it counts no more."""
        member = self._members[node] = Follower(node, tell)
        tell(Protected(self._standing.epoch))
        self._seen.add(node)
        self._changed.set()
        return member

    def part(self, member: Follower) -> None:
        """It is gone."""
        if self._members.get(member.node) is member:
            del self._members[member.node]
        self._changed.set()

    def hear(self, member: Follower, message: FromMember) -> None:
        """A member says something."""
        if isinstance(message, Holds):
            member.holds = message
            self._epoch = max(self._epoch, message.epoch)
        elif message.epoch == self._epoch:
            member.answer = message
        self._changed.set()

    # --- attempts -----------------------------------------------------------------------------

    async def run(self) -> None:
        """Protect what can be, for ever."""
        while True:
            self._changed.clear()
            tick = self._next()
            if tick is None:
                self._tell_who_lacks()
                await self._changed.wait()
                continue
            self._epoch += 1
            epoch = self._epoch
            try:
                await self._attempt(epoch, tick)
                self._ahead = 0
            except _GoneError:
                self._tell_all(Void(epoch))
                self._ahead = min(2 * self._ahead + 1, _MOST_AHEAD)
            except ProtectionError as error:
                self._ahead = 0
                log.warning("generation %d is not protected yet: %s", tick, error)
                self._tell_all(Void(epoch, str(error)))
                self._trusts_base = False  # it may be what is damaged
                await asyncio.sleep(RETRY_S)

    def _tell_who_lacks(self) -> None:
        """If that has changed; who has never come may come yet."""
        lacking = tuple(sorted(self._seen - self._members.keys()))
        if lacking != self._lacking:
            self._lacking = lacking
            self._tell_all(Lacks(lacking))

    def _next(self) -> int | None:
        """The newest generation that all hold and that is not protected yet.

        Where they hold none in common, or what was proposed was gone when they heard of it, one
        that is still to come: those are the same for all.
        """
        holds = [self._members[n].holds for n in self._nodes if n in self._members]
        known = [held for held in holds if held is not None]
        if len(known) < len(self._nodes):
            return None
        self._look_what_stands(known)
        common = set(known[0].ticks.items())
        for held in known:
            common &= set(held.ticks.items())
        newest = max(common, default=(-1, -1))[0]
        if newest > self._standing.tick and not self._ahead:
            return newest
        reached = [max(held.ticks, default=-1) for held in known]
        if min(reached) <= self._standing.tick:
            return None
        self._ahead = max(1, self._ahead)
        return max(reached) + self._ahead * _stride(known)

    def _look_what_stands(self, known: Sequence[Holds]) -> None:
        """What was protected last, as far as anybody was told, and whether all keep it still.

        Where one of them has lost it, nothing is protected, and it stays with the others until the
        next is: a loss leads back to it, as long as enough are left. If another one was protected
        and nobody was told, all keep this one, too.
        """
        told = {self._base, *(held.protected for held in known)}
        kept = [epoch for epoch in told if any(epoch in held.kept for held in known)]
        self._base = max(kept, default=-1)
        if all(self._base in held.kept for held in known):
            self._standing = Standing(self._base, known[0].kept[self._base])
        else:
            self._standing = Standing()

    async def _attempt(self, epoch: int, tick: int) -> None:
        """Try to protect ``tick``.

        Raises:
            ProtectionError: It is given up.
        """
        present = dict(self._members)
        for member in present.values():
            member.answer = None
        self._tell_all(Propose(epoch, tick, self._base))
        patience_s = min(self._patience_s, _AHEAD_S) if self._ahead else self._patience_s
        pinned = await self._answers(present, Pinned, patience_s)
        steps = {answer.step for answer in pinned.values()}
        if len(steps) > 1:
            raise ProtectionError(f"it is of steps {sorted(steps)} on different nodes")
        words = [self._go(group, epoch, tick, pinned) for group in self._groups]
        for group, go in zip(self._groups, words, strict=True):
            for node in group.nodes:
                present[node].answer = None
                present[node].tell(go)
        await self._answers(present, Complete, None)
        self._trusts_base = True
        self._standing, self._base = Standing(epoch, tick), epoch
        self._tell_all(Protected(epoch))

    def _go(self, group: Group, epoch: int, tick: int, pinned: Mapping[str, Pinned]) -> Go:
        """The word for ``group``, by what its members hold.

        Raises:
            ProtectionError: It cannot be laid out.
        """
        mine = [pinned[node] for node in group.nodes]
        shards = tuple(answer.pieces for answer in mine)
        generation = Generation(
            epoch, tick, mine[0].step, group.nodes, group.parities, self._chunk, shards
        )
        addresses = []
        for node in group.nodes:
            holds = self._members[node].holds
            assert holds is not None
            addresses.append(holds.address)
        bases = {answer.base for answer in mine}
        upon_base = self._trusts_base and len(bases) == 1 and bases != {b""}
        return Go(Plan.of(generation).generation, tuple(addresses), upon_base)

    async def _answers(
        self, present: dict[str, Follower], kind: type[A], patience_s: float | None
    ) -> dict[str, A]:
        """What all members say, by node.

        Raises:
            ProtectionError: One says something else, or goes away, or takes too long.
        """
        deadline = None if patience_s is None else asyncio.get_running_loop().time() + patience_s
        while True:
            self._changed.clear()
            found = {}
            for node in self._nodes:
                if self._members.get(node) is not present[node]:
                    raise ProtectionError(f"node {node} went away")
                answer = present[node].answer
                if isinstance(answer, Failed) and answer.gone:
                    raise _GoneError(f"node {node}: {answer.why}")
                if isinstance(answer, Failed):
                    raise ProtectionError(f"node {node}: {answer.why}")
                if isinstance(answer, kind):
                    found[node] = answer
            if len(found) == len(self._nodes):
                return found
            timeout = None if deadline is None else deadline - asyncio.get_running_loop().time()
            # Not wait_for: before Python 3.12 that may swallow a cancellation.
            change = asyncio.ensure_future(self._changed.wait())
            try:
                changed, _ = await asyncio.wait({change}, timeout=timeout)
            finally:
                change.cancel()
            if not changed:
                silent = [n for n in self._nodes if present[n].answer is None]
                raise ProtectionError(f"no answer within {patience_s} s from {', '.join(silent)}")

    def _tell_all(self, message: FromLeader) -> None:
        for member in self._members.values():
            member.tell(message)
