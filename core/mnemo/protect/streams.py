"""Fragments on a connection, chunk by chunk."""

from __future__ import annotations

import asyncio
from typing import NamedTuple

from mnemo.errors import FragmentError, PeerError, ProtectionError
from mnemo.protect.messages import Chunk, Message, Refused
from mnemo.protect.neighbours import cancel
from mnemo.protect.plan import Plan
from mnemo.transport.peer import Peer, Received


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


async def receive_chunk(
    peer: Peer[Message], number: int, into: memoryview, *, may_lack: bool = False
) -> int | None:
    """Chunk ``number``, which fills ``into``; its digest, or None if it may lack and does.

    Raises:
        PeerError, ProtectionError, FragmentError: As of `receive`.
    """
    received = await receive(peer, Chunk, into, may_lack=may_lack)
    assert isinstance(received.message, Chunk)
    if received.message.number != number:
        raise FragmentError(
            f"{peer.node} sent chunk {received.message.number} where {number} belongs"
        )
    return received.digest


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
        may_lack: bool = False,
    ) -> None:
        """Begin to receive; ended by `close`.

        Args:
            peer: Who sends.
            plan: The layout.
            stripe: Of the fragment.
            index: Its number.
            chunks: Those that come.
            window: Chunks kept at most, that which was taken last included.
            may_lack: Chunks may come without bytes: then they are zeros.
        """
        self._peer = peer
        self._may_lack = may_lack
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
                    digest = await receive_chunk(
                        self._peer, chunk, buffer[:length], may_lack=self._may_lack
                    )
                came = 0 if digest is None else length
                buffer[came:width] = bytes(width - came)
                self._ready.put_nowait(Part(buffer[:width], digest, buffer))
        except (PeerError, ProtectionError, FragmentError) as error:
            self._ready.put_nowait(error)

    async def close(self) -> None:
        """Receive no more."""
        await cancel(self._task)
