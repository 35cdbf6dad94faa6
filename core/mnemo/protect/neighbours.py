"""Connections of one node with the others of its run, and the thread that computes.

One listener serves all fits: the first message on a connection says whose it is.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import threading
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Collection,
    Coroutine,
    Mapping,
)
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, ParamSpec, TypeVar

from mnemo.errors import PeerLostError
from mnemo.protect.messages import DECODER, Chunk, Message, Opening, Refused
from mnemo.protect.tasks import cancel
from mnemo.transport.address import Address
from mnemo.transport.endpoints import Listener, connect
from mnemo.transport.handshake import Identity
from mnemo.transport.peer import Peer, Rules
from mnemo.transport.rate import RateLimit
from mnemo.transport.reach import Unreachable, find_unreachable

P = ParamSpec("P")
T = TypeVar("T")
Serve = Callable[[Peer[Message], Opening], Awaitable[None]]

PER_CORE: Final = 8e6
"""Bytes of fragments that a node sends by default, a second and a core: about a fiftieth of it."""
_NICE: Final = 19


class Neighbours:
    """How this node reaches the others, and they it."""

    def __init__(
        self,
        me: Identity,
        sock: socket.socket,
        addresses: Mapping[str, Address],
        *,
        bytes_per_s: float | None = None,
        rules: Rules | None = None,
    ) -> None:
        """Begin to listen; to be called within a running loop, and ended by `close`.

        Args:
            me: This node.
            sock: From `mnemo.transport.address.listen`; closed by `close`.
            addresses: Where the others listen, as far as that is known; `moved` changes it.
            bytes_per_s: See `limit`.
            rules: Waits and limits.
        """
        self.rules = rules or Rules()
        self.rate = RateLimit(default_rate())
        self.limit(bytes_per_s)
        self.sent = 0
        """Bytes of fragments that left this node."""
        self._me = me
        self._addresses = dict(addresses)
        self._lines: dict[str, set[asyncio.Task[Peer[Message]]]] = {}
        self._ending: set[asyncio.Task[None]] = set()
        """Connections and listeners that are given up."""
        self._serves: dict[int, Serve] = {}
        self._listener = Listener(me, sock, DECODER, self._serve, rules)
        self._worker = ThreadPoolExecutor(1, "mnemo-protect", initializer=_be_nice)

    def limit(self, bytes_per_s: float | None) -> None:
        """Send at most so much of fragments; None: `default_rate`, so that training goes on.

        For a rebuild, which training waits for, only the network can be a reason to send less.
        """
        self.rate.change(default_rate() if bytes_per_s is None else bytes_per_s)
        self._limits_rebuilds = bytes_per_s is not None

    @property
    def name(self) -> str:
        """This node."""
        return self._me.node

    @property
    def address(self) -> Address:
        """Where this node listens."""
        return self._listener.address

    def listen(self, sock: socket.socket) -> None:
        """Listen at ``sock`` from now on; who came by the address before is hung up on."""
        self._end_later(self._listener.close())
        self._listener = Listener(self._me, sock, DECODER, self._serve, self.rules)

    def moved(self, node: str, address: Address) -> None:
        """``node`` listens at ``address`` from now on.

        If that is another one, whoever was there is not: connections to it end now.
        """
        if node == self.name or self._addresses.get(node) == address:
            return
        self._addresses[node] = address
        self._hang_up_on(node)

    def forget_all_but(self, nodes: Collection[str]) -> None:
        """Others than ``nodes`` are not wanted any more: they are hung up on."""
        for node in self._addresses.keys() - set(nodes):
            del self._addresses[node]
            self._hang_up_on(node)

    def _hang_up_on(self, node: str) -> None:
        for line in self._lines.pop(node, ()):
            self._end_later(_hang_up(line))

    def _end_later(self, end: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(end)
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)

    def attend(self, fit: int, serve: Serve | None) -> None:
        """Have ``serve`` take the connections that concern ``fit``; None: nobody does any more."""
        if serve is None:
            self._serves.pop(fit, None)
        else:
            self._serves[fit] = serve

    async def find_unreachable(self) -> list[Unreachable]:
        """Try to connect to all others."""
        return await find_unreachable(self._me, self._addresses, self.rules)

    @contextlib.asynccontextmanager
    async def call(self, node: str, opening: Opening) -> AsyncIterator[Peer[Message]]:
        """A connection to ``node`` for what ``opening`` says.

        Raises:
            PeerError: It cannot be reached, is not the one, or the connection failed.
        """
        address = self._addresses.get(node)
        if address is None:
            raise PeerLostError(node, "its address is not known")
        lines = self._lines.setdefault(node, set())
        line = asyncio.ensure_future(
            connect(self._me, address, DECODER, expect=node, rules=self.rules)
        )
        lines.add(line)
        try:
            await asyncio.wait({line})
            if line.cancelled():
                raise PeerLostError(node, f"it is not at {address} any more")
            peer = line.result()
            await peer.send(opening)
            yield peer
        finally:
            lines.discard(line)
            await _hang_up(line)

    async def send_chunk(
        self, peer: Peer[Message], number: int, data: memoryview, *, rebuilds: bool = False
    ) -> int:
        """Send a chunk when `limit` allows it; return its digest."""
        rate = self.rate if self._limits_rebuilds or not rebuilds else None
        digest = await peer.send(Chunk(number), data, rate=rate)
        self.sent += len(data)
        return digest or 0

    async def compute(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Call ``function`` in the thread that computes, which yields to everything else."""
        return await asyncio.wrap_future(self._worker.submit(function, *args, **kwargs))

    async def _serve(self, peer: Peer[Message]) -> None:
        message = (await peer.receive()).message
        if not isinstance(message, Opening):
            await peer.send(Refused(f"{type(message).__name__} begins nothing"))
        elif (serve := self._serves.get(message.fit)) is None:
            await peer.send(Refused(f"fit {message.fit} is not protected on {self.name}"))
        else:
            await serve(peer, message)

    async def close(self) -> None:
        """Hang up on everybody."""
        await self._listener.close()
        await asyncio.gather(*self._ending)
        self._worker.shutdown()


def default_rate() -> float:
    """Most bytes a second that a node sends of fragments unless told otherwise."""
    return PER_CORE * len(os.sched_getaffinity(0))


async def _hang_up(line: asyncio.Task[Peer[Message]]) -> None:
    """End a connection, made or in the making; harmless a second time."""
    if not line.done():
        await cancel(line)
    elif not line.cancelled() and not line.exception():
        await line.result().close()


def _be_nice() -> None:
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
