"""What the agent decides: whether a life has ended, and whether there is another."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

from mnemo.recovery.classes import ITS_OWN
from mnemo.types import EXIT_OK, EXIT_STATE_LOST, EXIT_STATE_SAVED

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from mnemo.clock import Clock
    from mnemo.recovery.classes import Failure

_CRASH_LOOP: Final = 3
"""So many deaths in a row at one batch are no accident."""
_SAME_EXCEPTION: Final = 2
"""So many of one exception."""


@dataclass(frozen=True, slots=True)
class Position:
    """Where in the training a run is: the batch that it works on.

    Attributes:
        epoch: Pass over the data, from 0.
        batch: Batch within the epoch, from 0.
        step: Optimizer steps done.
    """

    epoch: int
    batch: int
    step: int

    def __str__(self) -> str:
        return f"epoch {self.epoch}, batch {self.batch}, step {self.step}"


@dataclass(frozen=True, slots=True)
class Ended:
    """The job is over.

    Attributes:
        code: Its exit code.
        words: What that means here; empty for what it always means.
    """

    code: int
    words: str = ""


@dataclass(frozen=True, slots=True)
class Failed:
    """A rank has failed; the others are worth nothing without it.

    Attributes:
        rank: The rank to blame.
        code: Its exit code; negative for a signal.
        early: It exited with 0 while others went on.
        left_before: Ranks that had exited with 0 before it.
    """

    rank: int
    code: int
    early: bool = False
    left_before: tuple[int, ...] = ()


def judge(
    exits: Mapping[int, int], *, ranks: int, stopped_by: int | None, overdue: bool
) -> Ended | Failed | None:
    """What the exits so far mean for the job.

    Args:
        exits: Exit code by rank, in the order noticed; negative for a signal.
        ranks: Number of ranks that were started.
        stopped_by: The signal that the job was asked to end with, if any.
        overdue: The grace period for those that still run is over.

    Returns:
        None as long as the rest is to be waited for.
    """
    wait = len(exits) < ranks and not overdue
    spoken = set(exits.values()) & {EXIT_STATE_SAVED, EXIT_STATE_LOST}
    if spoken or stopped_by is not None:
        if wait:
            return None
        return Ended(max(spoken)) if spoken else Ended(128 + (stopped_by or 0))
    dead = [rank for rank, code in exits.items() if code != EXIT_OK]
    if dead:
        # Of several noticed at once, a signal hit the cause; the others lost their peer.
        rank = next((rank for rank in dead if exits[rank] < 0), dead[0])
        order = list(exits)
        left = tuple(r for r in order[: order.index(rank)] if exits[r] == EXIT_OK)
        return Failed(rank, exits[rank], left_before=left)
    if wait or not exits:
        return None
    if len(exits) < ranks:
        return Failed(next(iter(exits)), EXIT_OK, early=True)
    return Ended(EXIT_OK)


class RestartPolicy:
    """Counts failures: at most so many within a window, and no crash loop.

    Args:
        max_restarts: Restarts allowed within the window.
        window_s: Its length in seconds.
        clock: Asked for the time of each failure.
    """

    def __init__(self, max_restarts: int, window_s: float, clock: Clock) -> None:
        self._max = max_restarts
        self._window_s = window_s
        self._clock = clock
        self._failures: deque[float] = deque()
        self._position: Position | None = None
        self._failed_here: list[Failure | None] = []

    @property
    def recent(self) -> int:
        """Failures within the window that ended with the last one."""
        return len(self._failures)

    @property
    def here(self) -> list[Failure | None]:
        """Failures in a row at the batch of the last one, the first one first."""
        return list(self._failed_here)

    def after_failure(
        self, position: Position | None, failure: Failure | None = None
    ) -> Literal["restart", "exhausted", "crash loop"]:
        """Take note of a failure and decide what follows.

        Args:
            position: Where the run was, if that is known.
            failure: What it was; None where it was another node's.
        """
        decision = self.foresee(position, failure)
        self._failures.append(self._clock.monotonic())
        self._failed_here = [*(self._failed_here if position == self._position else ()), failure]
        self._position = position
        return decision

    def forgive(self) -> None:
        """Do not count the last one: who is to blame for it leaves."""
        self._failures.pop()
        self._failed_here.pop()

    def foresee(
        self, position: Position | None, failure: Failure | None = None
    ) -> Literal["restart", "exhausted", "crash loop"]:
        """What `after_failure` would decide."""
        while self._failures and self._clock.monotonic() - self._failures[0] > self._window_s:
            self._failures.popleft()
        before = self._failed_here if position == self._position else []
        if position is not None and (
            len(before) + 1 >= _CRASH_LOOP or _times(failure, before) + 1 >= _SAME_EXCEPTION
        ):
            return "crash loop"
        return "restart" if self.recent < self._max else "exhausted"


def _times(failure: Failure | None, before: Sequence[Failure | None]) -> int:
    """How often the same exception of the program's was there before."""
    if failure is None or failure.kind not in ITS_OWN:
        return 0
    return sum(each is not None and each.error == failure.error for each in before)
