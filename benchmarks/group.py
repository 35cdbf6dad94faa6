"""Groups of nodes on loopback, each a process without torch that holds a random segment."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import xxhash

from mnemo.erasure.stripes import Group
from mnemo.protect import Neighbours, Piece, Protector, Shard, member
from mnemo.protect.member import WORTH
from mnemo.protect.messages import Ask, Message, Opening
from mnemo.protect.streams import Incoming
from mnemo.smp import segment
from mnemo.transport.address import Address, listen
from mnemo.transport.handshake import Identity

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from mnemo.transport.peer import Peer

PLAIN = 1
"""Number of the fit that is none: whoever asks for it gets a segment's bytes as they are."""
CHUNK = 1 << 20


class Memory:
    """One rank's segments, of which the two newest are kept."""

    def __init__(self) -> None:
        self._fds: dict[int, int] = {}
        self._made = -1

    def commit(self, tick: int, size: int, unchanged: float = 0) -> None:
        """Have a generation whose segment has ``size`` bytes of bulk.

        A share of them, at the beginning, is as in the generation before.
        """
        for old in sorted(self._fds)[:-1]:
            os.close(self._fds.pop(old))
        before = self._fds.get(max(self._fds, default=-1), -1)
        fd = self._fds[tick] = segment.create("bench", size)
        for offset in range(0, size, CHUNK):
            place, count = segment.PAGE + offset, min(CHUNK, size - offset)
            is_kept = before >= 0 and offset < unchanged * size
            content = os.pread(before, count, place) if is_kept else os.urandom(count)
            os.pwrite(fd, content, place)
        meta = segment.Meta(0, 1, (), size, 0, 0, size, b"", b"", b"", {}, {})
        segment.seal(fd, tick, tick, size, meta)

    def piece(self, tick: int) -> Piece:
        """What its segment is."""
        header = segment.read_header(self._fds[tick])
        return Piece(0, header.size, header.bulk_size)

    def digest(self, tick: int) -> str:
        """Of the segment."""
        whole, size = xxhash.xxh3_128(), self.piece(tick).size
        for offset in range(0, size, CHUNK):
            whole.update(os.pread(self._fds[tick], min(CHUNK, size - offset), offset))
        return whole.hexdigest()

    def ticks(self) -> Mapping[int, int]:
        """See `mnemo.protect.Holdings`, and below."""
        return {tick: tick for tick in self._fds}

    def pin(self, tick: int) -> Shard | None:
        """The segment of ``tick``; None if it is not here."""
        return Shard([self.piece(tick)], [self._fds[tick]]) if tick in self._fds else None

    def unpin(self, tick: int) -> None:
        """Nothing: no segment here is ever used again."""

    def allocate(self, size: int) -> int:
        """A memfd of ``size`` bytes, the caller's."""
        fd = os.memfd_create("bench")
        os.posix_fallocate(fd, 0, size)
        return fd

    def make(self, pieces: tuple[Piece, ...]) -> Shard:
        """Memory for one segment, kept until `adopt`."""
        self._made = segment.create("bench", pieces[0].bulk_size)
        return Shard(pieces, [self._made])

    def adopt(self, tick: int, step: int, shard: Shard) -> None:
        """The segment from `make` holds ``tick``."""
        del step, shard
        self._fds[tick] = self._made


