"""One attempt of one member to protect a generation: what it sends, encodes and stores.

For every stripe a member is one of three: a holder of data, which streams its block to the hub; the
hub, which encodes chunk by chunk and streams parities on; a holder of another parity, which stores
it. A hub waits for none but data holders, and a parity holder for none but hubs, so nothing can
wait in a circle. All connections are of this attempt alone and end with it.

Upon a base (`mnemo.protect.base`) all is the same, but that the chunks which travel are differences
to it, or lack where there is none.
"""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass
from typing import Final

import numpy as np
import xxhash

from mnemo.erasure.codec import Codec
from mnemo.errors import FragmentError, PeerError, PeerTimeoutError
from mnemo.protect.base import Old, OldFragment, add, check
from mnemo.protect.messages import Digests, Message, Offer, Stored
from mnemo.protect.neighbours import Neighbours
from mnemo.protect.plan import Plan
from mnemo.protect.shard import Fragments, Table
from mnemo.protect.streams import Incoming, Outgoing, Stream, receive
from mnemo.protect.tasks import cancel, together
from mnemo.transport.peer import Peer

WINDOW: Final = 2
"""Chunks that a hub holds of every data fragment: one arrives while one is encoded."""


class Inbox:
    """Connections that others made for an attempt, each for one fragment."""

    def __init__(self, patience_s: float) -> None:
        """Begin empty.

        Args:
            patience_s: How long `get` waits.
        """
        self._patience_s = patience_s
        self._peers: dict[tuple[int, int], asyncio.Future[Peer[Message]]] = {}
        self._over = asyncio.Event()

    def _slot(self, stripe: int, index: int) -> asyncio.Future[Peer[Message]]:
        if (stripe, index) not in self._peers:
            self._peers[stripe, index] = asyncio.get_running_loop().create_future()
        return self._peers[stripe, index]

    async def put(self, stripe: int, index: int, peer: Peer[Message]) -> None:
        """Hand over ``peer``, and stay until the attempt is over.

        Raises:
            FragmentError: Another connection is for this fragment.
        """
        slot = self._slot(stripe, index)
        if slot.done():
            raise FragmentError(
                f"{peer.node} offers fragment {index} of stripe {stripe} a second time, or too late"
            )
        slot.set_result(peer)
        await self._over.wait()

    async def get(self, stripe: int, index: int, node: str) -> Peer[Message]:
        """The connection for a fragment that ``node`` is to send.

        Raises:
            PeerTimeoutError: It does not come.
        """
        done, _ = await asyncio.wait({self._slot(stripe, index)}, timeout=self._patience_s)
        if not done:
            raise PeerTimeoutError(
                node,
                f"did not offer fragment {index} of stripe {stripe} within {self._patience_s:g} s",
            )
        return done.pop().result()

    def close(self) -> None:
        """Hang up on all."""
        self._over.set()
        for slot in self._peers.values():
            slot.cancel()


@dataclass(frozen=True)
class Work:
    """What an attempt needs: `protect` does it.

    Attributes:
        fit: Whose generation.
        fragments: This node's part of it.
        base: Its part of the one that differences are sent to; None where all is sent.
        inbox: Connections that others make.
        neighbours: How others are reached.
        codec: What computes the group's code.
    """

    fit: int
    fragments: Fragments
    base: Fragments | None
    inbox: Inbox
    neighbours: Neighbours
    codec: Codec

    @property
    def plan(self) -> Plan:
        """The layout."""
        return self.fragments.plan

    def node(self, stripe: int, index: int) -> str:
        """Who holds a fragment."""
        return self.plan.group.nodes[self.plan.position_of(stripe, index)]

    def old(self, stripe: int) -> OldFragment | None:
        """This node's fragment of the base."""
        return None if self.base is None else OldFragment(self.base, stripe)

    def offer(
        self, stripe: int, index: int, to: str
    ) -> contextlib.AbstractAsyncContextManager[Peer[Message]]:
        """A connection to ``to``, on which a fragment will be sent."""
        epoch = self.plan.generation.epoch
        return self.neighbours.call(to, Offer(self.fit, epoch, stripe, index))


