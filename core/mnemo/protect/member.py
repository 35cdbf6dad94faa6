"""A member does what its leader says, and says how it went."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from typing import Final

from mnemo.erasure.codec import Codec
from mnemo.erasure.stripes import Group
from mnemo.errors import MnemoError, PeerError, ProtectionError
from mnemo.protect.attempt import Inbox, Work, protect
from mnemo.protect.keeping import Keeping
from mnemo.protect.leader import Leader
from mnemo.protect.messages import (
    Complete,
    Failed,
    FromLeader,
    FromMember,
    Go,
    Holds,
    Join,
    Lacks,
    Message,
    Offer,
    Pinned,
    Propose,
    Protected,
    Refused,
)
from mnemo.protect.neighbours import Neighbours
from mnemo.protect.plan import Plan
from mnemo.protect.shard import Fragments, Shard
from mnemo.protect.tasks import cancel, together
from mnemo.transport.address import Address
from mnemo.transport.peer import Peer

log = logging.getLogger("mnemo.protect")

RETRY_S: Final = 0.5
"""How long a member waits before it looks for its leader again."""
WORTH: Final = 0.25
"""Share of the data that did not change the last time, from which on only differences are sent.

With less they take more of a core than they save.
"""


@dataclass(eq=False)
class _Candidate:
    """A generation that is about to be protected, and what is kept of the one before."""

    epoch: int
    tick: int
    shard: Shard
    base: Fragments | None
    inbox: Inbox
    task: asyncio.Task[None] | None = None


class Member:
    """One node's part in its group's attempts."""

    def __init__(
        self, fit: int, group: Group, neighbours: Neighbours, keeping: Keeping, codec: Codec
    ) -> None:
        """Begin without a leader: `follow` or `follow_here`.

        Args:
            fit: Whose generations.
            group: This node and the others.
            neighbours: How they are reached.
            keeping: What this node has.
            codec: What computes the group's code.
        """
        self.failure = ""
        """Why the newest attempt failed here; empty if it did not."""
        self._fit = fit
        self._group = group
        self._neighbours = neighbours
        self._keeping = keeping
        self._codec = codec
        self._position = group.nodes.index(neighbours.name)
        self._candidate: _Candidate | None = None
        self._awaited: Propose | None = None
        """Of a generation that is still to come."""
        self._epoch = -1
        self._outbox: asyncio.Queue[FromMember] | None = None
        self._told: Holds | None = None
        """What the leader was told last of what this node has."""

    # --- its leader ---------------------------------------------------------------------------

    async def follow(self, leader: str) -> None:
        """Obey node ``leader``, on a connection that is made anew whenever it breaks."""
        told = ""
        while True:
            try:
                async with self._neighbours.call(leader, Join(self._fit)) as peer:
                    await together(self._write(peer), self._listen(peer))
            except (PeerError, ProtectionError) as error:
                self.failure = f"the leader is not there: {error}"
                if str(error) != told:
                    log.info("the leader is not there: %s", error)
                told = str(error)
            finally:
                self._outbox = None
                await self.abandon()
            await asyncio.sleep(RETRY_S)

    async def follow_here(self, leader: Leader) -> None:
        """Obey a leader in this process."""
        words: asyncio.Queue[FromLeader] = asyncio.Queue()
        follower = leader.join(self._neighbours.name, words.put_nowait)
        outbox = self._speak()

        async def say() -> None:
            while True:
                leader.hear(follower, await outbox.get())

        async def listen() -> None:
            while True:
                await self._obey(await words.get())

        try:
            await together(say(), listen())
        finally:
            self._outbox = None
            await self.abandon()

    async def _write(self, peer: Peer[Message]) -> None:
        outbox = self._speak()
        while True:
            await peer.send(await outbox.get())

    def _speak(self) -> asyncio.Queue[FromMember]:
        """Words for a leader who knows nothing of this node yet."""
        self._outbox, self._told = asyncio.Queue(), None
        self.tell_holdings()
        return self._outbox

    async def _listen(self, peer: Peer[Message]) -> None:
        while True:
            message = (await peer.receive()).message
            if isinstance(message, Refused):
                raise ProtectionError(f"{peer.node} refuses: {message.why}")
            if not isinstance(message, FromLeader):
                raise ProtectionError(f"{peer.node} sent {type(message).__name__} as a leader")
            await self._obey(message)

    def _say(self, message: FromMember) -> None:
        if self._outbox is not None:
            self._outbox.put_nowait(message)

    def look(self) -> None:
        """What this node has is not what it was."""
        self._pin_awaited()
        self.tell_holdings()

    def tell_holdings(self) -> None:
        """Say what this node has, where that is not what was said."""
        address = self._neighbours.address
        holds = Holds(
            dict(self._keeping.holdings.ticks()),
            self._keeping.ticks,
            self._keeping.standing.epoch,
            max(self._epoch, self._keeping.standing.epoch),
            (address.host, address.port),
        )
        if holds != self._told:
            self._told = holds
            self._say(holds)

    async def _obey(self, message: FromLeader) -> None:
        if isinstance(message, Propose):
            await self._pin(message)
        elif isinstance(message, Go):
            self._begin(message)
        elif isinstance(message, Protected):
            self._keeping.protect(message.epoch)
            self.failure = ""
        elif isinstance(message, Lacks):
            self.failure = f"{', '.join(message.nodes)} went away" if message.nodes else ""
        else:
            self.failure = message.why or self.failure
            await self._give_up(message.epoch)

    # --- an attempt ---------------------------------------------------------------------------

    async def _pin(self, proposal: Propose) -> None:
        await self.abandon()
        self._epoch = max(self._epoch, proposal.epoch)
        self._keeping.drop_all_but(proposal.base)
        self._awaited = proposal
        self._pin_awaited()

    def _pin_awaited(self) -> None:
        """Hold what was proposed as soon as it is there, before the next can take its place."""
        proposal, ticks = self._awaited, self._keeping.holdings.ticks()
        if proposal is None or max(ticks, default=-1) < proposal.tick:
            return
        self._awaited = None
        step = ticks.get(proposal.tick)
        shard = None if step is None else self._keeping.holdings.pin(proposal.tick)
        if step is None or shard is None:
            why = f"generation {proposal.tick} is gone"
            self._say(Failed(proposal.epoch, why, gone=True))
            return
        rules = self._neighbours.rules
        inbox = Inbox(rules.handshake_s + rules.stall_s)
        base = self._keeping.get(proposal.base)
        self._candidate = _Candidate(proposal.epoch, proposal.tick, shard, base, inbox)
        likely = base is not None and base.unchanged >= WORTH and base.shard.size == shard.size
        seal = base.seal if base is not None and likely else b""
        self._say(Pinned(proposal.epoch, step, shard.pieces, seal))

    def _begin(self, go: Go) -> None:
        candidate = self._candidate
        if candidate is None or candidate.epoch != go.generation.epoch or candidate.task:
            return
        for node, address in zip(go.generation.nodes, go.addresses, strict=False):
            if node in self._group.nodes:
                self._neighbours.moved(node, Address(*address))
        candidate.task = asyncio.get_running_loop().create_task(self._attempt(candidate, go))

    async def _attempt(self, candidate: _Candidate, go: Go) -> None:
        """All of one attempt; whatever goes wrong voids it, and nothing else."""
        try:
            await self._protect(candidate, Plan(go.generation), upon_base=go.upon_base)
        except (MnemoError, OSError) as error:
            self.failure = str(error)
        except Exception as error:
            log.exception("an attempt to protect generation %d failed", candidate.tick)
            self.failure = repr(error)
        else:
            self.failure = ""
            self.tell_holdings()  # first: by the other word the leader looks whether all keep it
            self._say(Complete(candidate.epoch))
            return
        self._say(Failed(candidate.epoch, self.failure))

    async def _protect(self, candidate: _Candidate, plan: Plan, *, upon_base: bool) -> None:
        if plan.group != self._group:
            raise ProtectionError(
                f"the leader's group is {', '.join(plan.group.nodes)} with {plan.group.parities} "
                f"parities, this node's {', '.join(self._group.nodes)} with {self._group.parities}"
            )
        base = candidate.base
        if base is not None and not plan.is_like(base.plan):
            base = None
        if upon_base and base is None:
            raise ProtectionError(
                f"epoch {candidate.epoch} is to be sent as differences to one that is not kept here"
            )
        parities = self._keeping.parities
        parity = await parities.take(plan.parity_size(self._position))
        try:
            fragments = Fragments(plan, self._position, candidate.shard, parity)
            await protect(
                Work(
                    self._fit,
                    fragments,
                    base if upon_base else None,
                    candidate.inbox,
                    self._neighbours,
                    self._codec,
                )
            )
            if base is not None:
                fragments.compare(base)
        except BaseException:
            parities.give_back(parity)
            raise
        self._keeping.add(fragments)
        self._candidate = None
        candidate.inbox.close()

    async def _give_up(self, epoch: int) -> None:
        if self._candidate is not None and self._candidate.epoch == epoch:
            await self.abandon()
        if epoch in self._keeping and epoch != self._keeping.standing.epoch:
            self._keeping.drop(epoch)
            self.tell_holdings()

    async def forget_after(self, tick: int) -> None:
        """Generations newer than ``tick`` are not what they were."""
        if self._candidate is not None and self._candidate.tick > tick:
            self._say(Failed(self._candidate.epoch, "training went back"))
            await self.abandon()
        self._keeping.drop_after(tick)
        self.tell_holdings()

    async def abandon(self) -> None:
        """Let go of the candidate, if there is one."""
        candidate, self._candidate, self._awaited = self._candidate, None, None
        if candidate is None:
            return
        candidate.inbox.close()
        try:
            if candidate.task is not None:
                await cancel(candidate.task)
        finally:
            if candidate.epoch not in self._keeping:
                candidate.shard.close()
                self._keeping.holdings.unpin(candidate.tick)

    async def take_offer(self, peer: Peer[Message], offer: Offer) -> None:
        """``peer`` begins a fragment: leave the connection to the attempt, to its end.

        Raises:
            ProtectionError: It is not for this node, from that one, or now.
            FragmentError: It comes a second time.
        """
        stripe, k = self._group.stripes[offer.stripe], self._group.code.k
        giver = stripe.data[offer.index] if offer.index < k else stripe.hub
        taker = stripe.hub if offer.index < k else stripe.parity[offer.index - k]
        if self._group.nodes[giver] != peer.node or taker != self._position:
            raise ProtectionError(
                f"fragment {offer.index} of stripe {offer.stripe} does not go from {peer.node} "
                f"to {self._neighbours.name}"
            )
        candidate = self._candidate
        if candidate is None or candidate.epoch != offer.epoch:
            raise ProtectionError(f"epoch {offer.epoch} is not under way here")
        await candidate.inbox.put(offer.stripe, offer.index, peer)
