"""Generations protected and rebuilt by members in one process, over real sockets."""

from __future__ import annotations

import asyncio
import os
import random
from typing import TYPE_CHECKING

import protect_lab as lab
import pytest

from mnemo.errors import ShardsLostError

if TYPE_CHECKING:
    from collections.abc import Coroutine


def run(main: Coroutine[object, object, None]) -> None:
    asyncio.run(asyncio.wait_for(main, 120))


@pytest.mark.parametrize(
    ("number", "parities"), [(2, 1), (3, 1), (4, 1), (4, 2), (5, 3), (8, 2), (9, 4)]
)
def test_what_is_lost_comes_back_equal(number: int, parities: int, seed: int) -> None:
    chance = random.Random(seed)

    async def main() -> None:
        async with lab.group_of(number, parities) as nodes:
            for node in nodes:
                ranks = chance.randint(1, 3)
                node.commit(7, [chance.randrange(300_000) for _ in range(ranks)], seed)
            await lab.all_protected(nodes, 7)
            lost = chance.sample(range(number), parities)
            before = {position: nodes[position].memory.hashes(7) for position in lost}
            for position in lost:
                await lab.replace(nodes, position)
            came = await asyncio.gather(*(nodes[p].protector.rebuild() for p in lost))
            for position, standing in zip(lost, came, strict=True):
                node = nodes[position]
                assert standing is not None
                assert (standing.tick, standing.step) == (7, 70)
                assert node.memory.hashes(7) == before[position]
                assert node.protector.progress.done == node.protector.progress.total > 0
                node.protector.start()

            for node in nodes:  # the group is what it was: it goes on
                node.commit(8, [100_000], seed)
            await lab.all_protected(nodes, 8)

    run(main())


def test_one_loss_after_the_other(seed: int) -> None:
    """What came back is as good as what was there before: it helps to bring back others."""

    async def main() -> None:
        async with lab.group_of(4, 1) as nodes:
            for node in nodes:
                node.commit(1, [100_000, 3], seed)
            await lab.all_protected(nodes, 1)
            for position in (1, 2, 3, 0, 1):
                before = nodes[position].memory.hashes(1)
                node = await lab.replace(nodes, position)
                await node.protector.rebuild()
                node.protector.start()
                assert node.memory.hashes(1) == before

    run(main())


@pytest.mark.parametrize(("limit", "counts"), [(None, False), (1e12, True)])
def test_only_a_rate_that_was_asked_for_holds_for_a_rebuild(
    limit: float | None, counts: bool, seed: int
) -> None:
    """Training waits for it, so nothing has to be left to training."""

    async def main() -> None:
        async with lab.group_of(3, 1) as nodes:
            for node in nodes:
                node.commit(1, [100_000], seed)
            await lab.all_protected(nodes, 1)
            node = await lab.replace(nodes, 1)
            taken = []
            for other in nodes:
                other.neighbours.limit(limit)
                reserve = other.neighbours.rate.reserve
                other.neighbours.rate.reserve = lambda n, reserve=reserve: (
                    taken.append(n) or reserve(n)
                )
            await node.protector.rebuild()
            assert bool(taken) is counts

    run(main())


def test_generation_after_generation_in_two_sets_of_memory(seed: int) -> None:
    """Older ones are let go of, in the fit's memory too; sizes may change on the way."""
    chance = random.Random(seed)

    async def main() -> None:
        async with lab.group_of(4, 2) as nodes:
            for tick in range(12):
                size = 200_000 if tick < 8 else 400_000
                for node in nodes:
                    node.commit(tick, [chance.randrange(size) for _ in range(2)], seed)
                await lab.all_protected(nodes, tick)
                for node in nodes:
                    pinned = +node.memory.pins
                    assert set(pinned) <= {tick - 1, tick}
                    assert pinned[tick] == 1
                    for old in set(node.memory.generations) - set(pinned):
                        node.memory.drop(old)
            plan_bytes = 2 * 400_000 + 4 * 8192  # of two ranks
            for node in nodes:
                assert node.protector.status()["memory"] <= 2 * plan_bytes
                assert node.protector.status()["step"] == 110

    run(main())


def test_only_what_all_hold_is_protected(seed: int) -> None:
    async def main() -> None:
        async with lab.group_of(3, 1) as nodes:
            for node in nodes[:2]:
                node.commit(5, [9000], seed)
            for node in nodes:
                node.commit(4, [9000], seed)
            await lab.all_protected(nodes, 4)
            assert {node.protector.standing.tick for node in nodes} == {4}
            nodes[2].commit(5, [9000], seed)
            await lab.all_protected(nodes, 5)

    run(main())