async def protect(work: Work) -> None:
    """Do this member's part. Afterwards its fragments are whole.

    Raises:
        PeerError: A neighbour is lost, too slow, or sends nonsense.
        FragmentError: What came does not fit.
        ProtectionError: A neighbour does not go along.
    """
    plan, parts = work.plan, []
    for stripe in range(len(plan.group.nodes)):
        index = plan.index_of(work.fragments.position, stripe)
        if index < plan.group.code.k:
            parts.append(_send_block(work, stripe, index))
        elif index > plan.group.code.k:
            parts.append(_store_parity(work, stripe, index))
        else:
            parts.append(_Hub(work, stripe).run())
    await together(*parts)


async def _send_block(work: Work, stripe: int, index: int) -> None:
    """A data holder's part of a stripe."""
    plan, chunks = work.plan, work.plan.chunks(stripe)
    own, old = np.zeros(chunks, "<u8"), work.old(stripe)
    buffer = memoryview(bytearray(plan.generation.chunk))
    async with work.offer(stripe, index, work.node(stripe, plan.group.code.k)) as hub:
        outgoing = Outgoing(work.neighbours, hub)
        for chunk in range(chunks):
            part = buffer[: plan.length(stripe, index, chunk)]
            if not part:
                break
            work.fragments.read(stripe, chunk, part)
            if old is None:
                own[chunk] = await outgoing.send(part)
                continue
            own[chunk] = xxhash.xxh3_64_intdigest(part)
            if own[chunk] == old.digest(chunk):
                await outgoing.skip(len(part))
            else:
                await work.neighbours.compute(add, part, old.read(chunk, len(part)))
                await outgoing.send(part)
        await outgoing.finish()
        await _take_digests(work, hub, stripe, index, own)


async def _store_parity(work: Work, stripe: int, index: int) -> None:
    """The part of a holder of another parity than the first."""
    plan = work.plan
    hub = await work.inbox.get(stripe, index, work.node(stripe, plan.group.code.k))
    own, old = np.zeros(plan.chunks(stripe), "<u8"), work.old(stripe)
    buffer = memoryview(bytearray(plan.generation.chunk))
    incoming = Incoming(hub, upon_base=old is not None)
    for chunk in range(plan.chunks(stripe)):
        part = buffer[: plan.length(stripe, index, chunk)]
        digest = await incoming.next(chunk, part)
        if digest is None:
            assert old is not None
            own[chunk] = await _carry_on(work, stripe, chunk, old)
            continue
        if old is not None:
            digest = await work.neighbours.compute(_renew, part, old.read(chunk, len(part)))
        own[chunk] = digest
        work.fragments.write(stripe, chunk, part)
    await _take_digests(work, hub, stripe, index, own)


async def _carry_on(work: Work, stripe: int, chunk: int, old: OldFragment) -> int:
    """A chunk of a parity is as it was; its digest."""
    same = old.read(chunk, work.plan.stripe_length(stripe, chunk))
    check(same)
    work.fragments.write(stripe, chunk, same.data)
    await asyncio.sleep(0)  # else others might never run
    return same.digest


async def _take_digests(
    work: Work, hub: Peer[Message], stripe: int, index: int, own: Table
) -> None:
    """Say what this node has, wait until the stripe is done, and compare what the hub has."""
    await hub.send(Digests(), memoryview(own.tobytes()) or None)
    payload = memoryview(bytearray(work.plan.digest_bytes(stripe)))
    await receive(hub, Digests, payload)
    table = work.fragments.take_table(stripe, payload)
    if (table[index] != own).any():
        raise FragmentError(
            f"{hub.node} has other digests of fragment {index} of stripe {stripe} than its holder"
        )
    await hub.send(Stored())
    with contextlib.suppress(PeerError):  # hung up by the hub: so it has got that
        await hub.receive()


