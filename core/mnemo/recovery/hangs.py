"""Which rank hangs, told from what the ranks say they have done: a pure decision.

A rank makes *progress* when a number grows that it is asked for every few seconds: collectives or
messages asked for, collectives ended, the tick of its last boundary. One that makes none hangs if
the others wait for it: directly, in an operation that it has not asked for, or by way of others.
One that does not even answer hangs if anybody waits for it.

The limit, where it is not set, follows from what was seen: steps, and pauses that ended by
themselves, such as a validation or a checkpoint on one rank while the others wait. A rank that is
seen to *work* meanwhile (it or a child of its uses the processor, reads or writes) gets ten times
as long, as the first of such pauses may be longer than all before.
"""

from __future__ import annotations

import statistics
from collections import Counter, deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from mnemo.recovery.control import Doing

_LEAST_LIMIT_S: Final = 30.0
_STEPS: Final = 10
"""A limit of so many of the last steps, by their median: what makes one longer is a pause."""
_PAUSES: Final = 3
"""A limit of so many of the longest pauses."""
_MEASURED: Final = 20
"""Of so many last steps."""
_WORKING: Final = 10
"""So much longer may a rank take that is seen to work."""
_FEWEST_STEPS: Final = 2
"""So many steps are measured before the limit follows from them."""
_FIRST_LIMIT_S: Final = 300.0
"""Until then: longer than first steps take that do nothing, as a life may hang in its first one."""


@dataclass(frozen=True)
class Hang:
    """Nothing goes on.

    Attributes:
        ranks: Those that the others wait for; empty if it is not one or more of them.
        still_s: Seconds without progress.
        limit_s: The limit for that.
    """

    ranks: tuple[int, ...]
    still_s: float
    limit_s: float


@dataclass
class _Rank:
    """What is known of one."""

    since: float
    """Its last progress, or the beginning."""
    heard: float
    """When it last answered, or the beginning."""
    idle_since: float
    """When it was last seen to work."""
    said: Doing | None = None
    stepped: float | None = None
    """When its tick last grew."""


