"""One authenticated connection to another node: messages with payloads, both ways.

Nothing is queued: a send is over when the kernel has all of it, a payload is read when it is asked
for. What is under way in one direction is one frame and what the kernel's buffers hold, so a side
that does not keep up slows the other down, and one that stands still is given up.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic

import msgspec
import xxhash

from mnemo.errors import FrameError, PeerError
from mnemo.transport import frames
from mnemo.transport.frames import PIECE, Body, Head, Kind, Limits, M, Parser
from mnemo.transport.handshake import Session
from mnemo.transport.rate import RateLimit
from mnemo.transport.wire import READING, WRITING, Wire


@dataclass(frozen=True, kw_only=True, slots=True)
class Rules:
    """How long is waited and how much is taken. The same on all nodes, or nearly.

    Attributes:
        handshake_s: Longest time to connect, and then again to prove who one is.
        stall_s: Longest time for the next part of a frame begun; of a payload 4 MiB.
        ping_s: Silence after which this side sends a ping.
        silence_s: Silence after which the other side counts as lost; several times `ping_s`.
        limits: Longest message and payload, bytes.
    """

    handshake_s: float = 10.0
    stall_s: float = 20.0
    ping_s: float = 5.0
    silence_s: float = 30.0
    limits: Limits = field(default_factory=Limits)


@dataclass(frozen=True, slots=True)
class Received(Generic[M]):
    """A message, and where its payload lies."""

    message: M
    payload: memoryview | None
    """What was given for it; None where there was none or it was not wanted."""
    digest: int | None
    """xxh3-64 of the payload; None where there was none."""


class Peer(Generic[M]):
    """The other node. Several tasks may send; one receives.

    Whatever goes wrong is a `mnemo.errors.PeerError` and ends this connection, no other.
    """

    def __init__(
        self,
        wire: Wire,
        session: Session,
        decoder: msgspec.msgpack.Decoder[M],
        rules: Rules,
    ) -> None:
        """Take over a connection whose handshake is done: `mnemo.transport.endpoints`."""
        self.node = session.node
        """Its name, proved."""
        wire.name = session.name
        self._wire = wire
        self._session = session
        self._decoder = decoder
        self._rules = rules
        self._parser = Parser(rules.limits, wire.name)
        self._turn = asyncio.Lock()
        self._receiving = False
        self._loop = asyncio.get_running_loop()
        self._said = self._loop.time()
        self._keeper = self._loop.create_task(self._keep_alive())

    async def send(
        self,
        message: msgspec.Struct,
        payload: memoryview | None = None,
        *,
        rate: RateLimit | None = None,
    ) -> int | None:
        """Send a message, waiting for those before it and while the other side is slower.

        Cancelled while its frame is under way, it ends the connection.

        Args:
            message: What the other side's decoder knows.
            payload: Contiguous bytes beside it, not empty. They must not change until this returns.
            rate: Limit that the payload counts towards.

        Returns:
            xxh3-64 of the payload, or None without one.

        Raises:
            PeerLostError: The other side hung up or is gone.
            PeerTimeoutError: It took nothing for `Rules.stall_s`, or was silent for too long.
            ValueError: Message or payload are longer than `Rules.limits`, the payload is empty or
                not contiguous.
        """
        if payload is not None and not (payload.nbytes and payload.c_contiguous):
            raise ValueError("a payload is contiguous, and not empty: send none instead")
        content = None if payload is None else payload.cast("B")
        size = 0 if content is None else len(content)
        data = msgspec.msgpack.encode(message)
        head = frames.encode(Kind.MESSAGE, data, size, self._rules.limits)
        if content is not None and rate is not None:
            await rate.take(size)  # before the frame: one begun goes on at full speed
        async with self._turn:
            return await self._send(head, content)

    async def receive(
        self, into: Callable[[M, int], memoryview | None] | None = None
    ) -> Received[M]:
        """The next message. Its payload is read straight into the caller's memory.

        Cancelled within a frame, it ends the connection; between frames nothing is lost.

        Args:
            into: Given a message and the size of its payload in bytes, returns writable memory of
                exactly that size; None drops the payload, as having no ``into`` does. What lies
                there counts only once this has returned.

        Raises:
            PeerLostError: The other side hung up or is gone.
            PeerTimeoutError: It stopped within a frame, or was silent for `Rules.silence_s`.
            FrameError: It sent what is no frame, no known message, too long, or changed on the way.
            ValueError: ``into`` returned memory that does not fit.
        """
        if self._receiving:
            raise RuntimeError(f"two tasks receive from {self._wire.name}")
        self._receiving = True
        try:
            return await self._receive(into)
        except BaseException as error:
            if isinstance(error, FrameError):
                self._wire.fail(FrameError, error.why)
            elif not self._parser.between_frames:
                self._wire.close()  # the rest of the frame would be taken for the next one
            raise
        finally:
            self._receiving = False

    async def close(self) -> None:
        """Hang up. Whoever waits for this peer gets a `PeerLostError`; harmless a second time.

        What was sent last may be lost with it: have it acknowledged first.
        """
        self._wire.close()
        self._keeper.cancel()
        await asyncio.wait([self._keeper])

    # --- sending ------------------------------------------------------------------------------

    async def _send(self, head: bytes, content: memoryview | None) -> int | None:
        """Send one frame, all of it or the connection is of no use any more."""
        try:
            await self._put(head + self._session.sign(head))
            if content is None:
                return None
            digest = xxhash.xxh3_64()
            for start in range(0, len(content), PIECE):
                piece = content[start : start + PIECE]
                digest.update(piece)  # what is hashed now is sent from the processor's cache
                await self._put(piece)
            whole = digest.intdigest()
            await self._put(self._session.sign_payload(whole))
        except BaseException:
            self._wire.close()
            raise
        return whole

    async def _put(self, data: bytes | memoryview) -> None:
        with self._wire.within(self._rules.stall_s, "sending", WRITING):
            await self._wire.write(data)
        self._said = self._loop.time()

    async def _keep_alive(self) -> None:
        """Be heard while there is nothing to say."""
        ping = frames.encode(Kind.PING, b"", 0, self._rules.limits)
        while not self._wire.failed:
            wait = self._said + self._rules.ping_s - self._loop.time()
            if wait > 0 or self._turn.locked():
                await asyncio.sleep(max(wait, self._rules.ping_s / 2))
                continue
            with contextlib.suppress(PeerError):  # told to whoever uses the peer next
                async with self._turn:
                    await self._send(ping, None)

    # --- receiving ----------------------------------------------------------------------------

    async def _receive(self, into: Callable[[M, int], memoryview | None] | None) -> Received[M]:
        while True:
            head = await self._next()
            assert isinstance(head, Head)
            if head.kind == Kind.HANDSHAKE:
                raise FrameError(self._wire.name, "began a handshake where one is over")
            self._session.check(head)
            if head.kind == Kind.MESSAGE:
                break
        message = frames.decode(head.message, self._decoder, self._wire.name)
        if not head.payload_bytes:
            return Received(message, None, None)
        target = None if into is None else into(message, head.payload_bytes)
        self._parser.take(target)
        body = await self._next()
        assert isinstance(body, Body)
        self._session.check_payload(body)
        return Received(message, target, body.digest)

    async def _next(self) -> Head | Body:
        """Read until something is complete."""
        self._wire.raise_failure()
        event: Head | Body | None = None
        while event is None:
            if self._parser.between_frames:
                limit, doing = self._rules.silence_s, "silence"
            else:
                limit, doing = self._rules.stall_s, "receiving a frame"
            with self._wire.within(limit, doing, READING):
                left = len(self._parser.buffer())
                while left:
                    count = await self._wire.read(self._parser.buffer()[:left])
                    event = self._parser.filled(count)
                    left -= count
        return event
