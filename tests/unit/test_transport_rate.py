"""The rate limit, on a clock of the test's own."""

from __future__ import annotations

import asyncio
import math
import random

import pytest

from mnemo.transport.rate import RateLimit


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        raise AssertionError("the time of day is nothing to a rate")


def test_who_takes_waits_for_those_before() -> None:
    clock = Clock()
    limit = RateLimit(1000, clock)
    assert limit.reserve(500) == 0
    assert limit.reserve(2000) == pytest.approx(0.5)
    assert limit.reserve(1) == pytest.approx(2.5)
    clock.now += 2.4
    assert limit.reserve(1) == pytest.approx(0.101)


def test_unused_rate_is_not_saved_up() -> None:
    clock = Clock()
    limit = RateLimit(1000, clock)
    limit.reserve(1000)
    clock.now += 3600
    assert limit.reserve(1000) == 0
    assert limit.reserve(1000) == pytest.approx(0.9), "a tenth of a second is"


def test_over_time_the_rate_is_met_exactly(seed: int) -> None:
    chance, clock = random.Random(seed), Clock()
    limit = RateLimit(1e6, clock)
    start, sent = clock.now, 0
    while clock.now < start + 100:
        size = chance.randrange(1, 200_000)
        # A sender that wakes up to 20 ms late each time.
        clock.now += limit.reserve(size) + chance.uniform(0, 0.02)
        sent += size
    assert sent == pytest.approx(1e6 * (clock.now - start), rel=0.01)


def test_the_rate_can_be_changed() -> None:
    clock = Clock()
    limit = RateLimit(1000, clock)
    limit.reserve(1000)
    limit.change(10)
    assert limit.reserve(10) == pytest.approx(1), "what was taken before stays"
    assert limit.reserve(1) == pytest.approx(2)
    limit.change(math.inf)
    clock.now += 10
    assert [limit.reserve(10**12) for _ in range(3)] == [0, 0, 0]


@pytest.mark.parametrize("rate", [0, -1, math.nan])
def test_a_rate_lets_something_through(rate: float) -> None:
    with pytest.raises(ValueError, match="lets nothing through"):
        RateLimit(rate)


def test_senders_that_share_a_limit_have_it_together() -> None:
    async def main() -> float:
        limit = RateLimit(100_000)
        loop = asyncio.get_running_loop()
        start = loop.time()

        async def sender() -> None:
            for _ in range(4):
                await limit.take(1000)

        await asyncio.gather(*(sender() for _ in range(8)))
        return loop.time() - start

    # 31 waits of 10 ms each, less the tenth of a second that may be saved up.
    assert 0.2 <= asyncio.run(main()) < 5
