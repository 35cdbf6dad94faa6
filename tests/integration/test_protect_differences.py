"""Generations of which much is as it was before: only what changed is sent."""

from __future__ import annotations

import asyncio
import os
import random
from typing import TYPE_CHECKING, Any

import protect_lab as lab
import pytest

from mnemo.protect.messages import Chunk, Generation
from mnemo.protect.plan import Plan

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from mnemo.protect import Neighbours

SIZES = [600_000, 700_001]
"""Bytes of the ranks' bulks."""


def run(main: Coroutine[object, object, None]) -> None:
    asyncio.run(asyncio.wait_for(main, 120))


async def protect(nodes: list[lab.Node], tick: int, seed: int, **options: Any) -> list[int]:
    """Have all commit and protect a generation; bytes that each sent for it."""
    before = [node.neighbours.sent for node in nodes]
    sizes = options.pop("sizes", SIZES)
    for node in nodes:
        node.commit(tick, sizes, seed, **options)
    await lab.all_protected(nodes, tick)
    return [node.neighbours.sent - old for node, old in zip(nodes, before, strict=True)]


def plan_of(nodes: list[lab.Node], tick: int, parities: int) -> Plan:
    pieces = tuple(tuple(node.memory.generations[tick][1]) for node in nodes)
    return Plan(Generation(0, tick, 0, lab.names(len(nodes)), parities, lab.CHUNK, pieces))


def whole(nodes: list[lab.Node], tick: int, parities: int) -> list[int]:
    """Bytes that leave each node when all is sent."""
    plan = plan_of(nodes, tick, parities)
    return [plan.sent_by(position) for position in range(len(nodes))]


def differing(nodes: list[lab.Node], tick: int, parities: int) -> list[int]:
    """Bytes of the chunks that are not as in the generation before: data, and parities by hubs."""
    plan = plan_of(nodes, tick, parities)
    shards = [[shard_of(node, tick - back) for back in (0, 1)] for node in nodes]
    sent = [0] * len(nodes)
    for stripe in plan.group.stripes:
        for chunk in range(plan.chunks(stripe.number)):
            changed = False
            for index, position in enumerate(stripe.data):
                start = plan.shard_offset(position, stripe.number) + chunk * lab.CHUNK
                stop = start + plan.length(stripe.number, index, chunk)
                new, old = (shard[start:stop] for shard in shards[position])
                if new != old:
                    sent[position] += stop - start
                    changed = True
            if changed:
                sent[stripe.hub] += (parities - 1) * plan.stripe_length(stripe.number, chunk)
    return sent


def shard_of(node: lab.Node, tick: int) -> bytes:
    """All of a node's segments, as they are laid out."""
    shard = node.memory.pin(tick)
    assert shard is not None
    node.memory.unpin(tick)
    content = memoryview(bytearray(shard.size))
    shard.read(0, content)
    shard.close()
    return bytes(content)


async def all_come_back(nodes: list[lab.Node], tick: int, lost: list[int]) -> None:
    """Lose nodes, have them rebuilt, and take part again."""
    before = {position: nodes[position].memory.hashes(tick) for position in lost}
    for position in lost:
        await lab.replace(nodes, position)
    for position in lost:
        standing = await nodes[position].protector.rebuild()
        assert standing is not None
        assert standing.tick == tick
        assert nodes[position].memory.hashes(tick) == before[position]
    for position in lost:
        nodes[position].protector.start()


@pytest.mark.parametrize("frozen", [0, 0.5, 0.9, 1])
@pytest.mark.parametrize(
    ("number", "parities"), [(4, 1), (4, 2), pytest.param(8, 2, marks=pytest.mark.campaign)]
)
def test_what_did_not_change_is_not_sent(
    number: int, parities: int, frozen: float, seed: int
) -> None:
    """The first two generations show how much it is; then differences alone travel."""

    async def main() -> None:
        async with lab.group_of(number, parities) as nodes:
            for tick in (1, 2):
                sent = await protect(nodes, tick, seed, frozen=frozen)
                assert sent == whole(nodes, tick, parities)
            for tick in (3, 4, 5):
                sent = await protect(nodes, tick, seed, frozen=frozen)
                assert sent == differing(nodes, tick, parities)
                assert sum(sent) <= sum(whole(nodes, tick, parities)) * (1 - frozen / 3)
            lost = random.Random(seed).sample(range(number), parities)
            await all_come_back(nodes, 5, lost)

            # Who came back does not know how much changes: all is sent once, to see it.
            sent = await protect(nodes, 6, seed, frozen=frozen)
            assert sent == whole(nodes, 6, parities)
            assert await protect(nodes, 7, seed, frozen=frozen) == differing(nodes, 7, parities)

    run(main())