def test_a_generation_of_other_steps_is_another_one(seed: int) -> None:
    async def main() -> None:
        async with lab.group_of(2, 1) as nodes:
            for number, node in enumerate(nodes):
                node.commit(5, [9000], seed, step=50 + number)
                node.commit(3, [9000], seed)
            await lab.all_protected(nodes, 3)
            assert {node.protector.standing.tick for node in nodes} == {3}

    run(main())


def test_training_that_goes_back_is_protected_anew(seed: int) -> None:
    async def main() -> None:
        async with lab.group_of(3, 1) as nodes:
            for node in nodes:
                node.commit(9, [50_000], seed)
            await lab.all_protected(nodes, 9)
            for node in nodes:
                node.memory.drop(9)
                node.commit(8, [50_000], seed)
                await node.protector.forget_after(8)
                assert node.protector.standing.tick == -1
            await lab.all_protected(nodes, 8)
            for node in nodes:
                node.commit(9, [50_000], seed + 1)
            await lab.all_protected(nodes, 9)
            before = nodes[1].memory.hashes(9)
            await lab.replace(nodes, 1)
            await nodes[1].protector.rebuild()
            assert nodes[1].memory.hashes(9) == before

    run(main())


def test_a_fresh_group_has_nothing_to_rebuild() -> None:
    async def main() -> None:
        async with lab.group_of(3, 1, start=False) as nodes:
            assert [await node.protector.rebuild() for node in nodes] == [None] * 3

    run(main())


def test_more_losses_than_parities_are_named(seed: int) -> None:
    async def main() -> None:
        async with lab.group_of(4, 1) as nodes:
            for node in nodes:
                node.commit(1, [10_000], seed)
            await lab.all_protected(nodes, 1)
            await lab.replace(nodes, 1)
            await lab.replace(nodes, 3)
            with pytest.raises(ShardsLostError, match=r"2 of 4 nodes have .*: node1, node3; "):
                await nodes[1].protector.rebuild()
            for node in nodes:
                assert node.memory.pins[1] == (node not in (nodes[1], nodes[3]))

    run(main())


def test_generations_of_one_number_are_not_mixed(seed: int) -> None:
    """Nodes of two groups that have the same names, and keep the same epoch of other bytes."""

    async def main() -> None:
        async with lab.group_of(4, 2) as nodes, lab.group_of(4, 2) as others:
            for number, group in enumerate((nodes, others)):
                for node in group:
                    node.commit(1, [100_000], seed + number)
                await lab.all_protected(group, 1)
            before = nodes[3].memory.hashes(1)
            await nodes[1].close()
            nodes[1] = others.pop(1)
            replacement = await lab.replace(nodes, 3)
            assert await replacement.protector.rebuild() is not None
            assert replacement.memory.hashes(1) == before

            await lab.replace(nodes, 2)
            replacement = await lab.replace(nodes, 3)
            with pytest.raises(ShardsLostError, match=r"3 of 4 nodes have .*: node1, node2, node3"):
                await replacement.protector.rebuild()

    run(main())


def test_a_damaged_fragment_counts_as_missing(seed: int) -> None:
    """With two parities a lost node comes back past one damaged; with two damaged it does not."""

    async def main() -> None:
        async with lab.group_of(4, 2) as nodes:
            for node in nodes:
                node.commit(1, [300_000], seed)
            await lab.all_protected(nodes, 1)
            before = nodes[0].memory.hashes(1)
            _damage(nodes[2])
            node = await lab.replace(nodes, 0)
            await node.protector.rebuild()
            assert node.memory.hashes(1) == before

            _damage(nodes[1])
            _damage(nodes[3])
            node = await lab.replace(nodes, 0)
            with pytest.raises(ShardsLostError, match="damaged"):
                await node.protector.rebuild()

    run(main())


def _damage(node: lab.Node) -> None:
    """Flip bits all over a node's segment, but not in its header."""
    fd = node.memory.generations[1][2][0]
    for offset in range(4096, 300_000, 10_000):
        os.pwrite(fd, bytes([os.pread(fd, 1, offset)[0] ^ 0x55]), offset)


def test_no_memory_for_parities_voids_attempts_and_nothing_else(seed: int) -> None:
    async def main() -> None:
        async with lab.group_of(3, 1, most=100_000) as nodes:
            for node in nodes:
                node.commit(1, [100_000], seed)
            await lab.all_protected(nodes, 1)
            for node in nodes:
                node.commit(2, [1_000_000], seed)
            while not all("too many" in node.protector.status()["failure"] for node in nodes):
                await asyncio.sleep(0.01)
            for node in nodes:
                assert node.protector.standing.tick == 1
                node.commit(3, [100_000], seed)
            await lab.all_protected(nodes, 3)

    run(main())
