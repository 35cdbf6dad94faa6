"""Until when a node may let its workers run.

The Store's head carries rounds. A node that reads a round says so in its next beat, and thereby
promises not to take part in another Store for `Rules.move_s` from that reading on. Once a quorum
has read round g, the coordinator writes ``granted = g``.

A node remembers when it began the last turn in which it still read a round before g. Round g was
not there at that time; so nobody of that quorum read it earlier, and none of them takes part in
another Store before that time plus ``move_s``. Until that time plus ``fence_s``, which is less by
more than it takes to stop, no other Store can let anybody run. No two clocks are compared.
"""

from __future__ import annotations

from collections import deque

NEVER = float("-inf")


class Lease:
    """One node's, in one Store."""

    def __init__(self) -> None:
        self._read: deque[tuple[int, float]] = deque()
        """Rounds, and when the last turn that read each began."""

    def read(self, start: float, round_: int, granted: int) -> float:
        """A turn that began at ``start`` read these.

        Returns:
            The instant from which the lease counts; `NEVER` if there is none.
        """
        if self._read and self._read[-1][0] == round_:
            self._read.pop()
        self._read.append((round_, start))
        while len(self._read) > 1 and self._read[1][0] < granted:
            self._read.popleft()
        return self._read[0][1] if self._read[0][0] < granted else NEVER
