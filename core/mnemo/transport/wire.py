"""One TCP connection, on which every wait has an end and every failure is a typed error."""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import socket
from collections.abc import Iterator
from typing import Final

from mnemo.errors import PeerError, PeerLostError, PeerTimeoutError
from mnemo.transport.address import Address

READING: Final = select.POLLIN
WRITING: Final = select.POLLOUT
_TURN: Final = 1 << 20
"""Bytes moved until other tasks have their turn."""
_PER_CALL: Final = _TURN // 64
"""What a call counts for at least."""


async def readable(sock: socket.socket) -> None:
    """Wait until there is something to read, or a connection to accept, and leave it there.

    asyncio's own calls take it in a callback: a task cancelled just then would lose it.
    """
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()

    def wake() -> None:
        if not ready.done():
            ready.set_result(None)

    fd = sock.fileno()  # given the socket, asyncio would format it for an error that it then drops
    loop.add_reader(fd, wake)
    try:
        await ready
    finally:
        loop.remove_reader(fd)


class Wire:
    """A non-blocking socket. One task reads and one writes at a time.

    The first failure ends both directions, and is what every later operation raises.
    """

    def __init__(self, sock: socket.socket, name: str) -> None:
        """Take over ``sock``.

        Args:
            sock: Connected, or about to be.
            name: Who is at the other end, for messages.
        """
        self.name = name
        self._sock = sock
        self._loop = asyncio.get_running_loop()
        self._failure: tuple[type[PeerError], str] | None = None
        self._users = 0
        self._moved = 0
        sock.setblocking(False)
        # A message must not wait for the acknowledgement of the one before.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    @property
    def failed(self) -> bool:
        """Whether it is of no use any more."""
        return self._failure is not None

    async def connect(self, address: Address) -> None:
        """Connect to a listener.

        Raises:
            PeerLostError: It cannot be reached.
        """
        with self._using():
            await self._loop.sock_connect(self._sock, tuple(address))

    async def read(self, into: memoryview) -> int:
        """Read what has come, at least one byte, into ``into``.

        Raises:
            PeerLostError: The other end hung up or is gone.
            PeerTimeoutError: A surrounding `within` is over.
        """
        with self._using():
            await self._let_others_run()
            while True:
                try:
                    count = self._sock.recv_into(into)
                except BlockingIOError:
                    await readable(self._sock)
                else:
                    break
            if not count:
                raise EOFError("hung up")
            self._moved += max(count, _PER_CALL)
        return count

    async def write(self, data: bytes | memoryview) -> None:
        """Write all of ``data``, waiting while the other end is slower.

        Raises:
            PeerLostError: The other end hung up or is gone.
            PeerTimeoutError: A surrounding `within` is over.
        """
        with self._using():
            await self._let_others_run()
            await self._loop.sock_sendall(self._sock, data)
            self._moved += max(len(data), _PER_CALL)

    @contextlib.contextmanager
    def within(self, seconds: float, doing: str, waits_for: int) -> Iterator[None]:
        """Fail the connection if the block takes longer than ``seconds``.

        Args:
            seconds: How long it may take.
            doing: What it does, for the message.
            waits_for: `READING` or `WRITING`. Where the socket is ready for it when time is up, it
                was this process that did not run, and the block gets its time once more.
        """

        def give_up() -> None:
            self.fail(PeerTimeoutError, f"timed out: {doing} took longer than {seconds:g} s")

        def expire() -> None:
            if self._failure is not None:
                return
            ready = select.poll()
            ready.register(self._sock, waits_for)
            if ready.poll(0):
                timers.append(self._loop.call_later(seconds, give_up))
            else:
                give_up()

        timers = [self._loop.call_later(seconds, expire)]
        try:
            yield
        finally:
            for timer in timers:
                timer.cancel()

    def fail(self, kind: type[PeerError], why: str) -> None:
        """End both directions: what waits for them, and whatever comes later, raises ``kind``."""
        if self._failure is not None:
            return
        self._failure = (kind, why)
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)  # wakes whoever waits; closing would not
        self._release()

    def close(self) -> None:
        """Hang up; harmless a second time."""
        self.fail(PeerLostError, "the connection was closed at this end")

    def raise_failure(self) -> None:
        """Raise what it failed of, if it has."""
        if self._failure is not None:
            kind, why = self._failure
            raise kind(self.name, why)

    @contextlib.contextmanager
    def _using(self) -> Iterator[None]:
        self._users += 1
        try:
            self.raise_failure()
            yield
            self.raise_failure()  # it may have failed while others ran
        except PeerError:
            raise
        except (OSError, EOFError) as error:
            # By the number: asyncio has a text of its own for a connection refused.
            number = error.errno if isinstance(error, OSError) else None
            self.fail(PeerLostError, os.strerror(number).lower() if number else str(error))
            self.raise_failure()
        finally:
            self._users -= 1
            self._release()

    def _release(self) -> None:
        """Close the socket once it has failed and nobody waits for it."""
        if self._failure is not None and not self._users:
            self._sock.close()

    async def _let_others_run(self) -> None:
        """Make room: asyncio does not leave a task whose socket is always ready."""
        if self._moved >= _TURN:
            self._moved = 0
            await asyncio.sleep(0)
