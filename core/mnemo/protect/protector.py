"""One node's part in protecting one fit's generations, for as long as the SMP keeps that fit."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Sequence
from typing import Any, Final

from mnemo.erasure.codec import codec
from mnemo.erasure.stripes import Group
from mnemo.errors import MnemoError, PeerError, ProtectionError
from mnemo.protect.gather import Gathering, send_own
from mnemo.protect.keeping import Holdings, Keeping, Standing
from mnemo.protect.leader import Leader
from mnemo.protect.member import Member
from mnemo.protect.messages import (
    Ask,
    Describe,
    Described,
    FromLeader,
    FromMember,
    Join,
    Kept,
    Message,
    Offer,
    Opening,
    Read,
    Rebuild,
    Refused,
)
from mnemo.protect.neighbours import Neighbours
from mnemo.protect.plan import CHUNK
from mnemo.protect.rebuild import Progress, Rebuilding, Survivors, find_survivors
from mnemo.protect.shard import Fragments
from mnemo.protect.tasks import cancel, ended, together
from mnemo.transport.peer import Peer

log = logging.getLogger("mnemo.protect")

_ROUNDS: Final = 3
"""How often a rebuild is begun when what it reads is given up meanwhile."""


class Protector:
    """Takes part in its group, and leads all groups if it is the first. Runs on the SMP's loop.

    Once it has started, nothing here raises into the SMP: what fails is logged, told by `status`,
    and tried again.
    """

    def __init__(
        self,
        fit: int,
        groups: Sequence[Group],
        neighbours: Neighbours,
        holdings: Holdings,
        *,
        chunk: int = CHUNK,
    ) -> None:
        """Answer others from now on; `rebuild` if anything was lost, then `start`.

        Args:
            fit: Which one.
            groups: All of the run, in an order that is the same everywhere. In one of them this
                node shares parities with others; the first node of the first leads all.
            neighbours: How those of its group and the leader are reached.
            holdings: The fit's segments.
            chunk: Bytes of fragments that are handled at once; what the leader says counts.

        Raises:
            ProtectionError: This node is in no group.
        """
        group = next((group for group in groups if neighbours.name in group.nodes), None)
        if group is None:
            nodes = ", ".join(node for group in groups for node in group.nodes)
            raise ProtectionError(f"{neighbours.name} is not in {nodes}")
        self.progress = Progress()
        """Of a rebuild."""
        self._fit = fit
        self._groups = groups
        self._group = group
        self._leads = groups[0].nodes[0]
        self._neighbours = neighbours
        self._chunk = chunk
        self._codec = codec(group.code)
        self._keeping = Keeping(holdings, neighbours.name)
        self._member = Member(fit, group, neighbours, self._keeping, self._codec)
        self._leader: Leader | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._serving: set[asyncio.Task[Any]] = set()
        """Who answers the connections of others."""
        neighbours.attend(fit, self._serve)

    def start(self) -> None:
        """Begin to protect what is committed."""
        loop = asyncio.get_running_loop()
        if self._neighbours.name != self._leads:
            self._tasks.append(loop.create_task(self._member.follow(self._leads)))
            return
        leader = Leader(self._groups, self._chunk, self._neighbours.rules.stall_s)
        self._leader = leader
        self._tasks.append(loop.create_task(leader.run()))
        self._tasks.append(loop.create_task(self._member.follow_here(leader)))

    def changed(self) -> None:
        """The holdings have changed."""
        self._member.look()

    async def forget_after(self, tick: int) -> None:
        """Training goes on from ``tick``: later generations are not what they were."""
        await self._member.forget_after(tick)

    @property
    def standing(self) -> Standing:
        """What is protected."""
        return self._keeping.standing

    async def protected(self, tick: int) -> None:
        """Wait until ``tick``, or a newer one, is protected."""
        await self._keeping.protected(tick)

    @property
    def failure(self) -> str:
        """Why the newest attempt failed, or none is made; empty if all is well."""
        return self._member.failure

    def status(self) -> dict[str, Any]:
        """For ``mnemo status``; sizes in bytes."""
        return {
            "group": list(self._group.nodes),
            "parities": self._group.parities,
            "tick": self.standing.tick,
            "step": self.standing.step,
            "kept": sorted(self._keeping.ticks.values()),
            "failure": self.failure,
            "memory": self._keeping.parities.memory,
            "rebuilt": self.progress.done,
            "to_rebuild": self.progress.total,
        }

    async def close(self) -> None:
        """Take part no more, hang up on the others, and give the parities' memory back."""
        self._neighbours.attend(self._fit, None)
        await cancel(*self._tasks, *self._serving)
        await self._member.abandon()
        self._keeping.close()

    # --- for others ---------------------------------------------------------------------------

    async def _serve(self, peer: Peer[Message], opening: Opening) -> None:
        """Answer one connection."""
        task = asyncio.current_task()
        assert task is not None
        self._serving.add(task)
        task.add_done_callback(self._serving.discard)
        try:
            if isinstance(opening, Join):
                await self._lead(peer)
                return
            if peer.node not in self._group.nodes:
                raise ProtectionError(f"{peer.node} is not in the group")
            if isinstance(opening, Offer | Read | Rebuild):
                self._check_place(opening)
            if isinstance(opening, Offer):
                await self._member.take_offer(peer, opening)
                return
            await self._answer(peer, opening)
        except PeerError:
            raise
        except MnemoError as error:
            log.info("%s is refused a %s: %s", peer.node, type(opening).__name__, error)
            await peer.send(Refused(str(error)[:1000]))
        # Whoever reads gets all of it before this end hangs up.
        with contextlib.suppress(PeerError):
            await peer.receive()

    async def _answer(self, peer: Peer[Message], opening: Opening) -> None:
        if isinstance(opening, Ask):
            await peer.send(Kept(self._keeping.seals))
        elif isinstance(opening, Describe):
            kept = self._keeping.find(opening.epoch)
            digests = memoryview(kept.all_digests())
            await peer.send(Described(kept.plan.generation), digests)
        elif isinstance(opening, Read):
            await send_own(self._keeping.find(opening.epoch), opening, self._neighbours, peer)
        elif isinstance(opening, Rebuild):
            kept = self._keeping.find(opening.epoch)
            await Gathering(kept, opening, self._neighbours, self._codec).run(peer)

    def _check_place(self, opening: Offer | Read | Rebuild) -> None:
        nodes = len(self._group.nodes)
        index = 0 if isinstance(opening, Read) else opening.index
        if not (0 <= opening.stripe < nodes and 0 <= index < nodes):
            raise ProtectionError(
                f"fragment {index} of stripe {opening.stripe}: there are {nodes} of either here"
            )

    async def _lead(self, peer: Peer[Message]) -> None:
        if self._leader is None:
            raise ProtectionError(f"{self._neighbours.name} does not lead, or not yet")
        if not any(peer.node in group.nodes for group in self._groups):
            raise ProtectionError(f"{peer.node} is in no group")
        leader = self._leader
        words: asyncio.Queue[FromLeader] = asyncio.Queue()
        follower = leader.join(peer.node, words.put_nowait)

        async def say() -> None:
            while True:
                await peer.send(await words.get())

        async def listen() -> None:
            while True:
                message = (await peer.receive()).message
                if not isinstance(message, FromMember):
                    raise ProtectionError(f"{type(message).__name__} is no word of a member")
                leader.hear(follower, message)

        try:
            await together(say(), listen())
        finally:
            leader.part(follower)

    # --- coming back --------------------------------------------------------------------------

    async def rebuild(self) -> Standing | None:
        """Bring back what this node kept of protected generations; see `progress`.

        That is of all that enough others keep: the newer may lack in other groups, the older may
        be given up there. To be called before `start`, with nothing held of it here.

        Returns:
            The oldest; None if the group kept nothing.

        Raises:
            ShardsLostError: More nodes were lost than the parities make up for.
            ProtectionError: What the others say of it cannot be.
            HostMemoryError: It does not fit here.
            IntegrityError: What came back are no sealed segments.
        """
        for left in reversed(range(_ROUNDS)):
            try:
                await self._rebuild()
                break
            except ProtectionError as error:
                if not left and not self._keeping.ticks:
                    raise
                log.warning("the rebuild %s: %s", "begins anew" if left else "ends", error)
        oldest = min(self._keeping.ticks, default=-1)
        self._keeping.stand_on(oldest)
        return self.standing if oldest >= 0 else None

    async def _rebuild(self) -> None:
        found = await find_survivors(self._fit, self._group, self._neighbours)
        missing = [s for s in found if s.plan.generation.epoch not in self._keeping]
        position = self._group.nodes.index(self._neighbours.name)
        self.progress.done = 0
        self.progress.total = sum(survivors.plan.kept_by(position) for survivors in missing)
        for survivors in missing:
            await self._bring_back(survivors, position)

    async def _bring_back(self, survivors: Survivors, position: int) -> None:
        plan, keeping = survivors.plan, self._keeping
        generation = plan.generation
        parity = await keeping.parities.take(plan.parity_size(position))
        try:
            pieces = generation.shards[position]
            made = asyncio.ensure_future(asyncio.to_thread(keeping.holdings.make, pieces))
            await ended(made)  # a thread cannot be told to end
            shard = made.result()
            try:
                fragments = Fragments(plan, position, shard, parity)
                await Rebuilding(
                    self._fit, survivors, fragments, self._neighbours, self.progress
                ).run()
                keeping.holdings.adopt(generation.tick, generation.step, shard)
            except BaseException:
                shard.close()
                raise
        except BaseException:
            keeping.parities.give_back(parity)
            raise
        keeping.add(fragments)
