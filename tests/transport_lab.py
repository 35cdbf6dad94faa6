"""Two nodes on loopback, and strangers that talk to them byte by byte."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import msgspec
import xxhash

from mnemo.transport import address, frames, handshake
from mnemo.transport.endpoints import Listener, connect
from mnemo.transport.frames import Kind, Limits
from mnemo.transport.handshake import CallerSide, Identity
from mnemo.transport.peer import Peer, Received, Rules

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine

    from mnemo.transport.address import Address
    from mnemo.transport.handshake import Session

SECRET = bytes(range(32))
QUICK = Rules(handshake_s=0.5, stall_s=0.5, ping_s=0.1, silence_s=0.5)
PATIENCE_S = 20.0


class Note(msgspec.Struct, tag=True, frozen=True):
    """A message."""

    text: str
    number: int = 0


class Manifest(msgspec.Struct, tag=True, frozen=True):
    """Another one."""

    digests: list[int]


Messages = Note | Manifest
DECODER: msgspec.msgpack.Decoder[Messages] = msgspec.msgpack.Decoder(Messages)


def identity(node: str, *, run: str = "lab", secret: bytes = SECRET) -> Identity:
    return Identity(node=node, run=run, secret=secret)


@dataclass
class Node:
    """A listener that keeps every peer until the block is over, or what its serving raised."""

    listener: Listener[Messages]
    peers: asyncio.Queue[Peer[Messages]] = field(default_factory=asyncio.Queue)

    async def peer(self) -> Peer[Messages]:
        return await asyncio.wait_for(self.peers.get(), PATIENCE_S)


@contextlib.asynccontextmanager
async def listening(
    node: str = "b",
    *,
    rules: Rules | None = None,
    secret: bytes = SECRET,
    run: str = "lab",
    serve: Callable[[Peer[Messages]], Awaitable[None]] | None = None,
) -> AsyncIterator[Node]:
    """A node that listens on loopback; without ``serve`` its peers are had by `Node.peer`."""
    over = asyncio.Event()
    found: Node

    async def keep(peer: Peer[Messages]) -> None:
        found.peers.put_nowait(peer)
        await over.wait()

    sock = address.listen("127.0.0.1", "")
    me = identity(node, secret=secret, run=run)
    found = Node(Listener(me, sock, DECODER, serve or keep, rules))
    try:
        yield found
    finally:
        over.set()
        await found.listener.close()


@contextlib.asynccontextmanager
async def pair(
    rules: Rules | None = None, listener_rules: Rules | None = None
) -> AsyncIterator[tuple[Peer[Messages], Peer[Messages]]]:
    """Two connected nodes: a, which called, and b."""
    async with listening(rules=listener_rules or rules) as b:
        caller = await connect(identity("a"), b.listener.address, DECODER, rules=rules)
        try:
            yield caller, await b.peer()
        finally:
            await caller.close()


def run(main: Coroutine[object, object, None]) -> None:
    """Run a test's coroutine, at most for a minute."""
    asyncio.run(asyncio.wait_for(main, 60))


async def receive(peer: Peer[Messages]) -> Received[Messages]:
    """The next message, its payload in memory of its own."""
    return await asyncio.wait_for(
        peer.receive(lambda _, size: memoryview(bytearray(size))), PATIENCE_S
    )


async def receive_all(
    peer: Peer[Messages], into: Callable[[Messages, int], memoryview | None] | None = None
) -> None:
    """Receive until that fails."""
    while True:
        await asyncio.wait_for(peer.receive(into), PATIENCE_S)


async def still_works(a: Peer[Messages], b: Peer[Messages]) -> None:
    """A message each way."""
    for one, other in ((a, b), (b, a)):
        await one.send(Note("still here"), memoryview(b"payload"))
        received = await receive(other)
        assert received.message == Note("still here")
        assert received.payload == b"payload"


class Stranger:
    """A connection whose bytes the test chooses."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.sock = sock
        self._loop = asyncio.get_running_loop()

    async def write(self, data: bytes) -> None:
        await self._loop.sock_sendall(self.sock, data)

    async def read(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            part = await asyncio.wait_for(
                self._loop.sock_recv(self.sock, size - len(data)), PATIENCE_S
            )
            if not part:
                break
            data += part
        return data

    async def ends(self) -> bool:
        """Whether the other end hangs up, in whatever way; what it still says is read."""
        try:
            while await asyncio.wait_for(self._loop.sock_recv(self.sock, 65536), PATIENCE_S):
                pass
        except ConnectionError:
            pass
        return True

    async def say(self, word: bytes) -> None:
        """Send a handshake frame."""
        await self.write(frames.encode(Kind.HANDSHAKE, word, 0, handshake.LIMITS))

    async def hear(self) -> bytes:
        """The message of the next handshake frame."""
        header = await self.read(frames.HEADER.size)
        return await self.read(frames.HEADER.unpack(header)[4])

    async def prove(self, me: Identity) -> Session:
        """Go through the handshake as an honest node would."""
        side = CallerSide(me, "lab", None)
        await self.say(side.answer(await self.hear()))
        return side.finish(await self.hear())

    def reset(self) -> None:
        """End the connection by a reset, as a killed process with unread data does."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()


@contextlib.asynccontextmanager
async def stranger(where: Address) -> AsyncIterator[Stranger]:
    """A connection to a listener, on which nothing has been said."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as sock:
        found = Stranger(sock)
        await asyncio.get_running_loop().sock_connect(sock, tuple(where))
        yield found


@contextlib.asynccontextmanager
async def pretender(
    meet: Callable[[Stranger], Awaitable[None]],
) -> AsyncIterator[Address]:
    """Something that listens, and does with who connects what the test says."""
    loop = asyncio.get_running_loop()
    with address.listen("127.0.0.1", "") as sock:

        async def accept() -> None:
            with (await loop.sock_accept(sock))[0] as one:
                await meet(Stranger(one))

        task = loop.create_task(accept())
        try:
            yield address.address_of(sock)
        finally:
            await asyncio.wait_for(task, PATIENCE_S)


def frame(
    session: Session,
    message: msgspec.Struct,
    payload: bytes = b"",
    *,
    digest: int | None = None,
    limits: Limits | None = None,
) -> bytes:
    """A whole signed frame; ``digest`` overrides the payload's."""
    data = msgspec.msgpack.encode(message)
    head = frames.encode(Kind.MESSAGE, data, len(payload), limits or Limits())
    whole = head + session.sign(head)
    if payload:
        whole += payload
        whole += session.sign_payload(
            xxhash.xxh3_64_intdigest(payload) if digest is None else digest
        )
    return whole
