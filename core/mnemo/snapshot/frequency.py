"""How often to take a snapshot: a fixed interval, or what a share of step time can pay for."""

from __future__ import annotations

import math
import statistics
from collections import deque
from typing import Final

_MEMORY: Final = 40
_ENOUGH: Final = 4
_SETTLING: Final = 2
_LONGEST: Final = 10_000


class Cadence:
    """Chooses the steps between two snapshots. One rank decides, the others follow.

    With an overhead budget, the added time of a snapshot is the median duration of steps that one
    ran beside, less that of the others; until enough of both were seen, the measured copy time
    stands in for it, which is the worst case (no core free).
    """

    def __init__(self, every: int | None, overhead: float) -> None:
        """Fixed at ``every`` steps, or within ``overhead`` (a fraction of step time)."""
        self._every = every
        self._overhead = overhead
        self._plain: deque[float] = deque(maxlen=_MEMORY)
        self._beside: deque[float] = deque(maxlen=_MEMORY)
        self._seen = 0

    def observe(self, seconds: float, *, beside: bool) -> None:
        """One step took ``seconds``; ``beside`` says that a snapshot was taken and copied in it."""
        if beside:
            self._seen += 1
            if self._seen <= _SETTLING:
                return  # the first ones allocate and fault memory in
        (self._beside if beside else self._plain).append(seconds)

    def added(self, copy_s: float) -> float:
        """Seconds that one snapshot adds, as far as is known; the newest copy took ``copy_s``."""
        if len(self._plain) < _ENOUGH or len(self._beside) < _ENOUGH:
            return copy_s
        return max(0.0, statistics.median(self._beside) - statistics.median(self._plain))

    def interval(self, copy_s: float) -> int:
        """Steps from one snapshot to the next."""
        if self._every is not None:
            return self._every
        if len(self._plain) < _ENOUGH:
            return _ENOUGH + 1  # first learn what a step takes without
        step = statistics.median(self._plain)
        if step <= 0:
            return 1
        return min(_LONGEST, max(1, math.ceil(self.added(copy_s) / (self._overhead * step))))