class Node:
    """A node, as its parent sees it."""

    def __init__(
        self, position: int, n: int, m: int, rate: float | None, worth: float = WORTH
    ) -> None:
        self.name = f"node{position}"
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.group", json.dumps([position, n, m, rate, worth])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=Path(__file__).parents[1],
        )
        self.address = self.answer()

    @property
    def used(self) -> float:
        """CPU seconds that it took so far."""
        times = psutil.Process(self._process.pid).cpu_times()
        return times.user + times.system

    @property
    def private(self) -> int:
        """Bytes of memory that it has for itself; what lies in memfds is not among them."""
        return psutil.Process(self._process.pid).memory_full_info().uss

    def tell(self, do: str, *given: Any) -> None:
        """Ask for something; `answer` has what came of it."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([do, *given]).encode() + b"\n")
        self._process.stdin.flush()

    def answer(self) -> Any:
        """What came of the oldest thing asked for."""
        assert self._process.stdout is not None
        return json.loads(self._process.stdout.readline())

    def ask(self, do: str, *given: Any) -> Any:
        """Ask and wait."""
        self.tell(do, *given)
        return self.answer()

    def kill(self) -> None:
        """End it, its memory with it."""
        self._process.kill()
        self._process.communicate()


@contextlib.contextmanager
def group_of(n: int, m: int, *, rate: float | None, worth: float = WORTH) -> Iterator[list[Node]]:
    """Nodes that protect each other; nodes of the list may be replaced.

    Differences travel where at least a share of ``worth`` did not change.
    """
    nodes: list[Node] = []
    try:
        nodes += [Node(position, n, m, rate, worth) for position in range(n)]
        introduce(nodes)
        everybody(nodes, "start")
        yield nodes
    finally:
        for node in nodes:
            node.kill()


def introduce(nodes: Sequence[Node]) -> None:
    """Tell all where all are."""
    everybody(nodes, "addresses", {node.name: node.address for node in nodes})


def everybody(nodes: Sequence[Node], do: str, *given: Any) -> list[Any]:
    """Ask all at once."""
    for node in nodes:
        node.tell(do, *given)
    return [node.answer() for node in nodes]


# --- in the process -------------------------------------------------------------------------------


class _Served:
    def __init__(self, position: int, n: int, m: int, rate: float | None) -> None:
        group = Group(tuple(f"node{i}" for i in range(n)), m)
        self.memory = Memory()
        self.neighbours = Neighbours(
            Identity(node=group.nodes[position], run="bench", secret=bytes(32)),
            listen("127.0.0.1", ""),
            {},
            bytes_per_s=rate,
        )
        self.protector = Protector(0, (group,), self.neighbours, self.memory)
        self.neighbours.attend(PLAIN, self._send_plain)

    async def _send_plain(self, peer: Peer[Message], opening: Opening) -> None:
        del opening
        shard = self.memory.pin(max(self.memory.ticks()))
        assert shard is not None
        buffer = memoryview(bytearray(CHUNK))
        for number, offset in enumerate(range(0, shard.size, CHUNK)):
            part = buffer[: min(CHUNK, shard.size - offset)]
            shard.read(offset, part)
            await self.neighbours.send_chunk(peer, number, part)
        await peer.receive()

    async def read(self, node: str, size: int) -> float:
        """Seconds to have a shard of ``size`` bytes sent once."""
        target = self.memory.make((Piece(0, size, size - segment.PAGE),))
        buffer, start = memoryview(bytearray(CHUNK)), time.perf_counter()
        async with self.neighbours.call(node, Ask(PLAIN)) as peer:
            incoming = Incoming(peer)
            for number, offset in enumerate(range(0, target.size, CHUNK)):
                part = buffer[: min(CHUNK, target.size - offset)]
                await incoming.next(number, part)
                target.write(offset, part)
        return time.perf_counter() - start

    async def do(self, what: str, given: list[Any]) -> Any:
        if what == "addresses":
            for name, address in given[0].items():
                self.neighbours.moved(name, Address(*address))
        elif what == "commit":
            self.memory.commit(*given)
        elif what == "protect":
            start = time.perf_counter()
            self.protector.changed()
            await self.protector.protected(given[0])
            return time.perf_counter() - start
        elif what == "changed":
            self.protector.changed()
        elif what == "start":
            self.protector.start()
        elif what == "rebuild":
            start = time.perf_counter()
            await self.protector.rebuild()
            return time.perf_counter() - start
        elif what == "read":
            return await self.read(*given)
        elif what == "digest":
            return self.memory.digest(*given)
        elif what == "shard":
            return self.memory.piece(*given).size
        elif what == "status":
            return {**self.protector.status(), "sent": self.neighbours.sent}
        return None


async def _main(position: int, n: int, m: int, rate: float | None, worth: float) -> None:
    member.WORTH = worth  # type: ignore[misc]
    served = _Served(position, n, m, rate)
    print(json.dumps(served.neighbours.address), flush=True)
    lines = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(lines), sys.stdin
    )
    while line := await lines.readline():
        what, *given = json.loads(line)
        print(json.dumps(await served.do(what, given)), flush=True)


if __name__ == "__main__":
    asyncio.run(_main(*json.loads(sys.argv[1])))
