"""Connections to a node that is replaced by one at another address."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from typing import TYPE_CHECKING

import protect_lab as lab
import pytest

from mnemo.errors import PeerLostError
from mnemo.protect import Neighbours
from mnemo.protect.messages import Ask, Refused
from mnemo.transport.address import Address, listen
from mnemo.transport.handshake import Identity
from mnemo.transport.peer import Rules

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Coroutine, Mapping

    from mnemo.protect.messages import Message, Opening
    from mnemo.transport.peer import Peer

ELSEWHERE = Address("127.0.0.2", 1)
AT_ONCE_S = 20.0
PATIENT = Rules(handshake_s=600, stall_s=600, ping_s=300, silence_s=900)


def run(main: Coroutine[object, object, None]) -> None:
    asyncio.run(asyncio.wait_for(main, 60))


@contextlib.asynccontextmanager
async def known_as(name: str, addresses: Mapping[str, Address]) -> AsyncIterator[Neighbours]:
    me = Identity(node=name, run="lab", secret=lab.SECRET)
    neighbours = Neighbours(me, listen("127.0.0.1", ""), addresses, rules=PATIENT)
    try:
        yield neighbours
    finally:
        await neighbours.close()


async def wait_for_word(neighbours: Neighbours, node: str) -> None:
    async with neighbours.call(node, Ask(0)) as peer:
        await peer.receive()


def test_a_connection_that_hangs_ends_when_its_node_is_replaced() -> None:
    async def main() -> None:
        called = asyncio.Event()

        async def say_nothing(peer: Peer[Message], opening: Opening) -> None:
            called.set()
            await peer.receive()

        async with known_as("b", {}) as other:
            other.attend(0, say_nothing)
            async with known_as("a", {"b": other.address}) as one:
                waiting = asyncio.ensure_future(wait_for_word(one, "b"))
                await called.wait()
                one.moved("b", other.address)  # which is where it is
                one.moved("c", ELSEWHERE)
                _, hangs = await asyncio.wait({waiting}, timeout=0.2)
                assert hangs
                one.moved("b", ELSEWHERE)
                with pytest.raises(PeerLostError):
                    await asyncio.wait_for(waiting, AT_ONCE_S)

    run(main())


def test_a_node_that_listens_anew_is_reached_there() -> None:
    async def main() -> None:
        async def answer(peer: Peer[Message], opening: Opening) -> None:
            await peer.send(Refused("as asked"))

        async with known_as("b", {}) as other, known_as("a", {"b": other.address}) as one:
            other.attend(0, answer)
            await wait_for_word(one, "b")
            before = other.address
            other.listen(listen("127.0.0.1", ""))
            assert other.address != before
            one.moved("b", other.address)
            await wait_for_word(one, "b")
            one.moved("b", before)
            with pytest.raises(PeerLostError):
                await wait_for_word(one, "b")

    run(main())


def test_a_node_that_is_not_wanted_any_more_is_forgotten() -> None:
    async def main() -> None:
        async with known_as("a", {"b": ELSEWHERE, "c": ELSEWHERE}) as one:
            assert [found.target for found in await one.find_unreachable()] == ["b", "c"]
            one.forget_all_but({"a", "c"})
            assert [found.target for found in await one.find_unreachable()] == ["c"]
            with pytest.raises(PeerLostError, match="its address is not known"):
                await wait_for_word(one, "b")

    run(main())


def test_a_connection_in_the_making_ends_when_its_node_is_replaced() -> None:
    async def main() -> None:
        with socket.socket() as nobody:
            nobody.bind(("127.0.0.1", 0))
            nobody.listen()
            nobody.setblocking(False)
            async with known_as("a", {"b": Address(*nobody.getsockname())}) as one:
                waiting = asyncio.ensure_future(wait_for_word(one, "b"))
                connection, _ = await asyncio.get_running_loop().sock_accept(nobody)
                with connection:
                    one.moved("b", ELSEWHERE)
                    with pytest.raises(PeerLostError, match="it is not at 127"):
                        await asyncio.wait_for(waiting, AT_ONCE_S)

    run(main())
