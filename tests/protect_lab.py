"""Members of a group with random segments: in this process, or each in one that can be killed."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from mnemo.erasure.stripes import Group
from mnemo.errors import HostMemoryError, IntegrityError
from mnemo.protect import Neighbours, Piece, Protector, Shard
from mnemo.smp import segment
from mnemo.transport import frames, handshake
from mnemo.transport.address import Address, listen
from mnemo.transport.frames import PROTOCOL
from mnemo.transport.handshake import Identity
from mnemo.transport.peer import Rules
from mnemo.types import GenerationState

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Mapping, Sequence

SECRET = bytes(range(32))
QUICK = Rules(handshake_s=2, stall_s=2, ping_s=0.3, silence_s=2)
PATIENCE_S = 30.0
CHUNK = 16 << 10
FREEZES = 4 * CHUNK
"""Bytes of a segment that change together or not at all."""


def names(number: int) -> tuple[str, ...]:
    return tuple(f"node{i}" for i in range(number))


def divided(number: int, parities: int, groups: int = 1) -> list[Group]:
    """Nodes dealt out to groups, as `mnemo.erasure.stripes.make_groups` does."""
    return [Group(names(number)[first::groups], parities) for first in range(groups)]


class Memory:
    """Sealed segments of random bytes: what a fit is to its protector."""

    def __init__(self, most: int = 1 << 40) -> None:
        self._most = most
        self._made: list[int] = []
        self.parities: list[int] = []
        """Descriptors of all memory that was ever allocated; some may be closed."""
        self.generations: dict[int, tuple[int, list[Piece], list[int]]] = {}
        self.pins: Counter[int] = Counter()

    def commit(
        self, tick: int, step: int, sizes: Sequence[int], seed: int, frozen: float = 0
    ) -> None:
        """Have a generation, its ranks' bulks of ``sizes`` bytes, a share of them ever the same."""
        pieces, fds = [], []
        for rank, size in enumerate(sizes):
            fd = segment.create(f"lab:{rank}", size)
            bulk = bytearray(random.Random(f"{seed}/{tick}/{rank}").randbytes(size))
            starts, same = range(0, size, FREEZES), random.Random(f"{seed}/{rank}")
            for start in same.sample(starts, round(frozen * len(starts))):
                bulk[start : start + FREEZES] = same.randbytes(min(FREEZES, size - start))
            digests = b"".join(
                xxhash.xxh3_64_intdigest(bulk[i : i + segment.CHUNK]).to_bytes(8, "little")
                for i in range(0, size, segment.CHUNK)
            )
            os.pwrite(fd, bulk, segment.PAGE)
            meta = segment.Meta(
                rank, len(sizes), (), size, 0, 0, size, digests, b"", b"", {}, {"step": step}
            )
            segment.seal(fd, tick, step, size, meta)
            pieces.append(Piece(rank, segment.read_header(fd).size, size))
            fds.append(fd)
        self.generations[tick] = (step, pieces, fds)

    def drop(self, tick: int) -> None:
        for fd in self.generations.pop(tick)[2]:
            os.close(fd)

    def hashes(self, tick: int) -> list[str]:
        """Of all bytes of the segments that count."""
        _, pieces, fds = self.generations[tick]
        return [
            xxhash.xxh3_128_hexdigest(os.pread(fd, piece.size, 0))
            for piece, fd in zip(pieces, fds, strict=True)
        ]

    def ticks(self) -> Mapping[int, int]:
        return {tick: step for tick, (step, _, _) in self.generations.items()}

    def pin(self, tick: int) -> Shard | None:
        if tick not in self.generations:
            return None
        self.pins[tick] += 1
        _, pieces, fds = self.generations[tick]
        return Shard(pieces, fds)

    def unpin(self, tick: int) -> None:
        self.pins[tick] -= 1

    def allocate(self, size: int) -> int:
        if size > self._most:
            raise HostMemoryError(f"{size} bytes are too many")
        fd = os.memfd_create("lab:parity", os.MFD_CLOEXEC)
        if size:
            os.posix_fallocate(fd, 0, size)
        self.parities.append(fd)
        return fd

    def make(self, pieces: tuple[Piece, ...]) -> Shard:
        self._forget_made()
        self._made = [segment.create("lab:rebuilt", piece.bulk_size) for piece in pieces]
        return Shard(pieces, self._made)

    def adopt(self, tick: int, step: int, shard: Shard) -> None:
        for fd in self._made:
            header = segment.read_header(fd)
            segment.read_meta(fd, header)
            if (header.state, header.tick) != (GenerationState.SEALED, tick):
                raise IntegrityError(f"not sealed as {tick}: {header}")
        self.pins[tick] += 1
        self.generations[tick] = (step, list(shard.pieces), self._made)
        self._made = []

    def _forget_made(self) -> None:
        for fd in self._made:
            os.close(fd)
        self._made = []

    def close(self) -> None:
        self._forget_made()
        for tick in list(self.generations):
            self.drop(tick)


class Node:
    """A member in this process."""

    def __init__(
        self,
        name: str,
        groups: Sequence[Group],
        addresses: Mapping[str, Address] | None = None,
        *,
        rules: Rules = QUICK,
        chunk: int = CHUNK,
        bytes_per_s: float = float("inf"),
        most: int = 1 << 40,
    ) -> None:
        self.groups = groups
        self.memory = Memory(most)
        self.neighbours = Neighbours(
            Identity(node=name, run="lab", secret=SECRET),
            listen("127.0.0.1", ""),
            addresses or {},
            bytes_per_s=bytes_per_s,
            rules=rules,
        )
        self.protector = Protector(0, groups, self.neighbours, self.memory, chunk=chunk)

    def commit(
        self, tick: int, sizes: Sequence[int], seed: int, *, step: int = -1, frozen: float = 0
    ) -> None:
        position = int(self.neighbours.name.removeprefix("node"))
        step = 10 * tick if step < 0 else step
        self.memory.commit(tick, step, sizes, seed * 1000 + position, frozen)
        self.protector.changed()

    async def close(self) -> None:
        await self.protector.close()
        await self.neighbours.close()
        self.memory.close()


