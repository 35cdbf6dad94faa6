"""One training's ranks: who is here, and what they ask for. `Shelf` decides, `Commits` follows up.

All of it runs on the SMP's one event loop, so it needs no lock; what blocks (allocating,
persisting) runs in threads.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
from collections import Counter
from dataclasses import dataclass
from typing import Any

from mnemo.clock import Clock
from mnemo.errors import IdentityError, IntegrityError, ProtocolError, RunInUseError, SmpError
from mnemo.smp import messages as m
from mnemo.smp import segment
from mnemo.smp.board import Board
from mnemo.smp.buffers import Buffers, require_room
from mnemo.smp.commits import Commits
from mnemo.smp.persist import Persister
from mnemo.smp.shelf import Shelf, Slot
from mnemo.types import GenerationState

log = logging.getLogger("mnemo.smp")

Answer = tuple[m.Message, list[int]]
"""A reply and the descriptors that go with it, which stay the fit's."""


@dataclass(eq=False)
class Seat:
    """The place of one rank, held by one process for as long as its connection lives."""

    fit: Fit
    rank: int
    pid: int


class Fit:
    """One training: its shelf, its buffers, its board."""

    def __init__(
        self,
        number: int,
        run_id: str,
        members: int,
        board: Board,
        counts: Counter[str],
        clock: Clock,
    ) -> None:
        self.number = number
        self.shelf = Shelf(members)
        self.board = board
        self.seats: dict[int, Seat] = {}
        self._run_id = run_id
        self._counts = counts
        self._clock = clock
        self._buffers = Buffers(f"mnemo:{run_id}:{number}")
        self._ledgers: dict[int, int] = {}
        """Descriptors by rank."""
        self._finished: set[int] = set()
        """Ranks whose training ended well."""
        self._over: set[int] = set()
        """Ranks that want nothing of it any more."""
        self._changed = asyncio.Event()
        self.commits = Commits(
            self.shelf, self._buffers, counts, clock, board.store_from, self.wake
        )

    @property
    def is_finished(self) -> bool:
        """Every member said that its training ended well; the program's last part may go on."""
        return len(self._finished) >= self.shelf.members

    @property
    def is_over(self) -> bool:
        """Every member said that nothing is to be resumed."""
        return len(self._over) >= self.shelf.members

    # --- who is here --------------------------------------------------------------------------

    def sit(self, request: m.Join, pid: int) -> Seat:
        """Give ``request.rank`` to process ``pid``.

        Raises:
            RunInUseError: A living process has it.
            IdentityError: This launch has other ranks than the training that is kept.
        """
        holder = self.seats.get(request.rank)
        if holder is not None:
            raise RunInUseError(
                f"run {self._run_id} is in use: its rank {request.rank} is process {holder.pid}, "
                "which is alive. Give this job another run.id, or end the other one"
            )
        members, known = self.shelf.members, set(self.shelf.ranks)
        if request.members != members or len(known | {request.rank}) > members:
            raise IdentityError(
                f"run {self._run_id} has {members} ranks on this node"
                f" ({', '.join(map(str, sorted(known)))}), this launch has {request.members},"
                f" rank {request.rank} among them. Start it as before, or give it another run.id"
            )
        self.shelf.rank(request.rank)
        seat = self.seats[request.rank] = Seat(self, request.rank, pid)
        self._finished.discard(request.rank)
        self._over.discard(request.rank)
        self.shelf.closed = False
        return seat

    async def store(self, settings: m.PersistSettings | None) -> None:
        """What is committed goes to storage as ``settings`` say: those of the newest life."""
        known = self.commits.persister
        if settings == (known and known.settings):
            return
        self.commits.persister = None
        if settings is not None:
            self.commits.persister = Persister(settings, self._run_id, self.number, self._clock)
        if known is not None:
            await known.close()

    def vacate(self, seat: Seat) -> None:
        """The process is gone: what it was writing is void, unless it had sealed without saying."""
        if self.seats.get(seat.rank) is not seat:
            return
        del self.seats[seat.rank]
        for index, slot in self.shelf.rank(seat.rank).slots.items():
            if slot.state is GenerationState.WRITING:
                self._settle(seat.rank, index)
        self._notify()

    def _settle(self, rank: int, index: int) -> None:
        """Believe the segment itself: sealed if its header says so, else void."""
        slot = self.shelf.rank(rank).slots[index]
        try:
            header = self._buffers.header((rank, index))
        except IntegrityError:
            self.commits.void(rank, index)
            return
        if header.state is GenerationState.SEALED and header.tick == slot.tick:
            slot.state = GenerationState.SEALED
        else:
            self.commits.void(rank, index)

    async def finish(self, seat: Seat, request: m.Finish) -> Answer:
        """See `m.Finish`."""
        del request
        if seat.rank not in self._finished:
            self._finished.add(seat.rank)
            if self.is_finished:
                await self.commits.flush()
                self.shelf.closed = self.is_finished  # a rank may have come back meanwhile
                self.wake()
        return m.Done(), []

    async def leave(self, seat: Seat, request: m.Leave) -> Answer:
        """See `m.Leave`."""
        if request.finished:
            await self.finish(seat, m.Finish())
            self._over.add(seat.rank)
        self.vacate(seat)
        if self.is_over:
            await self.release()
        return m.Done(), []

    async def give_up(self) -> None:
        """Nobody wants anything of it any more."""
        self._over.update(self.shelf.ranks)
        await self.release()

    async def recall(self, seat: Seat, request: m.Recall) -> Answer:
        """See `m.Recall`."""
        del seat, request
        return await self.commits.recall(), []

    def look(self) -> m.Looked:
        """See `m.Look`."""
        commits = self.commits
        persist = None if commits.persister is None else commits.persister.settings
        steps = self.shelf.all_committed()
        lives = {tick: commits.life_of(tick) for tick in steps}
        return m.Looked(self.number, steps, persist, commits.settings, lives)

    # --- generations --------------------------------------------------------------------------

    async def reserve(self, seat: Seat, request: m.Reserve) -> Answer:
        """See `m.Reserve`."""
        del seat
        size, members = request.size, self.shelf.members
        parities = math.ceil(request.parities * size * members)
        held = self._memory + self.commits.parity_memory
        require_room(size, request.buffers, members, parities=parities, held=held)
        return m.Done(), []

    async def begin(self, seat: Seat, request: m.Begin) -> Answer:
        """See `m.Begin`."""
        rank = seat.rank
        if rank == min(self.shelf.ranks):  # all ranks skip the same
            self._counts["skipped"] += request.skipped
        self.shelf.begin(rank, request.tick)
        self._notify()  # others may have waited for this rank to go on
        while True:
            if self.seats.get(rank) is not seat:
                raise SmpError(f"rank {rank} went away while it waited for a buffer")
            index, surplus, create = self.shelf.grant(rank, request.size)
            self._release(rank, surplus)
            if index is not None:
                break
            if create:
                fd = await asyncio.to_thread(self._buffers.create, rank, request.size)
                self._buffers.keep((rank, self.shelf.add(rank, request.size)), fd)
            else:
                await self._changed.wait()
        self.shelf.write(rank, index, request.tick, request.step)
        self._buffers.begin((rank, index), request.tick, request.step, request.size)
        live = tuple(self.shelf.rank(rank).slots)
        granted = m.Granted(index, live, shard=not self.commits.differ)
        return granted, [self._buffers[rank, index]]

    async def seal(self, seat: Seat, request: m.Seal) -> Answer:
        """See `m.Seal`."""
        key = (seat.rank, request.index)
        if key not in self._buffers:
            raise ProtocolError(f"rank {seat.rank} has no segment {request.index}")
        header = self._buffers.header(key)
        if header.state is not GenerationState.SEALED or header.tick != request.tick:
            raise ProtocolError(
                f"segment {request.index} does not hold a sealed generation {request.tick}"
            )
        if not self.shelf.seal(seat.rank, request.index, request.tick):
            raise ProtocolError(
                f"segment {request.index} was not granted for generation {request.tick}"
            )
        self._counts["sealed"] += 1
        self._notify()
        commits = self.commits
        not_stored = "" if commits.persister is None else commits.persister.failure
        return m.Sealed(commits.newest, commits.differ, not_stored, commits.not_protected), []

    async def drop(self, seat: Seat, request: m.Drop) -> Answer:
        """See `m.Drop`."""
        self.shelf.drop(seat.rank, request.tick)
        self._notify()
        return m.Done(), []

    async def resume(self, seat: Seat, request: m.Resume) -> Answer:
        """See `m.Resume`."""
        for index in self.shelf.forget_after(seat.rank, request.tick):
            self.commits.void(seat.rank, index)
        if request.tick < 0:  # else it is of the training that goes on
            self._forget_ledger(seat.rank)
        self.commits.rewound()
        self._notify()
        return m.Done(), []

    def rollback(self, step: int) -> None:
        """Forget generations newer than ``step``. Nobody may be training or persisting."""
        for rank, shelf in self.shelf.ranks.items():
            for index, slot in shelf.slots.items():
                if slot.step > step:
                    self.commits.void(rank, index)
        self.commits.rewound()

    async def adopt(self, seat: Seat, request: m.Adopt, fds: list[int]) -> Answer:
        """See `m.Adopt`."""
        if len(request.indexes) != len(fds):
            raise ProtocolError(f"{len(fds)} descriptors for {len(request.indexes)} segments")
        shelf = self.shelf.rank(seat.rank)
        for index, fd in zip(request.indexes, fds, strict=True):
            shelf.next_index = max(shelf.next_index, index + 1)
            key = (seat.rank, index)
            if key in self._buffers:
                continue
            try:
                header = segment.read_header(fd)
            except IntegrityError as error:
                log.warning("segment %d of rank %d is not taken over: %s", *key[::-1], error)
                continue
            self._buffers.keep(key, os.dup(fd))
            shelf.slots[index] = Slot(header.bulk_size)
            if header.state is GenerationState.SEALED:
                self.shelf.write(*key, header.tick, header.step)
                self.shelf.seal(*key, header.tick)
        self._notify()
        return m.Done(), []

    async def keep_ledger(self, seat: Seat, request: m.KeepLedger, fds: list[int]) -> Answer:
        """See `m.KeepLedger`."""
        del request
        if len(fds) != 1:
            raise ProtocolError(f"{len(fds)} descriptors for one ledger")
        self._forget_ledger(seat.rank)
        self._ledgers[seat.rank] = os.dup(fds[0])
        return m.Done(), []

    def ledger(self, rank: int) -> list[int]:
        """The descriptor of a rank's ledger, if there is one."""
        return [self._ledgers[rank]] if rank in self._ledgers else []

    def _forget_ledger(self, rank: int) -> None:
        fd = self._ledgers.pop(rank, None)
        if fd is not None:
            os.close(fd)

    def wake(self) -> None:
        """Slots may have become free: give back what is surplus, let those who wait look again."""
        for rank in self.shelf.ranks:
            self._release(rank, self.shelf.surplus(rank))
        self._changed.set()
        self._changed = asyncio.Event()

    def _notify(self) -> None:
        self.commits.look()
        self.wake()

    # --- memory -------------------------------------------------------------------------------

    def _release(self, rank: int, indexes: list[int]) -> None:
        for index in indexes:
            del self.shelf.rank(rank).slots[index]
            self._buffers.close((rank, index))

    @property
    def _memory(self) -> int:
        """Bytes that the snapshots take."""
        return sum(s.size for shelf in self.shelf.ranks.values() for s in shelf.slots.values())

    async def release(self) -> None:
        """Give all memory back."""
        await self.commits.unprotect()
        for rank, shelf in self.shelf.ranks.items():
            self._release(rank, list(shelf.slots))
            self._forget_ledger(rank)
        self.board.close()

    async def close(self) -> None:
        """Give up what is being persisted, and all memory."""
        await self.commits.close()
        await self.release()

    def status(self) -> dict[str, Any]:
        """This training's part of `mnemo.smp.server.Server.status`."""
        return {
            "fit": self.number,
            "finished": self.is_finished,
            "members": self.shelf.members,
            "ranks": sorted(self.shelf.ranks),
            "connected": {rank: seat.pid for rank, seat in self.seats.items()},
            "memory": self._memory,
            "progress": [] if self.is_over else self.board.positions(),
            **self.commits.status(),
            "segments": [
                {
                    "rank": rank,
                    "index": i,
                    "state": s.state.name,
                    "tick": s.tick,
                    "step": s.step,
                    "bytes": s.size,
                }
                for rank, shelf in sorted(self.shelf.ranks.items())
                for i, s in shelf.slots.items()
            ],
        }
