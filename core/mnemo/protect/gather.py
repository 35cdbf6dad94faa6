"""A survivor's part of a rebuild: it computes one lost fragment from k others and streams it.

A chunk counts only if its digest is the one that was noted when the generation was protected. A
source that is lost or sends a bad chunk is replaced by another from that chunk on.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Final, Protocol

import xxhash

from mnemo.erasure.codec import Codec
from mnemo.errors import FragmentError, PeerError, ProtectionError, ShardsLostError
from mnemo.protect.messages import Message, Read, Rebuild
from mnemo.protect.neighbours import Neighbours
from mnemo.protect.shard import Fragments
from mnemo.protect.streams import Part, Stream
from mnemo.protect.tasks import cancel
from mnemo.transport.peer import Peer

WINDOW: Final = 3
"""Chunks that are held of every source."""


class _Source(Protocol):
    async def next(self) -> Part: ...


class _Own:
    """This node's own fragment, as a source like the others."""

    def __init__(self, fragments: Fragments, stripe: int, chunk: int) -> None:
        plan = fragments.plan
        self._fragments = fragments
        self._stripe = stripe
        self._chunk = chunk
        self._index = plan.index_of(fragments.position, stripe)
        self._buffer = memoryview(bytearray(plan.generation.chunk))

    async def next(self) -> Part:
        plan, stripe, chunk = self._fragments.plan, self._stripe, self._chunk
        self._chunk += 1
        data = self._buffer[: plan.stripe_length(stripe, chunk)]
        length = plan.length(stripe, self._index, chunk)
        self._fragments.read(stripe, chunk, data[:length])
        data[length:] = bytes(len(data) - length)
        digest = xxhash.xxh3_64_intdigest(data[:length]) if length else None
        return Part(data, digest, self._buffer)


async def send_own(
    fragments: Fragments, request: Read, neighbours: Neighbours, peer: Peer[Message]
) -> None:
    """Serve a `Read`.

    Raises:
        PeerError: The connection failed.
        FragmentError: The fragment is kept no more.
    """
    plan, stripe = fragments.plan, request.stripe
    index = plan.index_of(fragments.position, stripe)
    buffer = memoryview(bytearray(plan.generation.chunk))
    for chunk in range(request.first, min(request.stop, plan.chunks(stripe))):
        part = buffer[: plan.length(stripe, index, chunk)]
        if not part:
            break
        fragments.read(stripe, chunk, part)
        await neighbours.send_chunk(peer, chunk, part, rebuilds=True)


class Gathering:
    """Serves a `Rebuild`."""

    def __init__(
        self, fragments: Fragments, request: Rebuild, neighbours: Neighbours, codec: Codec
    ) -> None:
        """Describe it; `run` does it."""
        plan = fragments.plan
        self._fragments = fragments
        self._request = request
        self._neighbours = neighbours
        self._codec = codec
        self._plan = plan
        self._stop = min(request.stop, plan.chunks(request.stripe))
        self._table = fragments.tables[request.stripe]
        names = plan.group.nodes
        order = [(fragments.position + i) % len(names) for i in range(len(names))]
        self._spare = [
            index
            for index in (plan.index_of(position, request.stripe) for position in order)
            if index != request.index
            and names[plan.position_of(request.stripe, index)] not in request.lost
        ]
        self._active: dict[int, tuple[_Source, contextlib.AsyncExitStack]] = {}
        self._bad: list[str] = []

    async def run(self, peer: Peer[Message]) -> None:
        """Compute and send all chunks.

        Raises:
            PeerError: The connection to ``peer`` failed.
            ShardsLostError: Fewer than k good fragments are left.
        """
        plan, stripe, index = self._plan, self._request.stripe, self._request.index
        buffers = [memoryview(bytearray(plan.generation.chunk)) for _ in range(2)]
        delivery: asyncio.Future[int] = asyncio.ensure_future(asyncio.sleep(0, 0))
        try:
            for chunk in range(self._request.first, self._stop):
                length = plan.length(stripe, index, chunk)
                if not length:
                    break
                have = await self._collect(chunk)
                out = buffers[chunk % 2][: plan.stripe_length(stripe, chunk)]
                await self._neighbours.compute(self._codec.reconstruct, have, {index: out})
                await delivery
                delivery = asyncio.ensure_future(
                    self._neighbours.send_chunk(peer, chunk, out[:length], rebuilds=True)
                )
            await delivery
        finally:
            await cancel(delivery)
            for index in list(self._active):
                await self._drop(index)

    async def _collect(self, chunk: int) -> dict[int, memoryview]:
        """The chunk's bytes of k good fragments, by number."""
        have: dict[int, memoryview] = {}
        while len(have) < self._plan.group.code.k:
            await self._fill_up(chunk)
            for index in [index for index in self._active if index not in have]:
                try:
                    part = await self._active[index][0].next()
                    if (part.digest or 0) != self._table[index][chunk]:
                        raise FragmentError(f"chunk {chunk} of its fragment is damaged")
                except (PeerError, ProtectionError, FragmentError) as error:
                    self._bad.append(f"{self._node(index)}: {error}")
                    await self._drop(index)
                else:
                    have[index] = part.data
        return have

    async def _fill_up(self, chunk: int) -> None:
        """Have k sources, the new ones from ``chunk`` on."""
        while len(self._active) < self._plan.group.code.k:
            if not self._spare:
                k = self._plan.group.code.k
                raise ShardsLostError(
                    f"fragment {self._request.index} of stripe {self._request.stripe} cannot be "
                    f"computed from chunk {chunk} on: {len(self._active)} good fragments are left "
                    f"where {k} are needed; lost: {', '.join(self._request.lost)}; "
                    f"bad: {'; '.join(self._bad) or 'none'}"
                )
            index = self._spare.pop(0)
            stack = contextlib.AsyncExitStack()
            try:
                source = await stack.enter_async_context(self._open(index, chunk))
            except PeerError as error:
                self._bad.append(str(error))
                continue
            self._active[index] = (source, stack)

    @contextlib.asynccontextmanager
    async def _open(self, index: int, chunk: int) -> AsyncIterator[_Source]:
        plan, stripe = self._plan, self._request.stripe
        if plan.position_of(stripe, index) == self._fragments.position:
            yield _Own(self._fragments, stripe, chunk)
            return
        request = Read(self._request.fit, plan.generation.epoch, stripe, chunk, self._stop)
        async with self._neighbours.call(self._node(index), request) as peer:
            stream = Stream(peer, plan, stripe, index, range(chunk, self._stop), WINDOW)
            try:
                yield stream
            finally:
                await stream.close()

    async def _drop(self, index: int) -> None:
        await self._active.pop(index)[1].aclose()

    def _node(self, index: int) -> str:
        return self._plan.group.nodes[self._plan.position_of(self._request.stripe, index)]
