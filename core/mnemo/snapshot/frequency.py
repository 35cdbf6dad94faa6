"""How often to take a snapshot: a fixed interval, or what a share of step time can pay for."""

from __future__ import annotations

import statistics
from collections import deque
from typing import Final

_MEMORY: Final = 40
_ENOUGH: Final = 4
_SETTLING: Final = 2
_LEARNING: Final = 2
"""Steps from one snapshot to the next while too little is known: every other step goes without."""
_LEAST: Final = 0.25
_LONGEST: Final = 10_000


class Cadence:
    """Chooses the steps between two snapshots. One rank decides, the others follow.

    With an overhead budget, the added time of a snapshot is the median duration of steps that one
    ran beside, less that of the others. It is learned in the first steps, at every other one. As
    step times vary by more than that, it is never taken for less than a quarter of the copy's own
    time, which is what a copy costs that has a core to itself.
    """

    def __init__(self, every: int | None, overhead: float) -> None:
        """Fixed at ``every`` steps, or within ``overhead`` (a fraction of step time)."""
        self._every = every
        self._overhead = overhead
        self._plain: deque[float] = deque(maxlen=_MEMORY)
        self._beside: deque[float] = deque(maxlen=_MEMORY)
        self._seen = 0
        self._owed = 0.0
        """Steps that the intervals so far were too short by: they are whole, the ideal is not."""

    def observe(self, seconds: float, *, beside: bool) -> None:
        """One step took ``seconds``; ``beside`` says that a snapshot was taken and copied in it."""
        if beside:
            self._seen += 1
            if self._seen <= _SETTLING:
                return  # the first ones allocate and fault memory in
        (self._beside if beside else self._plain).append(seconds)

    def added(self, copy_s: float = 0.0) -> float | None:
        """Seconds that one snapshot adds; None as long as that is not known.

        Args:
            copy_s: Seconds that the newest copy took in its own thread.
        """
        if len(self._plain) < _ENOUGH or len(self._beside) < _ENOUGH:
            return None
        seen = statistics.median(self._beside) - statistics.median(self._plain)
        return max(seen, _LEAST * copy_s, 0.0)

    def interval(self, copy_s: float = 0.0) -> int:
        """Steps from one snapshot to the next; ``copy_s`` as for `added`."""
        if self._every is not None:
            return self._every
        added = self.added(copy_s)
        step = statistics.median(self._plain) if self._plain else 0.0
        if added is None or step <= 0:
            return _LEARNING
        ideal = min(float(_LONGEST), max(1.0, added / (self._overhead * step)))
        chosen = max(1, round(ideal + self._owed))
        self._owed += ideal - chosen
        return chosen
