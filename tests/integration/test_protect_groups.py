"""Generations protected and rebuilt by members in one process, over real sockets."""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING

import protect_lab as lab
import pytest

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
