"""Fragments on a connection, chunk by chunk; chunks that are as in a base are named in runs."""

from __future__ import annotations

import asyncio
from typing import Final, NamedTuple

from mnemo.errors import FragmentError, PeerError, ProtectionError
from mnemo.protect.messages import Chunk, Message, Refused
from mnemo.protect.neighbours import Neighbours
from mnemo.protect.plan import Plan
from mnemo.protect.tasks import cancel
from mnemo.transport.peer import Peer, Received

UNCHANGED: Final = 1 / 3
"""What a chunk that is not sent counts towards the rate: as much less as it takes of a core."""
_RUN: Final = 16
"""Most unchanged chunks that are named at once: the other side has something to do by then."""


class Part(NamedTuple):
    """A chunk of a fragment, as long as the longest of its stripe: zeros follow what exists."""

    data: memoryview
    digest: int | None
    """Of what came of it; None where nothing did: there are only zeros."""
    buffer: memoryview
    """All of the memory that it lies in."""


async def receive(
    peer: Peer[Message],
    kind: type[Message],
    into: memoryview | None = None,
    *,
    may_lack: bool = False,
) -> Received[Message]:
    """The next message, which has to be of ``kind``, with a payload that fills ``into``.

    Args:
        peer: Who sends.
        kind: Of the message.
        into: Where its payload goes.
        may_lack: It may have none.

    Raises:
        PeerError: The connection failed.
        ProtectionError: The other side refuses to go on.
        FragmentError: It sent something else.
    """
    size = 0 if into is None else len(into)

    def place(message: Message, given: int) -> memoryview:
        if into is None or type(message) is not kind or given != size:
            raise FragmentError(
                f"{peer.node} sent {type(message).__name__} with {given} bytes where "
                f"{kind.__name__} with {size} belongs"
            )
        return into

    received = await peer.receive(place)
    if isinstance(received.message, Refused):
        raise ProtectionError(f"{peer.node} refuses: {received.message.why}")
    lacks = received.digest is None and size and not may_lack
    if type(received.message) is not kind or lacks:
        raise FragmentError(
            f"{peer.node} sent {type(received.message).__name__} without bytes where "
            f"{kind.__name__} with {size} belongs"
        )
    return received


class Incoming:
    """Chunks of one fragment, one after the other, as `Outgoing` sends them."""

    def __init__(self, peer: Peer[Message], *, upon_base: bool = False) -> None:
        """Receive from ``peer``, all of them or, upon a base, those that differ."""
        self._peer = peer
        self._upon_base = upon_base
        self._unchanged = range(0)

    async def next(self, number: int, into: memoryview) -> int | None:
        """Chunk ``number``, which fills ``into``; its digest, or None if it does not differ.

        Raises:
            PeerError, ProtectionError, FragmentError: As of `receive`.
        """
        if number in self._unchanged:
            return None
        received = await receive(self._peer, Chunk, into, may_lack=self._upon_base)
        message = received.message
        assert isinstance(message, Chunk)
        if message.number != number:
            raise FragmentError(
                f"{self._peer.node} sent chunk {message.number} where {number} belongs"
            )
        if received.digest is None:
            self._unchanged = range(number, number + message.count)
        return received.digest


class Outgoing:
    """Chunks of one fragment, of which those that do not differ are only named."""

    def __init__(self, neighbours: Neighbours, peer: Peer[Message]) -> None:
        """Send to ``peer``; `finish` when it has all."""
        self._neighbours = neighbours
        self._peer = peer
        self._next = 0
        self._unchanged = 0

    async def send(self, data: memoryview) -> int:
        """The next chunk, or its difference; its digest.

        Raises:
            PeerError: The connection failed.
        """
        await self.finish()
        self._next += 1
        return await self._neighbours.send_chunk(self._peer, self._next - 1, data)

    async def skip(self, size: int) -> None:
        """The next chunk, of ``size`` bytes, does not differ.

        Raises:
            PeerError: The connection failed.
        """
        await self._neighbours.rate.take(round(size * UNCHANGED))
        await asyncio.sleep(0)  # else others might never run
        self._unchanged += 1
        if self._unchanged == _RUN:
            await self.finish()

    async def finish(self) -> None:
        """Name what was skipped.

        Raises:
            PeerError: The connection failed.
        """
        if self._unchanged:
            await self._peer.send(Chunk(self._next, self._unchanged))
            self._next, self._unchanged = self._next + self._unchanged, 0


class Stream:
    """One fragment as it comes, a few chunks ahead of who takes them."""

    def __init__(
        self,
        peer: Peer[Message],
        plan: Plan,
        stripe: int,
        index: int,
        chunks: range,
        window: int,
        *,
        upon_base: bool = False,
    ) -> None:
        """Begin to receive; ended by `close`.

        Args:
            peer: Who sends.
            plan: The layout.
            stripe: Of the fragment.
            index: Its number.
            chunks: Those that come.
            window: Chunks kept at most, that which was taken last included.
            upon_base: They are differences, zeros where none comes.
        """
        self._incoming = Incoming(peer, upon_base=upon_base)
        self._plan = plan
        self._stripe = stripe
        self._index = index
        self._free: asyncio.Queue[memoryview] = asyncio.Queue()
        size = min(plan.generation.chunk, plan.stripe_size(stripe))
        for _ in range(window):
            self._free.put_nowait(memoryview(bytearray(size)))
        self._ready: asyncio.Queue[Part | Exception] = asyncio.Queue()
        self._taken: memoryview | None = None
        self._task = asyncio.get_running_loop().create_task(self._receive(chunks))

    async def next(self) -> Part:
        """The next chunk; that before it counts no more.

        Raises:
            PeerError, ProtectionError, FragmentError: As of `receive`.
        """
        self.release()
        part = await self._ready.get()
        if isinstance(part, Exception):
            self._ready.put_nowait(part)
            raise part
        self._taken = part.buffer
        return part

    def release(self) -> None:
        """What was taken last counts no more: its memory is for another chunk."""
        if self._taken is not None:
            self._free.put_nowait(self._taken)
            self._taken = None

    async def _receive(self, chunks: range) -> None:
        plan, stripe = self._plan, self._stripe
        try:
            for chunk in chunks:
                buffer = await self._free.get()
                length = plan.length(stripe, self._index, chunk)
                width = plan.stripe_length(stripe, chunk)
                digest = None
                if length:
                    digest = await self._incoming.next(chunk, buffer[:length])
                came = 0 if digest is None else length
                buffer[came:width] = bytes(width - came)
                self._ready.put_nowait(Part(buffer[:width], digest, buffer))
        except (PeerError, ProtectionError, FragmentError) as error:
            self._ready.put_nowait(error)

    async def close(self) -> None:
        """Receive no more."""
        await cancel(self._task)
