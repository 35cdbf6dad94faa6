"""How two nodes meet: one listens, the other connects, both prove the run's secret."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import socket
from collections.abc import Awaitable, Callable
from typing import Final, Generic

import msgspec

from mnemo.errors import AuthenticationError, FrameError, PeerError, PeerLostError
from mnemo.transport import frames
from mnemo.transport.address import Address, address_of
from mnemo.transport.frames import Head, Kind, M, Parser
from mnemo.transport.handshake import LIMITS, REFUSAL, CallerSide, Identity, ListenerSide, Session
from mnemo.transport.peer import Peer, Rules
from mnemo.transport.wire import READING, WRITING, Wire, readable

log = logging.getLogger("mnemo.transport")

HALF_OPEN: Final = 64
"""Most handshakes at a time; of more the oldest is given up: an honest one is over soon."""
_QUIET_S: Final = 60.0
"""How long nothing more is logged of handshakes that failed: strangers can make any number."""
_BREATHER_S: Final = 0.1


async def connect(
    me: Identity,
    address: Address,
    decoder: msgspec.msgpack.Decoder[M],
    *,
    expect: str | None = None,
    rules: Rules | None = None,
) -> Peer[M]:
    """Connect to the node that listens at ``address``. The caller closes the peer.

    Args:
        me: This node.
        address: From `Listener.address` of the other node.
        decoder: Knows the messages that may come.
        expect: Name that the other node should have; None if any will do.
        rules: Waits and limits.

    Raises:
        PeerLostError: Nobody can be reached there.
        PeerTimeoutError: Nobody answers within `Rules.handshake_s`.
        AuthenticationError: Another node answers, or one that has not the run's secret.
        FrameError: Something else answers, or another version of mnemo.
    """
    rules = rules or Rules()
    name = f"{expect} at {address}" if expect else str(address)
    try:
        sock = socket.socket(address.family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    except OSError as error:  # no IPv6 here, or out of descriptors
        raise PeerLostError(name, os.strerror(error.errno or 0).lower()) from error
    wire = Wire(sock, name)
    try:
        with wire.within(rules.handshake_s, "connecting", WRITING):
            await wire.connect(address)
        with wire.within(rules.handshake_s, "the handshake", READING):
            session = await _call(wire, CallerSide(me, str(address), expect))
    except BaseException:
        wire.close()
        raise
    return Peer(wire, session, decoder, rules)


class Listener(Generic[M]):
    """Takes connections of other nodes and serves each in a task of its own."""

    def __init__(
        self,
        me: Identity,
        sock: socket.socket,
        decoder: msgspec.msgpack.Decoder[M],
        serve: Callable[[Peer[M]], Awaitable[None]],
        rules: Rules | None = None,
    ) -> None:
        """Begin to listen; to be called within a running loop, and ended by `close`.

        Args:
            me: This node.
            sock: From `mnemo.transport.address.listen`; this object closes it.
            decoder: Knows the messages that may come.
            serve: Called with each node that has proved itself. The connection is closed when it
                returns. What it raises ends that connection alone.
            rules: Waits and limits.
        """
        self.address = address_of(sock)
        """Where other nodes connect."""
        self.refused = 0
        """Connections that did not get through the handshake."""
        self._me = me
        self._sock = sock
        self._decoder = decoder
        self._serve = serve
        self._rules = rules or Rules()
        self._loop = asyncio.get_running_loop()
        self._half_open: dict[Wire, None] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._log_again_at = self._loop.time()
        self._acceptor = self._loop.create_task(self._accept())

    async def close(self) -> None:
        """Stop listening, hang up on everybody, and wait until all is over."""
        self._acceptor.cancel()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(self._acceptor, *self._tasks, return_exceptions=True)
        self._sock.close()

    async def _accept(self) -> None:
        while True:
            await asyncio.sleep(0)  # asyncio does not leave a task that always has a connection
            try:
                sock, address = self._sock.accept()
            except BlockingIOError:
                await readable(self._sock)
                continue
            except OSError as error:  # out of descriptors, for now
                log.warning("a connection could not be accepted: %s", error)
                await asyncio.sleep(_BREATHER_S)
                continue
            wire = Wire(sock, str(Address(*address[:2])))
            task = self._loop.create_task(self._attend(wire))
            self._tasks.add(task)
            task.add_done_callback(functools.partial(self._forget, wire))

    def _forget(self, wire: Wire, task: asyncio.Task[None]) -> None:
        """The connection is over, or was before its task began."""
        wire.close()
        self._tasks.discard(task)

    async def _attend(self, wire: Wire) -> None:
        """Serve one connection to its end."""
        try:
            session = await self._admit(wire)
        except PeerError as error:
            self._note_refusal(error)
            return
        peer = Peer(wire, session, self._decoder, self._rules)
        try:
            await self._serve(peer)
        except PeerError as error:
            log.info("connection ended: %s", error)
        except Exception:
            log.exception("the connection of %s failed at this end", wire.name)
        finally:
            await peer.close()

    async def _admit(self, wire: Wire) -> Session:
        """Let the other node prove itself."""
        while len(self._half_open) >= HALF_OPEN:
            oldest = next(iter(self._half_open))
            del self._half_open[oldest]
            oldest.fail(PeerLostError, f"given up: more than {HALF_OPEN} handshakes at a time")
        self._half_open[wire] = None
        side = ListenerSide(self._me, wire.name)
        try:
            with wire.within(self._rules.handshake_s, "the handshake", READING):
                await _say(wire, side.challenge())
                try:
                    welcome, session = side.welcome(await _hear(wire))
                except AuthenticationError:
                    with contextlib.suppress(PeerError):
                        await _say(wire, REFUSAL)
                    raise
                await _say(wire, welcome)
        finally:
            self._half_open.pop(wire, None)
        return session

    def _note_refusal(self, error: PeerError) -> None:
        self.refused += 1
        if self._loop.time() >= self._log_again_at:
            log.warning("connection refused, %d so far: %s", self.refused, error)
            self._log_again_at = self._loop.time() + _QUIET_S


async def _call(wire: Wire, side: CallerSide) -> Session:
    """The handshake of the node that connects."""
    try:
        await _say(wire, side.answer(await _hear(wire)))
        return side.finish(await _hear(wire))
    except FrameError:
        with contextlib.suppress(PeerError):
            await _say(wire, REFUSAL)  # shows a listener of another version what this one speaks
        raise


async def _say(wire: Wire, word: bytes) -> None:
    await wire.write(frames.encode(Kind.HANDSHAKE, word, 0, LIMITS))


async def _hear(wire: Wire) -> bytes:
    parser = Parser(LIMITS, wire.name)
    event = None
    while event is None:
        event = parser.filled(await wire.read(parser.buffer()))
    if not isinstance(event, Head) or event.kind != Kind.HANDSHAKE:
        raise FrameError(wire.name, "sent something else than a handshake, which has to be first")
    return event.message