class _Hub:
    """The part of who computes a stripe's parities, and keeps the first."""

    def __init__(self, work: Work, stripe: int) -> None:
        plan = work.plan
        self._work = work
        self._stripe = stripe
        self._old = work.old(stripe)
        self._table: Table = np.zeros((plan.group.code.n, plan.chunks(stripe)), "<u8")
        if work.base is not None:
            self._table[:] = work.base.tables[stripe]
        self._others: list[Peer[Message]] = []
        self._outgoing: list[Outgoing] = []

    async def run(self) -> None:
        work, plan, stripe = self._work, self._work.plan, self._stripe
        k, n = plan.group.code.k, plan.group.code.n
        async with contextlib.AsyncExitStack() as stack:
            for index in range(k + 1, n):
                offer = work.offer(stripe, index, work.node(stripe, index))
                self._others.append(await stack.enter_async_context(offer))
            self._outgoing = [Outgoing(work.neighbours, peer) for peer in self._others]
            holders = [
                await work.inbox.get(stripe, index, work.node(stripe, index)) for index in range(k)
            ]
            streams = []
            for index, holder in enumerate(holders):
                chunks = range(plan.chunks(stripe))
                stream = Stream(
                    holder, plan, stripe, index, chunks, WINDOW, upon_base=work.base is not None
                )
                stack.push_async_callback(stream.close)
                streams.append(stream)
            await self._encode_all(streams)
            for index, peer in (*enumerate(holders), *enumerate(self._others, k + 1)):
                await self._take_row(peer, index)
            payload = memoryview(self._table.tobytes())
            for peer in (*self._others, *holders):
                await peer.send(Digests(), payload or None)
            for peer in (*self._others, *holders):
                await receive(peer, Stored)
                await peer.close()
            work.fragments.take_table(stripe, payload)

    async def _encode_all(self, streams: list[Stream]) -> None:
        """Chunk by chunk; parities are on their way while the next are computed."""
        work, plan, stripe = self._work, self._work.plan, self._stripe
        size = min(plan.generation.chunk, plan.stripe_size(stripe))
        sets = [[memoryview(bytearray(size)) for _ in range(plan.group.code.m)] for _ in range(2)]
        delivery = asyncio.ensure_future(asyncio.sleep(0))
        try:
            for chunk in range(plan.chunks(stripe)):
                data = [await stream.next() for stream in streams]
                width = plan.stripe_length(stripe, chunk)
                parities = [buffer[:width] for buffer in sets[chunk % 2]]
                came = [index for index, part in enumerate(data) if part.digest is not None]
                if came:
                    digest = await work.neighbours.compute(
                        _encode,
                        work.codec,
                        [part.data for part in data],
                        parities,
                        None if self._old is None else self._old.read(chunk, width),
                    )
                    work.fragments.write(stripe, chunk, parities[0])
                else:
                    assert self._old is not None
                    digest = await _carry_on(work, stripe, chunk, self._old)
                for stream in streams:
                    stream.release()
                for index in came:
                    self._note(index, chunk, data[index].digest)
                self._table[len(data), chunk] = digest
                await delivery
                delivery = asyncio.ensure_future(
                    self._deliver(chunk, parities[1:], unchanged=not came)
                )
            await delivery
            for outgoing in self._outgoing:
                await outgoing.finish()
        finally:
            await cancel(delivery)

    async def _deliver(self, chunk: int, parities: list[memoryview], *, unchanged: bool) -> None:
        k = self._work.plan.group.code.k
        for index, (other, parity) in enumerate(zip(self._outgoing, parities, strict=True), k + 1):
            if unchanged:
                await other.skip(len(parity))
            else:
                self._note(index, chunk, await other.send(parity))

    def _note(self, index: int, chunk: int, digest: int | None) -> None:
        """What travelled of a fragment; of what a difference makes, only its holder can say."""
        self._table[index, chunk] = 0 if digest is None or self._old is not None else digest

    async def _take_row(self, peer: Peer[Message], index: int) -> None:
        """What a holder says of its fragment's digests; what is known here as well has to agree."""
        known = self._table[index]
        row = np.zeros_like(known)
        await receive(peer, Digests, memoryview(row).cast("B"))
        if (row != known)[known != 0].any():
            raise FragmentError(
                f"{peer.node} has other digests of fragment {index} of stripe {self._stripe} than "
                f"what travelled"
            )
        self._table[index] = row


def _encode(
    codec: Codec, data: list[memoryview], parities: list[memoryview], old: Old | None
) -> int:
    """Compute parities, or differences of them, of which the first becomes new; its digest."""
    codec.encode(data, parities)
    if old is not None:
        add(parities[0], old)
    return xxhash.xxh3_64_intdigest(parities[0])


def _renew(parity: memoryview, old: Old) -> int:
    """Turn the difference of a parity into the new one; its digest."""
    add(parity, old)
    return xxhash.xxh3_64_intdigest(parity)
