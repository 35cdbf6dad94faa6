"""What becomes of a generation that all ranks have sealed: compared, counted, stored, protected."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import Callable
from typing import Any

from mnemo.clock import Clock
from mnemo.errors import IntegrityError
from mnemo.protect import Neighbours
from mnemo.smp import messages as m
from mnemo.smp.buffers import Buffers
from mnemo.smp.persist import Persister
from mnemo.smp.protection import Protection, Segments
from mnemo.smp.replicas import differing_replica
from mnemo.smp.shelf import Shelf, Slot

log = logging.getLogger("mnemo.smp")


class Commits:
    """One training's committed generations, over what its shelf and its buffers hold."""

    def __init__(
        self,
        shelf: Shelf,
        buffers: Buffers,
        counts: Counter[str],
        clock: Clock,
        store_from: Callable[[], int],
        wake: Callable[[], None],
    ) -> None:
        """Nothing is stored or protected before it is asked for.

        Args:
            shelf: What is committed.
            buffers: The segments' descriptors.
            counts: Of the whole SMP, for its status.
            clock: Tells when a generation was committed.
            store_from: From which tick on a generation goes to storage next, as the nodes of the
                training have agreed.
            wake: Called when slots may have become free.
        """
        self.persister: Persister | None = None
        self.differ = ""
        """How replicas were found to differ; empty if they never were."""
        self._protection: Protection | None = None
        self.settings: m.ProtectSettings | None = None
        """How the newest life wants it to be protected; None if it is not to be."""
        self._regroup: Callable[[], Protection] | None = None
        """Makes the protection in the group that the next life has been given."""
        self._shelf = shelf
        self._buffers = buffers
        self._counts = counts
        self._clock = clock
        self._store_from = store_from
        self._stored_from = -1
        """What that was when a generation last went."""
        self._wake = wake
        self._tasks: set[asyncio.Task[None]] = set()
        self._checked = -1
        """Newest tick whose replicas were compared."""
        self._committed_at = 0.0
        """When that tick was committed, unix seconds."""

    @property
    def newest(self) -> m.Generation | None:
        """The newest committed generation."""
        committed = self._shelf.committed()
        return None if committed is None else m.Generation(*committed)

    def fetch(self, below: int | None) -> tuple[m.Fetched, list[int], list[Slot]]:
        """The newest committed generation older than ``below``, its descriptors and its slots."""
        committed = self._shelf.committed(below)
        if committed is None:
            return m.Fetched(None), [], []
        held = self._shelf.members_of(committed[0])
        slots = [self._shelf.rank(rank).slots[i] for rank, i in held.items()]
        fds = [self._buffers[key] for key in held.items()]
        return m.Fetched(m.Generation(*committed)), fds, slots

    def life_of(self, tick: int) -> str:
        """Which life of the ranks took generation ``tick``; empty if its segments do not say."""
        for key in self._shelf.members_of(tick).items():
            with contextlib.suppress(IntegrityError):
                return self._buffers.meta(key).identity.get("life", "")
        return ""

    def look(self) -> None:
        """Something was sealed or voided: follow up a new commit."""
        committed = self.newest
        if committed is not None and committed.tick > self._checked:
            self._checked, self._committed_at = committed.tick, self._clock.time()
            self._counts["committed"] += 1
            self._compare(committed.tick)
            if self.persister is not None and self._is_to_be_stored(committed.tick, self.persister):
                task = asyncio.get_running_loop().create_task(
                    self._persist(self.persister, self._pin(None))
                )
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
        if self._protection is not None:
            self._protection.changed()

    def rewound(self) -> None:
        """What is committed may be older now: what follows is compared and persisted anew."""
        tick, _ = self._shelf.committed() or (-1, -1)
        self._checked = min(self._checked, tick)
        if self.persister is not None:
            self.persister.forget_after(tick)
        if self._regroup is not None:
            make, self._regroup = self._regroup, None
            task = asyncio.get_running_loop().create_task(self._change_group(make, tick))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        elif self._protection is not None:
            self._protection.forget_after(tick)

    def void(self, rank: int, index: int) -> None:
        """Forget what a segment holds, for good: no later SMP that is handed it revives it."""
        self._shelf.void(rank, index)
        self._buffers.begin((rank, index), 0, 0, self._shelf.rank(rank).slots[index].size)

    def _compare(self, tick: int) -> None:
        """Void generation ``tick`` if its replicas differ by their witnesses."""
        if self.differ:
            return
        held = self._shelf.members_of(tick)
        metas = {}
        for rank, index in held.items():
            try:
                metas[rank] = self._buffers.meta((rank, index))
            except IntegrityError as error:
                log.warning("rank %d, generation %d: %s", rank, tick, error)
                self.void(rank, index)
                return
        self.differ = differing_replica(metas)
        if self.differ:
            log.warning(
                "replicas differ at generation %d: %s; from now on every rank keeps a whole copy",
                tick,
                self.differ,
            )
            for rank, index in held.items():
                self.void(rank, index)

    # --- to storage ---------------------------------------------------------------------------

    def _is_to_be_stored(self, tick: int, persister: Persister) -> bool:
        """By the clock; several nodes have to store the same, or nothing can be gone on from."""
        if not persister.is_one_of_several:
            return persister.due()
        store_from = self._store_from()
        if store_from in (-1, self._stored_from) or tick < store_from:
            return False
        self._stored_from = store_from
        # Later would be too late: it may be another generation then than the others store.
        return not persister.lock.locked()

    async def flush(self, tick: int | None = None) -> m.Flushed:
        """Persist generation ``tick``, if it is there, or the newest."""
        persister = self.persister
        if persister is None:
            return m.Flushed(-1, "persist.to is not set" if tick is not None else "")
        async with persister.lock:  # what is newest then
            pinned = self._pin(tick)
        if tick is not None and pinned[0] is None:
            return m.Flushed(persister.newest_step, f"generation {tick} is not kept any more")
        await self._persist(persister, pinned)
        failed = pinned[0] not in (None, persister.newest)
        return m.Flushed(persister.newest_step, persister.failure if failed else "")

    def _pin(self, tick: int | None) -> tuple[m.Generation | None, list[int], list[Slot]]:
        """Generation ``tick`` or the newest, which stays; `_persist` has to follow at once."""
        fetched, fds, slots = self.fetch(None if tick is None else tick + 1)
        if fetched.generation is not None and tick not in (None, fetched.generation.tick):
            return None, [], []
        for slot in slots:
            slot.pins += 1
        return fetched.generation, fds, slots

    async def _persist(
        self, persister: Persister, pinned: tuple[m.Generation | None, list[int], list[Slot]]
    ) -> None:
        generation, fds, slots = pinned
        try:
            async with persister.lock:
                if generation is not None and generation != persister.newest:
                    stored = await persister.write(
                        generation, dict(zip(sorted(self._shelf.ranks), fds, strict=True))
                    )
                    if persister is self.persister:  # else a new life has another place for them
                        self._counts["persisted" if stored else "persist_failed"] += 1
        finally:
            for slot in slots:
                slot.pins -= 1
        self.look()
        self._wake()

    # --- to other nodes -----------------------------------------------------------------------

    async def protect(self, fit: int, settings: m.ProtectSettings, neighbours: Neighbours) -> None:
        """Share generations with other nodes, from the next `rewound` on.

        Until then what is protected stays, also in another group: it may be all that there is.
        """

        def make() -> Protection:
            segments = Segments(self._shelf, self._buffers, self._wake)
            return Protection(fit, settings, neighbours, segments)

        known, self.settings = self._protection, settings
        is_other = known is not None and _groups(known.settings) != _groups(settings)
        self._regroup = make if is_other else None
        if is_other and self.newest is None:
            self._regroup = None
            await self._end_protection()
        if self._protection is None:
            self._protection = make()

    async def _change_group(self, make: Callable[[], Protection], tick: int) -> None:
        await self._end_protection()
        self._protection = make()
        self._protection.forget_after(tick)

    @property
    def neighbours(self) -> set[str]:
        """Nodes that generations are shared with, or will be."""
        current = None if self._protection is None else self._protection.settings
        return {n for settings in (current, self.settings) if settings for n in settings.addresses}

    @property
    def parity_memory(self) -> int:
        """Bytes of other nodes' parities."""
        return 0 if self._protection is None else int(self._protection.status()["memory"])

    @property
    def not_protected(self) -> str:
        """Why nothing newer is being protected; empty if it is, or nothing should be."""
        return "" if self._protection is None else self._protection.failure

    def take_part(self) -> None:
        """Share generations at once: ranks that an earlier SMP served are in the middle of it."""
        if self._protection is not None:
            self._protection.take_part()

    async def recall(self) -> m.Recalled:
        """Have what other nodes keep of this one brought back; how far that is."""
        if self._protection is None:
            return m.Recalled(over=True)
        return await self._protection.recall(lambda: self.newest is not None)

    # --- end ----------------------------------------------------------------------------------

    async def unprotect(self) -> None:
        """Take no part in the group any more."""
        self.settings = None
        await self._end_protection()

    async def _end_protection(self) -> None:
        protection, self._protection = self._protection, None
        if protection is not None:
            await protection.close()

    async def close(self) -> None:
        """Give up what is being persisted."""
        if self.persister is not None:
            await self.persister.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def status(self) -> dict[str, Any]:
        """This training's commits in `mnemo.smp.fits.Fit.status`."""
        newest = self.newest
        return {
            "committed": newest
            and {"tick": newest.tick, "step": newest.step, "time": self._committed_at},
            "differ": self.differ,
            "persist": self.persister and self.persister.status(),
            "protect": self._protection and self._protection.status(),
        }


def _groups(settings: m.ProtectSettings) -> tuple[tuple[tuple[str, ...], ...], int]:
    """Who protects whom, and against how many losses."""
    return settings.groups, settings.parities
