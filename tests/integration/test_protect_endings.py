"""Members that are told to end at any instant: they do, and give everything back."""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING

import protect_lab as lab
import pytest

from mnemo.errors import PeerLostError
from mnemo.protect.tasks import cancel, ended, together

if TYPE_CHECKING:
    from collections.abc import Coroutine


def run(main: Coroutine[object, object, None]) -> None:
    asyncio.run(main)


async def turns(number: int) -> None:
    for _ in range(number):
        await asyncio.sleep(0)


async def for_ever() -> None:
    await asyncio.Event().wait()


@pytest.mark.parametrize("later", range(6))
def test_a_cancellation_counts_though_a_part_has_just_failed(later: int) -> None:
    async def main() -> None:
        lost = asyncio.Event()

        async def fail() -> None:
            await lost.wait()
            lost.clear()
            raise PeerLostError("b", "hung up")

        async def try_again() -> None:
            while True:
                try:
                    await together(fail(), for_ever())
                except PeerLostError:
                    await asyncio.sleep(0)

        task = asyncio.ensure_future(try_again())
        await turns(3)
        lost.set()
        await turns(later)
        task.cancel()
        done, _ = await asyncio.wait({task}, timeout=lab.PATIENCE_S)
        assert done
        assert task.cancelled()

    run(main())


def test_the_first_failure_ends_the_others_and_is_raised() -> None:
    async def main() -> None:
        over = []

        async def stay() -> None:
            try:
                await for_ever()
            finally:
                await asyncio.sleep(0)
                over.append("stayed")

        async def fail() -> None:
            await asyncio.sleep(0)
            raise PeerLostError("b", "hung up")

        with pytest.raises(PeerLostError, match="hung up"):
            await together(stay(), fail(), stay())
        assert over == ["stayed"] * 2

    run(main())


def test_who_waits_for_an_end_leaves_after_it_though_cancelled() -> None:
    async def main() -> None:
        released, over = asyncio.Event(), []

        async def end_slowly() -> None:
            try:
                await for_ever()
            finally:
                await released.wait()
                over.append("ended")

        slow = asyncio.ensure_future(end_slowly())
        await turns(1)
        waiting = [asyncio.ensure_future(cancel(slow)), asyncio.ensure_future(ended(slow))]
        await turns(2)
        for one in waiting:
            one.cancel()
        await turns(3)
        assert not any(one.done() for one in waiting)
        released.set()
        await asyncio.wait(waiting)
        assert over == ["ended"]
        assert all(one.cancelled() for one in waiting)

    run(main())


def test_members_end_at_any_instant(seed: int) -> None:
    """All within some turns of the loop, so that connections fail while others are told to end."""
    chance = random.Random(seed)

    async def end(node: lab.Node) -> None:
        await turns(chance.randrange(100))
        await node.protector.close()
        assert not node.memory.pins.total(), "nothing is pinned by a protector that has ended"
        await turns(chance.randrange(20))
        await node.neighbours.close()
        node.memory.close()

    async def main() -> None:
        for number in range(60):
            async with lab.group_of(4, chance.choice((1, 2)), chunk=4096) as nodes:
                for node in nodes:
                    node.commit(1, [60_000], seed)
                await asyncio.sleep(chance.random() * 0.03)
                ends = [asyncio.ensure_future(end(node)) for node in nodes]
                nodes.clear()
                done, late = await asyncio.wait(ends, timeout=lab.PATIENCE_S)
                assert not late, f"round {number}: {len(late)} members do not end"
                for task in done:
                    task.result()

    run(main())
