"""What one node keeps: fragments of the last protected generation, and of a next one."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from mnemo.errors import ProtectionError
from mnemo.protect.messages import Piece
from mnemo.protect.plan import Plan
from mnemo.protect.shard import Fragments, Parities, Shard

log = logging.getLogger("mnemo.protect")


class Holdings(Protocol):
    """What a fit offers. Called on the loop, but for `allocate` and `make`, which may block."""

    def ticks(self) -> Mapping[int, int]:
        """Tick to step of the generations that are committed here, of all this node's ranks."""
        ...

    def pin(self, tick: int) -> Shard | None:
        """Keep the segments of ``tick`` unchanged; None if they are gone. The caller closes it."""
        ...

    def unpin(self, tick: int) -> None:
        """Undo one `pin` or `adopt` of ``tick``."""
        ...

    def allocate(self, size: int) -> int:
        """A memfd of ``size`` bytes, all allocated; the caller's.

        Raises:
            HostMemoryError: It does not fit.
        """
        ...

    def make(self, pieces: tuple[Piece, ...]) -> Shard:
        """Memory for segments that will be rebuilt.

        Raises:
            HostMemoryError: It does not fit.
        """
        ...

    def adopt(self, tick: int, step: int, shard: Shard) -> None:
        """The segments of ``shard``, from `make`, hold generation ``tick``: keep and pin them.

        Raises:
            IntegrityError: They are no sealed segments of it.
        """
        ...


@dataclass(frozen=True)
class Standing:
    """What is protected now; -1 for nothing, or what is not known."""

    epoch: int = -1
    tick: int = -1
    step: int = -1

    @classmethod
    def of(cls, plan: Plan) -> Standing:
        """That the generation of ``plan`` is."""
        generation = plan.generation
        return cls(generation.epoch, generation.tick, generation.step)


class Keeping:
    """Whole generations by epoch: what is protected, and what may be by now."""

    def __init__(self, holdings: Holdings, node: str) -> None:
        """Begin with nothing.

        Args:
            holdings: The fit's segments.
            node: This one, for messages.
        """
        self.holdings = holdings
        self.parities = Parities(holdings.allocate)
        self.standing = Standing()
        self._node = node
        self._kept: dict[int, Fragments] = {}
        self._changed = asyncio.Event()

    def __contains__(self, epoch: int) -> bool:
        return epoch in self._kept

    @property
    def ticks(self) -> dict[int, int]:
        """What is kept: epoch to tick."""
        return {epoch: kept.plan.generation.tick for epoch, kept in self._kept.items()}

    @property
    def seals(self) -> dict[int, bytes]:
        """What is kept, with digests that are equal on all nodes."""
        return {epoch: kept.seal for epoch, kept in self._kept.items()}

    def get(self, epoch: int) -> Fragments | None:
        """This node's part of ``epoch``, if it is kept."""
        return self._kept.get(epoch)

    def find(self, epoch: int) -> Fragments:
        """This node's part of ``epoch``.

        Raises:
            ProtectionError: It is not kept.
        """
        if epoch not in self._kept:
            raise ProtectionError(f"epoch {epoch} is not kept by {self._node}")
        return self._kept[epoch]

    def add(self, fragments: Fragments) -> None:
        """Keep ``fragments``, which are whole, with their pin."""
        self._kept[fragments.plan.generation.epoch] = fragments

    def protect(self, epoch: int) -> None:
        """All members keep ``epoch``: nothing older is needed. Harmless if it is not kept."""
        if epoch not in self._kept or epoch == self.standing.epoch:
            return
        for older in [other for other in self._kept if other < epoch]:
            self.drop(older)
        self.stand_on(epoch)
        log.debug("step %d is protected", self.standing.step)

    def stand_on(self, epoch: int) -> None:
        """``epoch`` is what is protected, as far as this node knows; nothing if it is not kept."""
        kept = self._kept.get(epoch)
        self.standing = Standing() if kept is None else Standing.of(kept.plan)
        self._changed.set()
        self._changed = asyncio.Event()

    async def protected(self, tick: int) -> None:
        """Wait until ``tick``, or a newer one, is protected."""
        while self.standing.tick < tick:
            await self._changed.wait()

    def drop(self, epoch: int) -> None:
        """Keep a generation no longer."""
        fragments = self._kept.pop(epoch)
        self.parities.give_back(fragments.close())
        self.holdings.unpin(fragments.plan.generation.tick)
        if epoch == self.standing.epoch:
            self.stand_on(max(self._kept, default=-1))

    def drop_all_but(self, epoch: int) -> None:
        """Keep ``epoch`` alone; where it is not there, the newest."""
        needed = epoch if epoch in self._kept else max(self._kept, default=-1)
        for other in list(self._kept):
            if other != needed:
                self.drop(other)

    def drop_after(self, tick: int) -> None:
        """Keep nothing newer than ``tick``."""
        for epoch, kept in self.ticks.items():
            if kept > tick:
                self.drop(epoch)

    def close(self) -> None:
        """Keep nothing, and give the memory back."""
        for epoch in list(self._kept):
            self.drop(epoch)
        self.parities.close()
