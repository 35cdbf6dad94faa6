"""Reads the newest snapshot in memory while the program still sets up.

A restarted program builds its model, its data and its process group before anything asks for the
state. Whoever knows the configuration by then calls `begin`, and what was read is used when the
ranks look for a snapshot, if that is still the newest: `MemorySource` compares, checks and agrees
as ever, and is only spared the reading. Anything else, and any failure here, drops what was read.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Mapping
from typing import Final

from mnemo.config import ResolvedConfig, Resume
from mnemo.recovery import control
from mnemo.session.identity import resolve_identity
from mnemo.smp import ledger, lifecycle
from mnemo.smp import messages as m
from mnemo.smp.client import SmpClient
from mnemo.smp.memory import memory_limit
from mnemo.smp.paths import RunPaths
from mnemo.smp.segment import Header
from mnemo.snapshot.layout import Bytes
from mnemo.snapshot.restore import Source, read_tensors
from mnemo.transport.local import close_all

log = logging.getLogger("mnemo")

_ROOM: Final = 2
"""How many times what all ranks read has to be free: setting up needs memory, too."""


class _Reading:
    """One snapshot's tensors, on their way."""

    def __init__(self, paths: RunPaths, rank: int, *, joins: bool) -> None:
        self._rank, self._joins = rank, joins
        self._headers: dict[int, Header] = {}
        self._tensors: list[Bytes] | None = None
        self._thread = threading.Thread(
            target=self._run, args=(paths,), name="mnemo-prefetch", daemon=True
        )
        self._thread.start()

    def _run(self, paths: RunPaths) -> None:
        try:
            self._read(paths)
        except Exception as error:  # noqa: BLE001 - whatever it is, the usual way meets it again
            log.debug("no snapshot was read ahead: %s", error)

    def _read(self, paths: RunPaths) -> None:
        client = lifecycle.find(paths)
        if client is None:
            return
        fds: list[int] = []
        try:
            fetched, fds = client.ask(m.Fetch(fit=0), m.Fetched)
            if self._joins and not self._is_at(fetched.generation, client):
                return
            sources = {s.meta.rank: s for s in map(Source.of_fd, fds)}
            size = sum(source.meta.total for source in sources.values())
            if self._rank in sources and _ROOM * size <= memory_limit().available:
                self._tensors = read_tensors(sources, self._rank)
                self._headers = _headers(sources)
        finally:
            # Until then what was fetched is kept: a child that was forked must not keep it longer.
            client.hang_up()
            close_all(fds)

    def _is_at(self, newest: m.Generation | None, client: SmpClient) -> bool:
        """Whether that is where the rank was lost whose place this process takes."""
        _, fds = client.ask(m.FetchLedger(0, self._rank), m.Ledgers)
        try:
            return bool(fds) and newest is not None and ledger.read(fds[0]).tick == newest.tick
        finally:
            close_all(fds)

    def result(self, sources: Mapping[int, Source], rank: int) -> list[Bytes] | None:
        """What was read, once it is, if it is of ``rank`` and of these very segments."""
        self._thread.join()
        same = (rank, _headers(sources)) == (self._rank, self._headers)
        return self._tensors if same else None


_begun: list[_Reading | None] = []
"""Of this process's first training, the only one: None once it is taken, or if there is none."""


def begin(config: ResolvedConfig) -> None:
    """Begin to read, if a launcher has said which rank this is, and there is a snapshot to read.

    Only the first call of a process does anything, and only before its first training.
    """
    if not _begun:
        _begun.append(_begin(config))


def _begin(config: ResolvedConfig) -> _Reading | None:
    rank, identity = os.environ.get("RANK", ""), resolve_identity(config)
    known = rank.isdecimal() and identity.stable
    if config.run.resume is Resume.never or not known:
        return None
    paths = RunPaths.of(identity.run_id, config.run.dir)
    if paths.read_record() is None:
        return None
    return _Reading(paths, int(rank), joins=control.joins() is not None)


def take(sources: Mapping[int, Source], rank: int) -> list[Bytes] | None:
    """What was read of these segments, for `read_state`; None if nothing was. Forgets it."""
    reading = drop()
    return None if reading is None else reading.result(sources, rank)


def drop() -> _Reading | None:
    """Let go of what was read: a training has found what it goes on from, or none is to come."""
    reading = _begun[0] if _begun else None
    _begun[:] = [None]
    return reading


def _headers(sources: Mapping[int, Source]) -> dict[int, Header]:
    """By rank: what tells a segment from every other one, since it vouches for all of it."""
    return {rank: source.header for rank, source in sources.items()}
