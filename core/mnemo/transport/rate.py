"""A limit on bytes per second that several senders share."""

from __future__ import annotations

import asyncio
from typing import Final

from mnemo.clock import Clock, SystemClock

_SAVED_S: Final = 0.1
"""For how long unused rate is kept: a sender that wakes late loses none."""


class RateLimit:
    """A token bucket. Who takes waits for those before it; the first never waits."""

    def __init__(self, bytes_per_s: float, clock: Clock | None = None) -> None:
        """Begin with an empty queue.

        Args:
            bytes_per_s: Above 0; infinite for no limit.
            clock: For tests.

        Raises:
            ValueError: The rate is not above 0.
        """
        self._clock = clock or SystemClock()
        self._free_at = self._clock.monotonic()
        self.change(bytes_per_s)

    def change(self, bytes_per_s: float) -> None:
        """Set the rate for whoever takes from here on.

        Raises:
            ValueError: The rate is not above 0.
        """
        if not bytes_per_s > 0:
            raise ValueError(f"a rate of {bytes_per_s} bytes/s lets nothing through")
        self._bytes_per_s = bytes_per_s

    def reserve(self, count: int) -> float:
        """Take ``count`` bytes, and return in how many seconds they may be sent."""
        now = self._clock.monotonic()
        start = max(self._free_at, now - _SAVED_S)
        self._free_at = start + count / self._bytes_per_s
        return max(0.0, start - now)

    async def take(self, count: int) -> None:
        """Wait until ``count`` bytes may be sent. Given up while waiting, they are lost."""
        wait = self.reserve(count)
        if wait > 0:
            await asyncio.sleep(wait)