class Vigil:
    """Over the ranks of one life. Times are seconds of the caller's clock, which always goes on.

    Args:
        limit_s: The limit that was set, infinite for none; None has it follow from what is seen.
    """

    def __init__(self, limit_s: float | None) -> None:
        self._limit_s = limit_s
        self._ranks: dict[int, _Rank] = {}
        self._steps: deque[float] = deque(maxlen=_MEASURED)
        self._pause_s = 0.0
        self._hung_at: Counter[int] = Counter()

    def begin(self, ranks: Iterable[int], now: float) -> None:
        """Watch these from now on; what was measured stays."""
        self._ranks = {rank: _Rank(now, now, now) for rank in ranks}

    def slept(self, seconds: float) -> None:
        """Whoever watches could not: that time does not count."""
        for each in self._ranks.values():
            each.since += seconds
            each.heard += seconds
            each.idle_since += seconds

    def hear(self, rank: int, said: Doing, now: float) -> None:
        """A rank has answered."""
        each = self._ranks.get(rank)
        if each is None:
            return
        before, each.said = each.said, said
        silent_s, each.heard = now - each.heard, now
        if silent_s > 2 * self.period_s:  # while it was stopped it could not do anything
            each.since += silent_s
            each.idle_since += silent_s
        if before is None or _progress(before) == _progress(said):
            return
        if not _pending(before):
            self._pause_s = max(self._pause_s, now - each.since)
        each.since = each.idle_since = now
        if said.tick > before.tick and rank == min(self._ranks):  # the others have the same
            if each.stepped is not None:
                self._steps.append((now - each.stepped) / max(1, (said.tick - before.tick) // 2))
            each.stepped = now

    def works(self, rank: int, now: float) -> None:
        """A rank is seen to work."""
        self._ranks[rank].idle_since = now

    def excuse(self, rank: int, now: float) -> None:
        """A rank stands still because somebody looks at it: that is no hang, and no pause."""
        each = self._ranks[rank]
        each.since = each.heard = each.idle_since = now

    def condemn(self, rank: int) -> None:
        """It is ended. If one hangs there again, it may just take that long: the limit grows."""
        said = self._ranks[rank].said
        self._hung_at[-1 if said is None else said.tick] += 1

    @property
    def limit(self) -> float:
        """In seconds."""
        if self._limit_s is not None:
            return self._limit_s
        steps_s = _FIRST_LIMIT_S
        if len(self._steps) >= _FEWEST_STEPS:
            steps_s = _STEPS * statistics.median(self._steps)
        least = max(_LEAST_LIMIT_S, steps_s, _PAUSES * self._pause_s)
        ticks = [each.said.tick for each in self._ranks.values() if each.said]
        again = max((self._hung_at[tick] for tick in ticks), default=0)
        return least * float(_PAUSES**again)

    @property
    def period_s(self) -> float:
        """How often the ranks are to be asked."""
        return 2.0 if self._limit_s is None else min(2.0, self._limit_s / 4)

    def suspects(self, now: float) -> list[int]:
        """Ranks to be looked at: without progress for half of the limit."""
        return [r for r, each in self._ranks.items() if now - each.since > self.limit / 2]

    def silent(self, now: float) -> list[int]:
        """Ranks that have answered nothing for the limit."""
        limit = self.limit
        return [rank for rank, each in self._ranks.items() if now - each.heard > limit]

    def find(self, now: float) -> Hang | None:
        """Whether nothing goes on, and why."""
        limit, silent = self.limit, self.silent(now)
        answering = self._ranks.keys() - set(silent)
        if not answering or any(self._ranks[rank].said is None for rank in answering):
            return None
        if silent:
            awaited = {w for rank in answering for w in self._waits(rank, silent)}
            return self._hang(awaited.intersection(silent), now)
        if min(now - each.since for each in self._ranks.values()) <= limit:
            return None
        free = [rank for rank in self._ranks if not _pending(self._said(rank))]
        others = self._ranks.keys() - set(free)
        if len(free) == 1 and others and all(free[0] in self._reach(rank) for rank in others):
            return self._hang(free, now)
        return self._hang((), now, of=free or self._ranks)

    def _hang(
        self, ranks: Iterable[int], now: float, of: Iterable[int] | None = None
    ) -> Hang | None:
        """That of these ranks, if they have done nothing for long enough."""
        found = tuple(sorted(ranks))
        looked_at = [self._ranks[rank] for rank in (found if of is None else of)]
        if not looked_at:
            return None
        still_s = min(now - each.since for each in looked_at)
        idle_s = min(now - each.idle_since for each in looked_at)
        limit = self.limit
        if self._limit_s is None and idle_s <= limit and still_s <= _WORKING * limit:
            return None
        return Hang(found, still_s, limit)

    # --- who waits for whom -----------------------------------------------------------------------

    def _said(self, rank: int) -> Doing:
        said = self._ranks[rank].said
        assert said is not None
        return said

    def _waits(self, rank: int, silent: Sequence[int]) -> set[int]:
        """Whom it waits for: who has not asked for what it waits for, or answers nothing."""
        found: set[int] = set()
        for name, group in self._said(rank).groups.items():
            if group.asked <= group.ended:
                continue
            for other in set(group.ranks) - {rank}:
                there = None if other in silent else self._said(other).groups.get(name)
                if other in silent or (there is not None and there.asked <= group.ended):
                    found.add(other)
        return found

    def _reach(self, rank: int) -> set[int]:
        """Whom it waits for, also by way of others."""
        found: set[int] = set()
        ahead = {rank}
        while ahead:
            ahead = {w for each in ahead for w in self._waits(each, ())} - found
            found |= ahead
        return found


def _pending(said: Doing) -> bool:
    """Whether it waits for something, or is about to."""
    return any(group.asked > group.ended for group in said.groups.values())


def _progress(said: Doing) -> tuple[object, ...]:
    counts = {name: (group.asked, group.ended) for name, group in said.groups.items()}
    return said.tick, said.messages, counts
