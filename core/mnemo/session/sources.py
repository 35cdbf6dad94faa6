"""Where a state can be restored from, and how ranks agree on one generation."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

from mnemo.errors import IntegrityError, MnemoError, StorageError
from mnemo.session import prefetch
from mnemo.smp import messages as m
from mnemo.smp.link import Link
from mnemo.smp.segment import TensorEntry
from mnemo.snapshot.layout import Bytes
from mnemo.snapshot.restore import Source, read_state
from mnemo.storage import Checkpoint, CheckpointStore
from mnemo.transport.local import close_all

log = logging.getLogger("mnemo")

NOTHING = -1


@dataclass(frozen=True)
class Candidate:
    """A generation that this rank has read back whole."""

    tick: int
    step: int
    state: Any
    entries: tuple[TensorEntry, ...]
    identity: dict[str, str]
    origin: str

    @property
    def life(self) -> int:
        """Number of the life that took it, the same on all ranks; 0 if it was not told."""
        return int(self.identity.get("life", "0"), 16)


class StateSource(Protocol):
    """A place that generations can be read from."""

    def newest(self, below: int | None, newer_than: int) -> Candidate | None:
        """The newest readable generation with ``newer_than`` < tick < ``below``."""
        ...


def newest_common(
    source: StateSource, agree: Callable[[int], tuple[int, int]], newer_than: int = NOTHING
) -> Candidate | None:
    """The newest generation that every rank can read. Collective.

    A damaged copy on one rank makes all ranks fall back to the generation before; and so do copies
    of different lives, which a node has that was away while others went on without it.
    """
    below: int | None = None
    while True:
        found = source.newest(below, newer_than)
        low, high = agree(found.tick if found else NOTHING)
        if low == high:
            lives = agree(found.life if found else 0)
            if lives[0] == lives[1]:
                return found
        if low == NOTHING:
            return None
        below = low if low == high else low + 1


class MemorySource:
    """The SMP's segments."""

    def __init__(self, link: Link, rank: int, secret: bytes) -> None:
        self._link, self._rank, self._secret = link, rank, secret
        self.damaged = 0
        """Generations that could not be used."""
        self.held = False
        """Whether there was any."""
        self.world_size = 0
        """Of how many ranks the newest is that can be used; 0 if none is, or it does not say."""
        self.life = 0
        """Of the newest that can be used; see `Candidate.life`."""

    def newest(self, below: int | None, newer_than: int) -> Candidate | None:
        """See `StateSource`."""
        while True:
            fetched, fds = self._link.ask(m.Fetch(below or 0), m.Fetched)
            generation = fetched.generation
            self.held = self.held or generation is not None
            if generation is None or generation.tick <= newer_than:
                close_all(fds)
                prefetch.drop()
                return None
            try:
                sources = {}
                for fd in fds:
                    source = Source.of_fd(fd)
                    sources[source.meta.rank] = source
                ahead = prefetch.take(sources, self._rank)
                found = _candidate(sources, self._rank, self._secret, "memory", ahead)
            except IntegrityError as error:
                log.warning("the snapshot of step %d is not used: %s", generation.step, error)
                below = generation.tick
                self.damaged += 1
            else:
                self.world_size = self.world_size or int(found.identity.get("world", "0"))
                self.life = self.life or found.life
                return found
            finally:
                close_all(fds)


class StorageSource:
    """Checkpoints of the persistent tier."""

    def __init__(self, settings: m.PersistSettings, store_id: str, rank: int, members: int) -> None:
        self._settings, self._id = settings, store_id
        self._rank, self._members = rank, members
        self._failure = ""
        """Why it is not used any more: one that cannot be reached costs its time-out once."""

    @cached_property
    def _store(self) -> CheckpointStore:
        settings = self._settings
        return CheckpointStore(settings.url, run_id=self._id, keep=settings.keep)

    def takes_checkpoints(self) -> bool:
        """Whether a checkpoint can be written there, found out by trying; warns if not."""
        if not self._failure:
            try:
                self._store.try_write()
            except StorageError as error:
                self._failed(f"no checkpoint can be written: {error}")
        return not self._failure

    def newest(self, below: int | None, newer_than: int) -> Candidate | None:
        """See `StateSource`. Storage that cannot be reached counts as empty, with a warning."""
        for checkpoint in self._by_tick():
            tick = _tick(checkpoint)
            if tick <= newer_than or (below is not None and tick >= below):
                continue
            try:
                return self._read(checkpoint)
            except MnemoError as error:
                log.warning("the checkpoint of step %d is not used: %s", checkpoint.step, error)
        return None

    def newest_tick(self) -> int:
        """Tick of the newest checkpoint there is, readable by this launch or not."""
        return max(map(_tick, self._by_tick()), default=NOTHING)

    def _by_tick(self) -> list[Checkpoint]:
        """Checkpoints, newest first: a run begun anew goes on counting ticks, not steps."""
        if self._failure:
            return []
        try:
            return sorted(self._store.checkpoints(), key=_tick, reverse=True)
        except StorageError as error:
            self._failed(f"no checkpoint is looked for: {error}")
            return []

    def _failed(self, words: str) -> None:
        """Give it up, and say so for all ranks."""
        self._failure = words
        log.log(logging.WARNING if self._rank == 0 else logging.DEBUG, "%s", words)

    def _read(self, checkpoint: Checkpoint) -> Candidate:
        if checkpoint.meta.get("members") != self._members:
            raise IntegrityError(
                f"it was written by {checkpoint.meta.get('members')} ranks, this launch has "
                f"{self._members}: start as many, or export it"
            )
        return _candidate(read_sources(self._store, checkpoint), self._rank, None, "storage")


def read_sources(store: CheckpointStore, checkpoint: Checkpoint) -> dict[int, Source]:
    """All parts of a stored checkpoint by rank, checked.

    Raises:
        IntegrityError: A part is damaged.
        StorageError: A part cannot be read.
    """
    sources = {}
    for part in checkpoint.parts:
        buffer = bytearray(part.size)
        store.read_into(checkpoint, part.name, buffer)
        source = Source.of_bytes(memoryview(buffer))
        sources[source.meta.rank] = source
    return sources


def _candidate(
    sources: dict[int, Source],
    rank: int,
    secret: bytes | None,
    origin: str,
    tensors: list[Bytes] | None = None,
) -> Candidate:
    state = read_state(sources, rank, secret, tensors)
    mine = sources[rank]
    return Candidate(
        mine.header.tick, mine.header.step, state, mine.meta.tensors, mine.meta.identity, origin
    )


def _tick(checkpoint: Checkpoint) -> int:
    return int(checkpoint.meta.get("tick") or 0)
