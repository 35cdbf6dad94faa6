"""How often to take a snapshot: a fixed interval, or what a share of step time can pay for."""

from __future__ import annotations

import math
import statistics
from collections import deque
from typing import Final

_MEMORY: Final = 100
_ENOUGH: Final = 4
_SETTLING: Final = 2
_LEARNING: Final = 2
"""Steps from one snapshot to the next while too little is known: every other step goes without."""
_EXPECTED: Final = 1 / 6
"""Share of the copy's time that a snapshot adds where a core is free (``docs/adr/0002``)."""
_AIM: Final = 0.9
"""Share of the budget to be spent: it is a promise, and what is known errs to both sides."""
_LEAST: Final = 1 / 16
"""The same for the bare copy: what adds less is noise."""
_LONGEST: Final = 10_000
_ERROR_OF_MEDIAN: Final = 1.25 * 1.48
"""Standard error of a median of normal values, over their median deviation and 1 / sqrt(n)."""


class Cadence:
    """Chooses the steps between two snapshots. One rank decides, the others follow.

    With an overhead budget, what a snapshot adds is learned from pairs of steps, one without and
    the next one beside a copy: their median difference. Step times vary by more than that, so it
    counts as much as it is certain, and the rest is what is to be expected of a copy so long. It
    is learned in the first steps, at every other one.
    """

    def __init__(self, every: int | None, overhead: float) -> None:
        """Fixed at ``every`` steps, or within ``overhead`` (a fraction of step time)."""
        self._every = every
        self._overhead = overhead
        self._plain: deque[float] = deque(maxlen=_MEMORY)
        self._differences: deque[float] = deque(maxlen=_MEMORY)
        self._before: float | None = None
        """Seconds of the step before this one, if it went without."""
        self._seen = 0
        self._owed = 0.0
        """Steps that the intervals so far were too short by: they are whole, the ideal is not."""

    def observe(self, seconds: float, *, beside: bool) -> None:
        """One step took ``seconds``; ``beside`` says that a snapshot was taken and copied in it."""
        if not beside:
            self._plain.append(seconds)
            self._before = seconds
            return
        self._seen += 1
        if self._before is not None and self._seen > _SETTLING:  # the first fault memory in
            self._differences.append(seconds - self._before)
        self._before = None

    def added(self, copy_s: float = 0.0) -> float | None:
        """Seconds that one snapshot adds; None as long as that is not known.

        Args:
            copy_s: Seconds that the newest copy took in its own thread.
        """
        number = len(self._differences)
        if number < _ENOUGH:
            return None
        seen = statistics.median(self._differences)
        deviation = statistics.median(abs(d - seen) for d in self._differences)
        error = _ERROR_OF_MEDIAN * deviation / math.sqrt(number)
        expected = _EXPECTED * copy_s  # give or take as much again
        if expected:
            certain = expected**2 / (expected**2 + error**2)
            seen = certain * seen + (1 - certain) * expected
        return max(seen, _LEAST * copy_s, 0.0)

    def interval(self, copy_s: float = 0.0) -> int:
        """Steps from one snapshot to the next; ``copy_s`` as for `added`."""
        if self._every is not None:
            return self._every
        added = self.added(copy_s)
        step = statistics.median(self._plain) if self._plain else 0.0
        if added is None or step <= 0:
            return _LEARNING
        ideal = min(float(_LONGEST), max(1.0, added / (_AIM * self._overhead * step)))
        chosen = max(1, round(ideal + self._owed))
        self._owed += ideal - chosen
        return chosen
