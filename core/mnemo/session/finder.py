"""Looks for the state that a run goes on from, in memory and on storage."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mnemo.config import ResolvedConfig, Resume
from mnemo.errors import IdentityError, NothingToResumeError
from mnemo.session.identity import RunIdentity, require_same_world
from mnemo.session.place import Place
from mnemo.session.sources import NOTHING, Candidate, MemorySource, StorageSource, newest_common
from mnemo.smp import messages as m
from mnemo.smp.link import Link
from mnemo.smp.persist import store_id
from mnemo.smp.segment import TensorEntry


@dataclass(frozen=True)
class Restored:
    """What a rank goes on from."""

    state: Any
    rng: dict[str, Any]
    tick: int
    step: int
    origin: str
    """``memory`` or ``storage``."""
    entries: tuple[TensorEntry, ...]
    """What tensors the snapshot holds."""
    fingerprints: dict[str, str]
    """Those given to `Keeper.begin` when it was taken."""
    base: int
    """Boundaries that counted as done before the run was begun anew."""

    @classmethod
    def of(cls, found: Candidate) -> Restored:
        """All that ``found`` holds."""
        return cls(
            found.state["state"],
            found.state["rng"],
            found.tick,
            found.step,
            found.origin,
            found.entries,
            found.identity,
            found.state["base"],
        )


def persist_settings(config: ResolvedConfig, node: str = "") -> m.PersistSettings | None:
    """Where and how often checkpoints are stored, None if they are not.

    Args:
        config: The effective configuration.
        node: This node's name, where there are several.
    """
    to = config.persist.to
    if not to:
        return None
    url = to if "://" in to else str(Path(to).absolute())
    return m.PersistSettings(url, config.persist.every, config.persist.keep, node)


class Finder:
    """See the module. One rank's; what it does is collective."""

    def __init__(
        self,
        config: ResolvedConfig,
        identity: RunIdentity,
        place: Place,
        link: Link,
        secret: bytes,
        persist: m.PersistSettings | None,
        fit: int,
        launch: str,
    ) -> None:
        self._resume = config.run.resume
        self._identity = identity
        self._agree = place.agree
        self._nodes, self._world_size = len(place.leaders), place.world_size
        self.memory = MemorySource(link, place.rank, secret)
        """Snapshots of this run that the SMP holds."""
        self._storage: StorageSource | None = None
        self._url = persist.shown if persist is not None else ""
        if persist is not None:
            name = store_id(identity.run_id, fit, persist.node)
            self._storage = StorageSource(persist, name, place.rank, place.members)
        self._launch = launch
        self.apart = False
        """All nodes have snapshots of the last life in memory, but none in common."""

    def find(self) -> Restored | None:
        """See `Keeper.find`."""
        found = newest_common(self.memory, self._agree)
        kept = self._agree(self.memory.world_size)[1]
        if self._resume is not Resume.never:
            require_same_world(kept or self._world_size, self._world_size, self._identity.run_id)
        if self._storage is not None:
            newer_than = found.tick if found else NOTHING
            found = newest_common(self._storage, self._agree, newer_than) or found
        wanted = self._resume is not Resume.never and self._nodes > 1
        if found is None and wanted and self._agree(int(self.memory.held))[0]:
            self.apart = self._is_all_there()
            if not self.apart:
                raise IdentityError(
                    f"the nodes of run {self._identity.run_id} keep snapshots in memory, but none "
                    "that all of them have: one was away while the others went on, or has damaged "
                    "ones. "
                    "`mnemo clean` on that node makes room for what the others keep of it; "
                    "run.resume=never gives all of it up"
                )
        if self._resume is Resume.never and found is not None and not self._is_of_launch(found):
            found = None
        if found is None and self._resume is Resume.required:
            raise NothingToResumeError(
                f"run.resume is 'required', but run {self._identity.run_id} has no snapshot in "
                "memory and "
                + (f"no checkpoint in {self._url}" if self._url else "persist.to is not set")
                + ". Start with run.resume=auto to begin anew"
            )
        if found is None:
            return None
        world = int(found.identity.get("world", self._world_size))
        require_same_world(world, self._world_size, self._identity.run_id)
        return Restored.of(found)

    def _is_all_there(self) -> bool:
        """Whether no node can come back with more: all have whole snapshots, of the same life."""
        low, high = self._agree(self.memory.life)
        return 0 < low == high and not self._agree(self.memory.damaged)[1]

    @property
    def damaged(self) -> int:
        """Snapshots in memory that were found and could not be used."""
        return self.memory.damaged

    def newest_stored(self) -> int:
        """Newest tick of any checkpoint of the run, whoever can read it."""
        stored = self._storage.newest_tick() if self._storage is not None else NOTHING
        return self._agree(stored)[1]

    def beyond_the_node(self) -> str:
        """What survives the loss of the node; for the start line."""
        if self._storage is None:
            return " (persist.to is not set)"
        if not self._storage.takes_checkpoints():
            return f", for {self._url} cannot be used"
        return f": {self._url} does"

    def _is_of_launch(self, found: Candidate) -> bool:
        """Whether an earlier life of this very launch began what was found, and then crashed."""
        return self._launch != "" and found.identity.get("launch") == self._launch
