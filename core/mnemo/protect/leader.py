"""The first node of a group decides when which generation is protected; all take part or none.

Two phases: an attempt counts once every member said that it is complete, and only when they are
told so do members let go of what was protected before. So whoever is lost at whatever instant,
those that are left have one generation in common, whole.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
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
    """One node of the group, as the leader knows it."""

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

    def __init__(self, group: Group, chunk: int, patience_s: float, standing: Standing) -> None:
        """Begin without members.

        Args:
            group: All that have to take part.
            chunk: Bytes of chunks, as long as not too many come of it.
            patience_s: How long a member may take to answer a proposal.
            standing: What is known to be protected.
        """
        self._group = group
        self._chunk = chunk
        self._patience_s = patience_s
        self._standing = standing
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
        holds = [self._members[n].holds for n in self._group.nodes if n in self._members]
        known = [held for held in holds if held is not None]
        if len(known) < len(self._group.nodes):
            return None
        if any(self._standing.epoch not in held.kept for held in known):
            self._standing = Standing()  # somebody lost it, or went back before it
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

    async def _attempt(self, epoch: int, tick: int) -> None:
        """Try to protect ``tick``.

        Raises:
            ProtectionError: It is given up.
        """
        present = dict(self._members)
        for member in present.values():
            member.answer = None
        self._tell_all(Propose(epoch, tick, self._standing.epoch))
        patience_s = min(self._patience_s, _AHEAD_S) if self._ahead else self._patience_s
        pinned = await self._answers(present, Pinned, patience_s)
        bases = {answer.base for answer in pinned}
        steps = {answer.step for answer in pinned}
        if len(steps) > 1:
            raise ProtectionError(f"it is of steps {sorted(steps)} on different nodes")
        plan = Plan.of(
            Generation(
                epoch,
                tick,
                steps.pop(),
                self._group.nodes,
                self._group.parities,
                self._chunk,
                tuple(answer.pieces for answer in pinned),
            )
        )
        addresses = []
        for node in self._group.nodes:
            holds = present[node].holds
            assert holds is not None
            addresses.append(holds.address)
            present[node].answer = None
        upon_base = self._trusts_base and len(bases) == 1 and bases != {b""}
        self._tell_all(Go(plan.generation, tuple(addresses), upon_base))
        await self._answers(present, Complete, None)
        self._trusts_base = True
        self._standing = Standing.of(plan)
        self._tell_all(Protected(epoch))

    async def _answers(
        self, present: dict[str, Follower], kind: type[A], patience_s: float | None
    ) -> list[A]:
        """What all members say, in their order.

        Raises:
            ProtectionError: One says something else, or goes away, or takes too long.
        """
        deadline = None if patience_s is None else asyncio.get_running_loop().time() + patience_s
        while True:
            self._changed.clear()
            for node in self._group.nodes:
                if self._members.get(node) is not present[node]:
                    raise ProtectionError(f"node {node} went away")
                answer = present[node].answer
                if isinstance(answer, Failed) and answer.gone:
                    raise _GoneError(f"node {node}: {answer.why}")
                if isinstance(answer, Failed):
                    raise ProtectionError(f"node {node}: {answer.why}")
            answers = [present[node].answer for node in self._group.nodes]
            found = [answer for answer in answers if isinstance(answer, kind)]
            if len(found) == len(answers):
                return found
            timeout = None if deadline is None else deadline - asyncio.get_running_loop().time()
            # Not wait_for: before Python 3.12 that may swallow a cancellation.
            change = asyncio.ensure_future(self._changed.wait())
            try:
                changed, _ = await asyncio.wait({change}, timeout=timeout)
            finally:
                change.cancel()
            if not changed:
                silent = [n for n in self._group.nodes if present[n].answer is None]
                raise ProtectionError(f"no answer within {patience_s} s from {', '.join(silent)}")

    def _tell_all(self, message: FromLeader) -> None:
        for member in self._members.values():
            member.tell(message)
