"""How nodes agree on when to stop, take a snapshot, store one; on one node the board does.

What the nodes' leaders say at one boundary is known to all of them at the next, without anybody
having waited: the exchange goes on beside forward and backward.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from typing import Final, NamedTuple

import torch
import torch.distributed as dist

from mnemo.session.place import Place
from mnemo.session.sources import NOTHING

log = logging.getLogger("mnemo")

AHEAD: Final = 2
"""Boundaries from what a leader says to what all can do by it."""


class Words(NamedTuple):
    """What a leader says. Only rank 0 says when; of the others the largest number would count."""

    stop: bool = False
    """This node was asked to stop."""
    due: int = NOTHING
    """Boundary of the next snapshot."""
    store: int = NOTHING
    """Boundary from which on the first snapshot goes to storage."""


class Accord:
    """One rank's part; those that are not the first of their node make it and no more."""

    def __init__(self, place: Place, degraded: Callable[[str, str], None]) -> None:
        """Make a process group of the leaders. Collective, for all ranks."""
        group = dist.new_group(list(place.leaders), backend="gloo")
        # Who is not in it is given a number instead.
        self._group = group if isinstance(group, dist.ProcessGroup) else None
        self._degraded = degraded
        self._words = torch.zeros(3, dtype=torch.int64)
        self._under_way: dist.Work | None = None

    def hear(self) -> Words:
        """What was said at the boundary before."""
        if self._under_way is None:
            return Words()
        try:
            self._under_way.wait()
        except RuntimeError as error:
            self._give_up(error)
            return Words()
        self._under_way = None
        stop, due, store = map(int, self._words)
        return Words(bool(stop), due, store)

    def say(self, words: Words) -> None:
        """Speak at this boundary. What is said of boundaries is at least `AHEAD` ahead."""
        if self._group is None:
            return
        for i, word in enumerate(words):
            self._words[i] = int(word)
        try:
            work = dist.all_reduce(self._words, dist.ReduceOp.MAX, group=self._group, async_op=True)
        except RuntimeError as error:
            self._give_up(error)
        else:
            self._under_way = work

    def _give_up(self, error: Exception) -> None:
        """A node is lost; training is about to find that out by itself."""
        self._under_way = self._group = None
        self._degraded("nodes", f"they do not agree on snapshots any more: {error}")

    def close(self) -> None:
        """Say no more."""
        group, self._group, self._under_way = self._group, None, None
        if group is not None:
            with contextlib.suppress(RuntimeError, ValueError, AssertionError):
                dist.destroy_process_group(group)
