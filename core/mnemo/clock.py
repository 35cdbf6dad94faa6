"""Time as a dependency, so that tests inject their own."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """What the code may ask about time."""

    def monotonic(self) -> float:
        """Seconds from an arbitrary origin that never goes back."""
        ...

    def time(self) -> float:
        """Seconds since the Unix epoch."""
        ...


class SystemClock:
    """The machine's own clock."""

    def monotonic(self) -> float:
        """See `Clock.monotonic`."""
        return time.monotonic()

    def time(self) -> float:
        """See `Clock.time`."""
        return time.time()
