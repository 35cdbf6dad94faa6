"""A fit's generations, protected over several nodes: what `mnemo.protect` needs of the SMP."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Mapping
from typing import Any, Final

from mnemo.erasure.stripes import Group
from mnemo.errors import HostMemoryError, IntegrityError, MnemoError, ShardsLostError
from mnemo.protect import Neighbours, Piece, Protector, Shard
from mnemo.smp import segment
from mnemo.smp.buffers import Buffers
from mnemo.smp.memory import memory_limit
from mnemo.smp.messages import ProtectSettings, Recalled
from mnemo.smp.shelf import Shelf, Slot
from mnemo.types import GenerationState

log = logging.getLogger("mnemo.smp.protection")

_MOMENT_S: Final = 0.5


class Segments:
    """A shelf and its buffers as a protector sees them: `mnemo.protect.Holdings`."""

    def __init__(self, shelf: Shelf, buffers: Buffers, wake: Callable[[], None]) -> None:
        self._wake = wake
        self._shelf = shelf
        self._buffers = buffers
        self._pinned: dict[int, list[list[Slot]]] = {}
        self._made: dict[int, int] = {}

    def ticks(self) -> Mapping[int, int]:
        """See `mnemo.protect.Holdings`."""
        return self._shelf.all_committed()

    def pin(self, tick: int) -> Shard | None:
        """See `mnemo.protect.Holdings`."""
        if tick not in self.ticks():
            return None
        pieces, fds, slots = [], [], []
        for rank, index in self._shelf.members_of(tick).items():
            header = self._buffers.header((rank, index))
            pieces.append(Piece(rank, header.size, header.bulk_size))
            fds.append(self._buffers[rank, index])
            slots.append(self._shelf.rank(rank).slots[index])
        self._hold(tick, slots)
        return Shard(pieces, fds)

    def _hold(self, tick: int, slots: list[Slot]) -> None:
        for slot in slots:
            slot.pins += 1
        self._pinned.setdefault(tick, []).append(slots)

    def unpin(self, tick: int) -> None:
        """See `mnemo.protect.Holdings`."""
        for slot in self._pinned[tick].pop(0):
            slot.pins -= 1
        self._wake()

    def allocate(self, size: int) -> int:
        """See `mnemo.protect.Holdings`."""
        _require(size, "parities of other nodes")
        fd = os.memfd_create("mnemo:parities", os.MFD_CLOEXEC)
        try:
            if size:
                os.posix_fallocate(fd, 0, size)
        except OSError as error:
            os.close(fd)
            raise HostMemoryError(
                f"{size} bytes for parities could not be had: {error.strerror}"
            ) from error
        return fd

    def make(self, pieces: tuple[Piece, ...]) -> Shard:
        """See `mnemo.protect.Holdings`."""
        self.forget_made()
        _require(sum(piece.size for piece in pieces), "lost segments")
        for piece in pieces:
            self._made[piece.rank] = self._buffers.create(piece.rank, piece.bulk_size)
        return Shard(pieces, [self._made[piece.rank] for piece in pieces])

    def adopt(self, tick: int, step: int, shard: Shard) -> None:
        """See `mnemo.protect.Holdings`."""
        for rank, fd in self._made.items():
            header = segment.read_header(fd)
            segment.read_meta(fd, header)
            if (header.state, header.tick) != (GenerationState.SEALED, tick):
                raise IntegrityError(
                    f"what came back for rank {rank} is no sealed generation {tick}, but "
                    f"{header.state.name} {header.tick}"
                )
        slots = []
        for piece in shard.pieces:
            index = self._shelf.add(piece.rank, piece.bulk_size)
            self._buffers.keep((piece.rank, index), self._made.pop(piece.rank))
            self._shelf.write(piece.rank, index, tick, step)
            self._shelf.seal(piece.rank, index, tick)
            slots.append(self._shelf.rank(piece.rank).slots[index])
        self._hold(tick, slots)

    def forget_made(self) -> None:
        """Give back what `make` made and nobody adopted."""
        for fd in self._made.values():
            os.close(fd)
        self._made.clear()


def _require(size: int, what: str) -> None:
    limit = memory_limit()
    if size > limit.available:
        raise HostMemoryError(
            f"{size} bytes for {what} do not fit: the {limit.bound} has {limit.available} of "
            f"{limit.total} left"
        )


class Protection:
    """One fit's protector, begun and ended with the fit."""

    def __init__(
        self, fit: int, settings: ProtectSettings, neighbours: Neighbours, segments: Segments
    ) -> None:
        """Answer the others of the group; `take_part` and `recall` do more.

        Args:
            fit: Its number.
            settings: The groups.
            neighbours: How the others are reached.
            segments: What the fit has.

        Raises:
            ProtectionError: This node is in no group.
            CodeError: There is no such group.
        """
        self.settings = settings
        groups = [Group(nodes, settings.parities) for nodes in settings.groups]
        self._segments = segments
        self._neighbours = neighbours
        self._protector = Protector(fit, groups, neighbours, segments)
        self._tasks: set[asyncio.Task[None]] = set()
        self._takes_part = False
        self._recall: asyncio.Task[None] | None = None
        self._failure: MnemoError | None = None
        """Why nothing came back; None if it did, or there was nothing."""
        self._unreachable: tuple[str, ...] = ()

    def take_part(self) -> None:
        """Begin to protect what is committed; harmless a second time."""
        if not self._takes_part:
            self._takes_part = True
            self._protector.start()

    async def recall(self, kept: Callable[[], bool]) -> Recalled:
        """Try to reach the others, and have what they keep of this node brought back.

        Args:
            kept: Whether there is anything here; then nothing is missing.

        Returns:
            Where that is after a moment.
        """
        if self._recall is None:
            missing = not self._takes_part and not kept()
            self._recall = asyncio.get_running_loop().create_task(self._look(missing=missing))
        await asyncio.wait({self._recall}, timeout=_MOMENT_S)
        progress = self._protector.progress
        if not self._recall.done():
            return Recalled(over=False, done=progress.done, total=progress.total)
        # Who asks again tries again: what could not be reached may be there by then.
        self._recall = None
        failure, self._failure = self._failure, None
        return Recalled(
            over=True,
            kept=kept(),
            failure=str(failure or ""),
            lost=isinstance(failure, ShardsLostError) and not self._unreachable,
            unreachable=self._unreachable,
        )

    async def _look(self, *, missing: bool) -> None:
        self._unreachable = tuple(map(str, await self._neighbours.find_unreachable()))
        if missing:
            await self._rebuild()

    async def _rebuild(self) -> None:
        try:
            found = await self._protector.rebuild()
        except MnemoError as error:
            self._failure = error
            log.error("what other nodes keep of this one cannot come back: %s", error)
        else:
            if found is not None:
                log.info("step %d came back from the other nodes", found.step)
        self._segments.forget_made()

    def changed(self) -> None:
        """What is committed has changed."""
        self._protector.changed()

    def forget_after(self, tick: int) -> None:
        """Training goes on from ``tick``: what can come back has, or is given up."""
        self.take_part()
        task = asyncio.get_running_loop().create_task(self._protector.forget_after(tick))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    @property
    def failure(self) -> str:
        """Why nothing newer is being protected; empty if it is."""
        return self._protector.failure

    def status(self) -> dict[str, Any]:
        """For ``mnemo status``."""
        return self._protector.status()

    async def close(self) -> None:
        """End it, and give back its memory and what it holds of the fit's."""
        if self._recall is not None:
            self._recall.cancel()
            self._tasks.add(self._recall)
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._protector.close()
        self._segments.forget_made()
