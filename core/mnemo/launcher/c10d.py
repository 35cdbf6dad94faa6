"""Stores of torch's kind (`torch.distributed.TCPStore`), spoken to without torch.

The client speaks what torch's own client does, which ``docs/adr/0009-membership.md`` looks at. A
value that was never set reads as no bytes, so empty values are not stored.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import struct
import sys
from typing import TYPE_CHECKING, Final, TypeVar

from mnemo.errors import StoreLostError

if TYPE_CHECKING:
    import socket
    from collections.abc import Awaitable, Callable

T = TypeVar("T")

_VALIDATE, _SET, _COMPARE_SET, _ADD, _MULTI_GET = 0, 1, 2, 4, 10
_MAGIC: Final = 0x3C85F7CE
_MOST_BYTES: Final = 64 << 20


def _bytes(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


class C10dStore:
    """One connection to a Store; made anew after an operation that got no answer.

    Args:
        host: Where it listens.
        port: Its port.
        prefix: Of all keys.
        patience_s: Seconds that an answer may take.
    """

    def __init__(self, host: str, port: int, prefix: str, patience_s: float = 1.0) -> None:
        self._host = host
        self._port = port
        self._prefix = prefix
        self._patience_s = patience_s
        self._lock = asyncio.Lock()
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def get(self, keys: tuple[str, ...]) -> tuple[bytes | None, ...]:
        """See `mnemo.membership.Store.get`."""
        request = bytes([_MULTI_GET]) + struct.pack("<Q", len(keys))
        request += b"".join(self._key(key) for key in keys)

        async def read(reader: asyncio.StreamReader) -> tuple[bytes | None, ...]:
            return tuple([await _value(reader) or None for _ in keys])

        return await self._ask(request, read)

    async def set(self, key: str, value: bytes) -> None:
        """See `mnemo.membership.Store.set`."""

        async def read(reader: asyncio.StreamReader) -> None:
            await _value(reader)

        # A SET is not answered: what follows it on the same connection is answered after it.
        again = bytes([_MULTI_GET]) + struct.pack("<Q", 1) + self._key(key)
        await self._ask(bytes([_SET]) + self._key(key) + _bytes(value) + again, read)

    async def compare_set(self, key: str, expected: bytes | None, value: bytes) -> bytes | None:
        """See `mnemo.membership.Store.compare_set`."""
        there = await self._ask(
            bytes([_COMPARE_SET]) + self._key(key) + _bytes(expected or b"") + _bytes(value), _value
        )
        # Where nothing was set, the Store answers with what was expected.
        return None if there == expected != value else there

    async def add(self, key: str) -> int:
        """See `mnemo.membership.Store.add`."""

        async def read(reader: asyncio.StreamReader) -> int:
            return int.from_bytes(await reader.readexactly(8), "little", signed=True)

        return await self._ask(bytes([_ADD]) + self._key(key) + struct.pack("<q", 1), read)

    def close(self) -> None:
        """Hang up."""
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None

    def _key(self, key: str) -> bytes:
        return _bytes(f"{self._prefix}{key}".encode())

    async def _ask(self, request: bytes, read: Callable[[asyncio.StreamReader], Awaitable[T]]) -> T:
        async with self._lock:
            try:
                return await asyncio.wait_for(self._exchange(request, read), self._patience_s)
            except (OSError, EOFError, asyncio.TimeoutError) as error:
                self.close()
                raise StoreLostError(
                    f"the Store at {self._host}:{self._port} gives no answer: "
                    f"{error or 'it takes too long'}"
                ) from error
            except BaseException:
                self.close()  # somebody else's answer may still come
                raise

    async def _exchange(
        self, request: bytes, read: Callable[[asyncio.StreamReader], Awaitable[T]]
    ) -> T:
        if self._streams is None:
            self._streams = await asyncio.open_connection(self._host, self._port)
            self._streams[1].write(bytes([_VALIDATE]) + struct.pack("<I", _MAGIC))
        reader, writer = self._streams
        writer.write(request)
        return await read(reader)


async def _value(reader: asyncio.StreamReader) -> bytes:
    (size,) = struct.unpack("<Q", await reader.readexactly(8))
    if size > _MOST_BYTES:
        msg = f"a value of {size} bytes"
        raise OSError(msg)
    return await reader.readexactly(size)


class C10dStores:
    """All Stores that one agent speaks to. A place is ``HOST:PORT``.

    Args:
        run_id: Of the run; part of all keys.
        claim: Holds the place where this agent hosts one; closed with the rest.
        patience_s: Seconds that an answer may take.
    """

    def __init__(
        self, run_id: str, claim: socket.socket | None = None, patience_s: float = 1.0
    ) -> None:
        self._prefix = f"mnemo/{run_id}/"
        self._claim = claim
        self._patience_s = patience_s
        self._stores: dict[str, C10dStore] = {}
        self._host = StoreHost()

    async def warm_up(self) -> None:
        """Be ready to host a Store at once."""
        await self._host.warm_up()

    async def store(self, place: str) -> C10dStore:
        """See `mnemo.membership.Stores`."""
        if place not in self._stores:
            host, _, port = place.rpartition(":")
            host = host.removeprefix("[").removesuffix("]")
            self._stores[place] = C10dStore(host, int(port), self._prefix, self._patience_s)
        return self._stores[place]

    async def host(self, place: str) -> None:
        """See `mnemo.membership.Stores`."""
        await self._host.serve(int(place.rpartition(":")[2]))

    async def forget(self, place: str, joined: str, count: int) -> None:
        """See `mnemo.launcher.stores.AgentStores`: nothing stays, it ends with its host."""

    async def close(self) -> None:
        """Hang up, and end the Store that is hosted here."""
        for store in self._stores.values():
            store.close()
        await self._host.end()
        if self._claim is not None:
            self._claim.close()


class StoreHost:
    """A process with torch that hosts a Store as long as this one lives."""

    def __init__(self) -> None:
        self._process: asyncio.subprocess.Process | None = None

    @property
    def pids(self) -> set[int]:
        """The process, where there is one."""
        return {self._process.pid} if self._process else set()

    async def warm_up(self) -> None:
        """Have the process, which takes seconds to start and 250 MB, ready to serve."""
        if self._process is None:
            pipe = asyncio.subprocess.PIPE
            command = (sys.executable, "-m", "mnemo.launcher.c10d_host")
            environ = {**os.environ, "MNEMO_ROLE": "store"}
            self._process = await asyncio.create_subprocess_exec(
                *command, stdin=pipe, stdout=pipe, env=environ
            )

    async def serve(self, port: int) -> None:
        """Host an empty Store at ``port``; one that was there before ends.

        Raises:
            StoreLostError: It cannot be hosted.
        """
        await self.warm_up()
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(f"{port}\n".encode())
        while said := await process.stdout.readline():
            if int(said) == port:  # not of one that was asked for before, and given up
                return
        await self.end()
        raise StoreLostError(f"no Store can be hosted at port {port}: its process has ended")

    async def ended(self) -> None:
        """Wait until the process has ended, which nobody should have asked it to."""
        if self._process is not None:
            await self._process.wait()

    async def end(self) -> None:
        """End it."""
        process, self._process = self._process, None
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()  # it may be loading still, and would only end after that
            await process.wait()
