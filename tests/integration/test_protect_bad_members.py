"""Members and strangers that break the protocol: each is refused, the group goes on."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any

import protect_lab as lab
import pytest

from mnemo.errors import PeerLostError, ProtectionError
from mnemo.protect import Neighbours
from mnemo.protect.messages import (
    Ask,
    Chunk,
    Describe,
    Digests,
    Holds,
    Join,
    Offer,
    Protected,
    Read,
    Rebuild,
    Refused,
    Stored,
    Void,
)
from mnemo.transport.address import listen
from mnemo.transport.handshake import Identity

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine

    from mnemo.protect.messages import Message, Opening
    from mnemo.transport.peer import Peer


def run(main: Coroutine[object, object, None]) -> None:
    asyncio.run(asyncio.wait_for(main, 60))


@contextlib.asynccontextmanager
async def known_as(name: str, nodes: list[lab.Node]) -> AsyncIterator[Neighbours]:
    """Somebody with the run's secret and a name."""
    me = Identity(node=name, run="lab", secret=lab.SECRET)
    addresses = {node.neighbours.name: node.neighbours.address for node in nodes}
    neighbours = Neighbours(me, listen("127.0.0.1", ""), addresses, rules=lab.QUICK)
    try:
        yield neighbours
    finally:
        await neighbours.close()


async def answer_to(neighbours: Neighbours, node: str, opening: Any) -> Message:
    async with neighbours.call(node, opening) as peer:
        return (await asyncio.wait_for(peer.receive(), lab.PATIENCE_S)).message


OPENINGS = [
    ("node9", Ask(0), "node9 is not in the group"),
    ("node1", Ask(5), "fit 5 is not protected on node0"),
    ("node1", Stored(), "Stored begins nothing"),
    ("node1", Describe(0, 77), "epoch 77 is not kept by node0"),
    ("node1", Read(0, 77, 0, 0, 9), "epoch 77 is not kept by node0"),
    ("node1", Read(0, 0, 4, 0, 9), "fragment 0 of stripe 4: there are 4"),
    ("node1", Read(0, 0, -1, 0, 9), "fragment 0 of stripe -1"),
    ("node1", Rebuild(0, 0, 0, 4, 0, 9, ()), "fragment 4 of stripe 0: there are 4"),
    ("node1", Rebuild(0, 0, 0, 0, 0, 9, lab.names(4)), "cannot be computed .* 0 good fragments"),
    ("node1", Offer(0, 1, 9, 0), "fragment 0 of stripe 9: there are 4"),
    ("node1", Offer(0, 1, 0, 3), "fragment 3 of stripe 0 does not go from node1 to node0"),
    ("node1", Offer(0, 1, 1, 0), "fragment 0 of stripe 1 does not go from node1 to node0"),
    ("node2", Offer(0, 1, 0, 0), "epoch 1 is not under way here"),
]


@pytest.mark.parametrize(("name", "opening", "why"), OPENINGS)
def test_what_begins_wrongly_is_refused(name: str, opening: Opening, why: str, seed: int) -> None:
    async def main() -> None:
        async with lab.group_of(4, 2) as nodes:
            for node in nodes:
                node.commit(1, [50_000], seed)
            await lab.all_protected(nodes, 1)
            async with known_as(name, nodes) as somebody:
                refusal = await answer_to(somebody, "node0", opening)
            assert isinstance(refusal, Refused)
            with pytest.raises(ProtectionError, match=why):
                raise ProtectionError(refusal.why)
            for node in nodes:
                node.commit(2, [50_000], seed)
            await lab.all_protected(nodes, 2)

    run(main())


def test_only_the_first_node_leads(seed: int) -> None:
    async def main() -> None:
        async with lab.group_of(3, 1) as nodes, known_as("node2", nodes) as somebody:
            refusal = await answer_to(somebody, "node1", Join(0))
            assert isinstance(refusal, Refused)
            assert "node1 does not lead, or not yet" in refusal.why

    run(main())


@pytest.mark.parametrize("word", [Protected(3), Stored(), Chunk(1)])
def test_a_member_that_talks_nonsense_is_no_member_any_more(word: Message, seed: int) -> None:
    async def main() -> None:
        async with lab.group_of(3, 1) as nodes:
            async with (
                known_as("node2", nodes) as somebody,
                somebody.call("node0", Join(0)) as peer,
            ):
                await peer.send(word)
                while not isinstance((await peer.receive()).message, Refused):
                    pass
            await goes_on(nodes, seed)

    run(main())


async def goes_on(nodes: list[lab.Node], seed: int) -> None:
    for node in nodes:
        node.commit(50, [60_000], seed)
    await lab.all_protected(nodes, 50)


async def _wrong_number(self: Neighbours, peer: Peer[Message], number: int, data: Any) -> int:
    return await peer.send(Chunk(number + 1), data) or 0


async def _too_short(self: Neighbours, peer: Peer[Message], number: int, data: Any) -> int:
    return await peer.send(Chunk(number), data[:-1]) or 0


async def _no_bytes(self: Neighbours, peer: Peer[Message], number: int, data: Any) -> int:
    return await peer.send(Chunk(number)) or 0


async def _another_message(self: Neighbours, peer: Peer[Message], number: int, data: Any) -> int:
    return await peer.send(Digests(), data) or 0


async def _other_digest(self: Neighbours, peer: Peer[Message], number: int, data: Any) -> int:
    return (await peer.send(Chunk(number), data) or 0) ^ 1


async def _hang_up(self: Neighbours, peer: Peer[Message], number: int, data: Any) -> int:
    await peer.close()
    raise PeerLostError(peer.node, "hung up")