def acquaint(nodes: Sequence[Node]) -> None:
    """Tell all where the others are."""
    for one in nodes:
        for other in nodes:
            one.neighbours.moved(other.neighbours.name, other.neighbours.address)


@contextlib.asynccontextmanager
async def group_of(
    number: int, parities: int, *, groups: int = 1, start: bool = True, **options: Any
) -> AsyncIterator[list[Node]]:
    """One group or several, all of whom know each other. Nodes may be replaced in the list."""
    nodes = [Node(name, divided(number, parities, groups), **options) for name in names(number)]
    acquaint(nodes)
    try:
        if start:
            for node in nodes:
                node.protector.start()
        yield nodes
    finally:
        for node in nodes:
            await node.close()


async def replace(nodes: list[Node], position: int, **options: Any) -> Node:
    """Another node with nothing in memory, in the place of one that ends."""
    old = nodes[position]
    await old.close()
    nodes[position] = Node(old.neighbours.name, old.groups, **options)
    acquaint(nodes)
    return nodes[position]


async def all_protected(nodes: Sequence[Node], tick: int) -> None:
    await asyncio.wait_for(
        asyncio.gather(*(node.protector.protected(tick) for node in nodes)), PATIENCE_S
    )


# --- processes ------------------------------------------------------------------------------------


class NodeProcess:
    """A member in a process of its own, told what to do line by line."""

    def __init__(self, position: int, number: int, parities: int, **options: Any) -> None:
        self.position = position
        given = {"position": position, "number": number, "parities": parities, **options}
        self.process = subprocess.Popen(
            [sys.executable, __file__, json.dumps(given)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        self._told = 0
        self.address = self._hear()["address"]

    def tell(self, do: str, **given: Any) -> None:
        """Ask for something; the answer is had by `answer`."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": do, **given}).encode() + b"\n")
        self.process.stdin.flush()

    def _hear(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise EOFError(f"node {self.position} has ended: {self.process.wait()}")
        return json.loads(line)

    def answer(self) -> Any:
        """What came of the oldest thing asked for."""
        answer = self._hear()
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer["value"]

    def ask(self, do: str, **given: Any) -> Any:
        self.tell(do, **given)
        return self.answer()

    def kill(self) -> None:
        self.process.kill()
        self.close()

    def close(self) -> None:
        """End it, by closing its standard input if it lives."""
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            with contextlib.suppress(BrokenPipeError):
                stream.close()
        self.process.wait(PATIENCE_S)


@contextlib.contextmanager
def processes(number: int, parities: int, **options: Any) -> Iterator[list[NodeProcess]]:
    nodes: list[NodeProcess] = []
    try:
        for position in range(number):
            nodes.append(NodeProcess(position, number, parities, **options))  # noqa: PERF401
        introduce(nodes)
        yield nodes
    finally:
        for node in nodes:
            node.close()


def introduce(nodes: Sequence[NodeProcess]) -> None:
    """Tell all that live where the others are."""
    addresses = {f"node{node.position}": node.address for node in nodes}
    for node in nodes:
        if node.process.poll() is None:
            node.ask("addresses", addresses=addresses)


def everybody(nodes: Sequence[NodeProcess], do: str, **given: Any) -> list[Any]:
    """Ask all at once."""
    for node in nodes:
        node.tell(do, **given)
    return [node.answer() for node in nodes]


async def _do(node: Node, do: str, given: dict[str, Any]) -> Any:
    if do == "addresses":
        for name, address in given["addresses"].items():
            node.neighbours.moved(name, Address(*address))
    elif do == "commit":
        position = str(int(node.neighbours.name.removeprefix("node")))
        node.commit(
            given["tick"], given["sizes"][position], given["seed"], frozen=given.get("frozen", 0)
        )
    elif do == "drop":
        node.memory.drop(given["tick"])
        node.protector.changed()
    elif do == "start":
        node.protector.start()
    elif do == "protected":
        await asyncio.wait_for(node.protector.protected(given["tick"]), PATIENCE_S)
    elif do == "rebuild":
        found = await node.protector.rebuild()
        return None if found is None else found.tick
    elif do == "reach":
        return list(map(str, await node.neighbours.find_unreachable()))
    elif do == "hashes":
        return node.memory.hashes(given["tick"])
    elif do == "status":
        return {**node.protector.status(), "sent": node.neighbours.sent}
    else:
        raise ValueError(do)
    return None


async def _main(
    position: int,
    number: int,
    parities: int,
    groups: int = 1,
    protocol: int = PROTOCOL,
    **options: Any,
) -> None:
    frames.PROTOCOL = handshake.PROTOCOL = protocol  # type: ignore[misc]
    node = Node(names(number)[position], divided(number, parities, groups), **options)
    print(json.dumps({"address": node.neighbours.address}), flush=True)
    lines = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(lines), sys.stdin
    )
    while line := await lines.readline():
        request = json.loads(line)
        try:
            answer = {"value": await _do(node, request.pop("do"), request)}
        except Exception as error:  # noqa: BLE001 - told to the test
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)
    await node.close()


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    asyncio.run(_main(**json.loads(sys.argv[1])))
