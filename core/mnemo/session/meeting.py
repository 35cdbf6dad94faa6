"""Where the ranks that are left and the processes that come in lost ranks' places find each other.

It is in the Store of the process groups, anew for each loss that the agent tells of.
"""

from __future__ import annotations

import queue
import time
from collections.abc import Mapping
from typing import Any, Final

import msgspec

from mnemo.comm.c10d import PrefixStore
from mnemo.errors import GroupBrokenError, ReplayError
from mnemo.recovery import control
from mnemo.session.place import Place

_GLANCE_S: Final = 0.002


class Bid(msgspec.Struct, frozen=True):
    """What a new process says of itself in the Store."""

    tick: int
    """The boundary at which it begins again."""
    digest: int
    """Of what it is to be given."""
    wants: bool
    """It has not been given that yet."""


class Meeting:
    """One rank's view."""

    def __init__(self, place: Place, store: Any) -> None:
        """Nothing is lost yet.

        Args:
            place: Where this process stands.
            store: That of the process groups.
        """
        self._place = place
        self._store = PrefixStore("mnemo/replacing", store)
        self._news: queue.SimpleQueue[control.Lost | None] = queue.SimpleQueue()
        self.lost: control.Lost | None = None
        """The newest loss that was looked at."""

    def tell(self, lost: control.Lost | None) -> None:
        """The agent says that ranks are lost; None: it has hung up. From any thread."""
        self._news.put(lost)

    def next(self) -> control.Lost:
        """Wait for the next word of the agent's; of several the newest.

        Raises:
            ReplayError: There is none to come.
        """
        lost = self._news.get()
        while not self._news.empty():
            lost = self._news.get()
        if lost is None:
            raise ReplayError("the agent has hung up")
        self.lost = lost
        return lost

    def bid(self, lost: control.Lost, bid: Bid) -> None:
        """This process comes in the place of its rank."""
        self._store.set(f"{lost.epoch}/{self._place.rank}", msgspec.json.encode(bid).decode())

    def bids(self, lost: control.Lost) -> dict[int, Bid]:
        """What the new processes say, once all have.

        Raises:
            GroupBrokenError: Another rank was lost meanwhile.
        """
        keys = [f"{lost.epoch}/{rank}" for rank in lost.ranks]
        while not self._store.check(keys):
            if not self._news.empty():
                raise GroupBrokenError("of all ranks", "another rank was lost")
            time.sleep(_GLANCE_S)
        decode = msgspec.json.Decoder(Bid).decode
        return {r: decode(self._store.get(k)) for r, k in zip(lost.ranks, keys, strict=True)}

    def source(self, lost: control.Lost) -> int:
        """The rank that gives its parameters to those that want them."""
        return min(set(range(self._place.world_size)) - set(lost.ranks))

    def given(self, lost: control.Lost) -> Any:
        """Store for handing over."""
        return PrefixStore(f"{lost.epoch}/given", self._store)

    def groups(self, lost: control.Lost) -> Any:
        """Store for new communicators."""
        return PrefixStore(str(lost.epoch), self._store)


def wanting(bids: Mapping[int, Bid]) -> list[int]:
    """Ranks that want parameters."""
    return sorted(rank for rank, bid in bids.items() if bid.wants)


class Phases:
    """Milliseconds of what follows each other."""

    def __init__(self) -> None:
        self.ms: dict[str, float] = {}
        self._since = time.perf_counter()

    def end(self, name: str) -> None:
        """What is called so ends now."""
        now = time.perf_counter()
        self.ms[name] = round(1000 * (now - self._since), 2)
        self._since = now