@pytest.mark.parametrize("bad", [0, 2])
@pytest.mark.parametrize(
    "sending",
    [_wrong_number, _too_short, _no_bytes, _another_message, _other_digest, _hang_up],
)
def test_a_member_that_sends_wrongly_voids_the_attempt_alone(
    sending: Callable[..., Any], bad: int, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        async with lab.group_of(4, 2) as nodes:
            for node in nodes:
                node.commit(1, [50_000], seed)
            await lab.all_protected(nodes, 1)
            neighbours = nodes[bad].neighbours
            with monkeypatch.context() as patch:
                patch.setattr(neighbours, "send_chunk", sending.__get__(neighbours))
                for node in nodes:
                    node.commit(2, [50_000], seed)
                while not any(node.protector.status()["failure"] for node in nodes):
                    await asyncio.sleep(0.01)
            for node in nodes:
                assert node.protector.standing.tick == 1
                assert node.memory.pins[1] == 1
            await lab.all_protected(nodes, 2)
            for node in nodes:
                assert +node.memory.pins == {2: 1}

    run(main())


def test_a_fragment_offered_a_second_time_is_refused(seed: int) -> None:
    async def main() -> None:
        async with lab.group_of(4, 2, bytes_per_s=1e5) as nodes:
            for node in nodes:
                node.commit(1, [500_000], seed)
            while not all(node.neighbours.sent for node in nodes):
                await asyncio.sleep(0.01)
            async with known_as("node2", nodes) as somebody:
                refusal = await answer_to(somebody, "node0", Offer(0, 0, 0, 0))
            assert isinstance(refusal, Refused)
            assert refusal.why.startswith("node2 offers fragment 0 of stripe 0 a second time")
            for node in nodes:
                node.neighbours.rate.change(float("inf"))
            await lab.all_protected(nodes, 1)
            assert {node.protector.standing.epoch for node in nodes} == {0}

    run(main())


def test_a_member_that_lies_about_its_size_is_refused_its_memory(seed: int) -> None:
    """Its shard would need more parity memory than the others can have."""

    async def main() -> None:
        async with lab.group_of(3, 1, most=1 << 20) as nodes:
            with pytest.MonkeyPatch.context() as patch:
                honest = nodes[1].memory.pin

                def lie(tick: int) -> Any:
                    shard = honest(tick)
                    assert shard is not None
                    piece = shard.pieces[0]
                    shard.pieces = (type(piece)(piece.rank, 1 << 40, 1 << 40),)
                    return shard

                patch.setattr(nodes[1].memory, "pin", lie)
                for node in nodes:
                    node.commit(1, [50_000], seed)
                honest_ones = (nodes[0], nodes[2])
                while not all("too many" in n.protector.status()["failure"] for n in honest_ones):
                    await asyncio.sleep(0.01)
            await lab.all_protected(nodes, 1)

    run(main())


def test_a_leader_of_another_group_is_not_obeyed(seed: int) -> None:
    """Nodes that were told different groups protect nothing, and say so."""

    async def main() -> None:
        async with lab.group_of(3, 1, start=False) as nodes:
            await nodes[2].close()
            nodes[2] = lab.Node("node2", lab.divided(3, 2))
            lab.acquaint(nodes)
            for node in nodes:
                node.protector.start()
                node.commit(1, [50_000], seed)
            while "with 2" not in nodes[2].protector.status()["failure"]:
                await asyncio.sleep(0.01)
            assert {node.protector.standing.tick for node in nodes} == {-1}

    run(main())


def test_a_member_of_another_version_is_named_and_voids_nothing(seed: int) -> None:
    """A node on which another mnemo is installed; each says so, and what to do."""

    def commit(tick: int) -> None:
        sizes = {str(node.position): [50_000] for node in nodes}
        lab.everybody(nodes, "commit", tick=tick, sizes=sizes, seed=seed)

    with lab.processes(3, 1) as nodes:
        lab.everybody(nodes, "start")
        commit(1)
        lab.everybody(nodes, "protected", tick=1)
        hashes = nodes[2].ask("hashes", tick=1)

        nodes[2].kill()
        nodes[2] = lab.NodeProcess(2, 3, 1, protocol=2)
        lab.introduce(nodes)
        for node, theirs, ours in ((nodes[0], 2, 1), (nodes[1], 2, 1), (nodes[2], 1, 2)):
            told = [line for line in node.ask("reach") if "version" in line]
            assert len(told) == (2 if node is nodes[2] else 1)
            for line in told:
                assert line.endswith(
                    f"speaks protocol version {theirs}, this node version {ours}: install the same "
                    "version of mnemo on all nodes"
                )
        with pytest.raises(RuntimeError, match="ShardsLostError"):
            nodes[2].ask("rebuild")
        for node in nodes[:2]:
            assert node.ask("status")["tick"] == 1

        nodes[2].kill()
        nodes[2] = lab.NodeProcess(2, 3, 1)
        lab.introduce(nodes)
        assert nodes[2].ask("rebuild") == 1
        assert nodes[2].ask("hashes", tick=1) == hashes


def test_a_member_that_says_it_has_what_it_has_not(seed: int) -> None:
    async def main() -> None:
        async with lab.group_of(3, 1) as nodes:
            for node in nodes[:2]:
                node.commit(1, [50_000], seed)
            await nodes[2].close()
            async with (
                known_as("node2", nodes) as somebody,
                somebody.call("node0", Join(0)) as peer,
            ):
                address = (somebody.address.host, somebody.address.port)
                await peer.send(Holds({1: 10}, {}, -1, 7, address))
                while not isinstance((await peer.receive()).message, Void):
                    pass
            nodes[2] = lab.Node("node2", lab.divided(3, 1))
            lab.acquaint(nodes)
            nodes[2].protector.start()
            await goes_on(nodes, seed)

    run(main())
