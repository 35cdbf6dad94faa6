"""A large state, and connections that strangers, the network or a neighbour interfere with."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import random
import socket
import struct
from typing import TYPE_CHECKING

import protect_lab as lab
import pytest

from mnemo.protect.plan import CHUNK
from mnemo.protect.tasks import cancel
from mnemo.transport.address import address_of, listen

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine

    from mnemo.transport.address import Address

SHARD = 50_000_000
"""Of four nodes: a state of 200 MB."""
PIECE = 1 << 18


async def pour(source: socket.socket, sink: socket.socket, budget: list[int]) -> None:
    """Pass bytes on, as long as ``budget`` is not used up."""
    loop = asyncio.get_running_loop()
    while budget[0] > 0 and (data := await loop.sock_recv(source, PIECE)):
        await loop.sock_sendall(sink, data)
        budget[0] -= len(data)


async def garbage(one: socket.socket, other: socket.socket) -> None:
    for _ in range(64):
        await asyncio.get_running_loop().sock_sendall(one, random.randbytes(1000))


async def stall(one: socket.socket, other: socket.socket) -> None:
    await asyncio.Event().wait()


async def reset(one: socket.socket, other: socket.socket) -> None:
    for end in (one, other):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


@contextlib.asynccontextmanager
async def gate(
    target: Address, budget: int, attack: Callable[..., Coroutine[None, None, None]]
) -> AsyncIterator[tuple[Address, asyncio.Event]]:
    """Stands between ``target`` and who connects, and after ``budget`` bytes does ``attack``.

    Once: later connections pass as if nothing stood there. The event says that it has happened.
    """
    loop = asyncio.get_running_loop()
    happened, left = asyncio.Event(), [budget]
    tasks: set[asyncio.Task[None]] = set()

    def forget(caller: socket.socket, task: asyncio.Task[None]) -> None:
        caller.close()  # also of a task that was cancelled before it began
        tasks.discard(task)

    async def pass_on(caller: socket.socket) -> None:
        with socket.socket() as callee:
            callee.setblocking(False)
            caller.setblocking(False)
            with contextlib.suppress(OSError):
                await loop.sock_connect(callee, tuple(target))
                mine = [1 << 60] if happened.is_set() else left
                ways = [
                    asyncio.ensure_future(pour(caller, callee, mine)),
                    asyncio.ensure_future(pour(callee, caller, mine)),
                ]
                try:
                    await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
                    if left[0] <= 0 and not happened.is_set():
                        happened.set()
                        await attack(caller, callee)
                finally:
                    for way in ways:
                        way.cancel()
                    await asyncio.gather(*ways, return_exceptions=True)

    with listen("127.0.0.1", "") as sock:

        async def accept() -> None:
            while True:
                caller, _ = await loop.sock_accept(sock)
                task = loop.create_task(pass_on(caller))
                tasks.add(task)
                task.add_done_callback(functools.partial(forget, caller))

        acceptor = loop.create_task(accept())
        try:
            yield address_of(sock), happened
        finally:
            for task in (acceptor, *tasks):
                task.cancel()
            await asyncio.gather(acceptor, *tasks, return_exceptions=True)


async def besiege(nodes: list[lab.Node], chance: random.Random) -> None:
    """Strangers at every listener: garbage, silence, half a frame, resets; for ever."""
    loop = asyncio.get_running_loop()
    left: list[socket.socket] = []
    try:
        while True:
            where = chance.choice(nodes).neighbours.address
            sock = socket.socket()
            left.append(sock)
            sock.setblocking(False)
            await loop.sock_connect(sock, tuple(where))
            with contextlib.suppress(OSError):
                way = chance.randrange(4)
                if way == 0:
                    await loop.sock_sendall(sock, chance.randbytes(2000))
                elif way == 1:
                    await loop.sock_sendall(sock, b"mnmo\1\0\1\0\xff")
                elif way == 2:
                    await reset(sock, sock)
                    sock.close()
            if len(left) > 100:
                left.pop(0).close()
            await asyncio.sleep(0.002)
    finally:
        for sock in left:
            sock.close()


@pytest.mark.campaign
@pytest.mark.timeout(300)
def test_a_state_of_200_mb_among_enemies(seed: int) -> None:
    chance = random.Random(seed)
    options = {"chunk": CHUNK, "rules": lab.QUICK}

    async def come_back(nodes: list[lab.Node], lost: int, hashes: list[str]) -> None:
        assert await nodes[lost].protector.rebuild() is not None
        assert nodes[lost].memory.hashes(1) == hashes

    async def main() -> None:
        async with lab.group_of(4, 2, **options) as nodes:
            siege = asyncio.ensure_future(besiege(list(nodes), chance))
            for node in nodes:
                node.commit(1, [SHARD], seed)
            await lab.all_protected(nodes, 1)
            hashes = [node.memory.hashes(1) for node in nodes]
            assert not siege.done()
            await cancel(siege)

            for attack in (garbage, stall, reset):
                replacement = await lab.replace(nodes, 3, **options)
                budget = chance.randrange(SHARD // 8)
                async with gate(nodes[1].neighbours.address, budget, attack) as (way, happened):
                    replacement.neighbours.moved("node1", way)
                    await come_back(nodes, 3, hashes[3])
                    assert happened.is_set(), attack

            # Another one is lost in mid-rebuild, and both come back.
            replacement = await lab.replace(nodes, 3, **options)
            coming = asyncio.ensure_future(replacement.protector.rebuild())
            while replacement.protector.progress.done < SHARD // 8:
                await asyncio.sleep(0)
            assert not coming.done()
            await lab.replace(nodes, 1, **options)
            await coming
            assert replacement.memory.hashes(1) == hashes[3]
            await come_back(nodes, 1, hashes[1])

            for position in (1, 3):
                nodes[position].protector.start()
            for node in nodes:
                node.commit(2, [SHARD], seed)
            await lab.all_protected(nodes, 2)

    asyncio.run(main())