@pytest.mark.parametrize(("number", "parities"), [(2, 1), (5, 3)])
def test_unequal_shards_and_any_losses(number: int, parities: int, seed: int) -> None:
    chance = random.Random(seed)

    async def main() -> None:
        async with lab.group_of(number, parities) as nodes:
            sizes = [[chance.randrange(200_000, 800_000) for _ in range(2)] for _ in nodes]
            for tick in range(1, 6):
                before = sum(node.neighbours.sent for node in nodes)
                for node, its in zip(nodes, sizes, strict=True):
                    node.commit(tick, its, seed, frozen=0.7)
                await lab.all_protected(nodes, tick)
            sent = sum(node.neighbours.sent for node in nodes) - before
            assert sent == sum(differing(nodes, 5, parities))
            await all_come_back(nodes, 5, chance.sample(range(number), parities))

    run(main())


@pytest.mark.parametrize("where", ["parities", "data"])
def test_damage_is_not_inherited(where: str, seed: int, caplog: pytest.LogCaptureFixture) -> None:
    """An attempt that meets a flipped bit in the base ends; the next makes all anew."""

    async def main() -> None:
        async with lab.group_of(4, 2) as nodes:
            for tick in (1, 2):
                await protect(nodes, tick, seed, frozen=0.9)
            memory = nodes[2].memory
            fds = memory.parities if where == "parities" else memory.generations[2][2]
            for fd in fds:
                for offset in range(8192, os.fstat(fd).st_size, lab.CHUNK):
                    os.pwrite(fd, bytes([os.pread(fd, 1, offset)[0] ^ 1]), offset)
            for node in nodes:
                node.commit(3, SIZES, seed, frozen=0.9)
            await lab.all_protected(nodes, 3)
            assert "is damaged" in caplog.text
            assert "generation 3 is not protected yet" in caplog.text
            await all_come_back(nodes, 3, [0, 1])

    run(main())


def test_another_shape_is_sent_whole(seed: int) -> None:
    async def main() -> None:
        async with lab.group_of(4, 1) as nodes:
            for tick in (1, 2, 3):
                sent = await protect(nodes, tick, seed, frozen=0.9)
            assert sum(sent) < 0.5 * sum(whole(nodes, 3, 1))
            larger = [SIZES[0], SIZES[1] + 5000]
            for tick in (4, 5):
                sent = await protect(nodes, tick, seed, frozen=0.9, sizes=larger)
                assert sent == whole(nodes, tick, 1)
            sent = await protect(nodes, 6, seed, frozen=0.9, sizes=larger)
            assert sent == differing(nodes, 6, 1)
            await all_come_back(nodes, 6, [3])

    run(main())


def test_training_that_goes_back_is_compared_with_what_is_left(seed: int) -> None:
    async def main() -> None:
        async with lab.group_of(3, 1) as nodes:
            for tick in (1, 2, 3):
                await protect(nodes, tick, seed, frozen=0.9)
            for node in nodes:
                node.memory.drop(3)
            for node in nodes:
                await node.protector.forget_after(2)
            await lab.all_protected(nodes, 2)
            for tick in (3, 4, 5):
                await protect(nodes, tick, seed, frozen=0.9, step=100 + tick)
            assert sum(await protect(nodes, 6, seed, frozen=0.9)) == sum(differing(nodes, 6, 1))
            await all_come_back(nodes, 6, [1])

    run(main())


def test_what_stops_changing_and_what_starts(seed: int) -> None:
    """How a generation is sent is decided by how much of the one before was new."""

    async def main() -> None:
        async with lab.group_of(4, 1) as nodes:
            ways = []
            for tick, frozen in enumerate([0, 0, 1, 1, 1, 0, 0]):
                sent = await protect(nodes, tick, seed, frozen=frozen)
                ways.append(sum(sent) == sum(whole(nodes, tick, 1)))
            # The sixth is differences too, each as long as what they are of.
            assert ways == [True, True, True, True, False, True, True]
            await all_come_back(nodes, 6, [2])

    run(main())


def test_who_says_unchanged_of_what_changed_is_found_out(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def lie(self: Neighbours, peer: Any, number: int, data: memoryview) -> int:
        await peer.send(Chunk(number))
        return 0

    async def main() -> None:
        async with lab.group_of(4, 2) as nodes:
            for tick in (1, 2):
                await protect(nodes, tick, seed, frozen=0.9)
            neighbours = nodes[1].neighbours
            with monkeypatch.context() as patch:
                patch.setattr(neighbours, "send_chunk", lie.__get__(neighbours))
                for node in nodes:
                    node.commit(3, SIZES, seed, frozen=0.9)
                while not any("travelled" in n.protector.status()["failure"] for n in nodes):
                    await asyncio.sleep(0.01)
            assert {node.protector.standing.tick for node in nodes} == {2}
            await lab.all_protected(nodes, 3)
            await all_come_back(nodes, 3, [0, 2])

    run(main())
