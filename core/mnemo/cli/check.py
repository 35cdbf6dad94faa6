"""Reads what is kept in memory and checks every byte, for ``mnemo status --check``."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from mnemo.cli import runs
from mnemo.errors import IntegrityError
from mnemo.smp import messages as m
from mnemo.smp import segment
from mnemo.smp.segment import CHUNK, PAGE
from mnemo.transport.local import close_all

if TYPE_CHECKING:
    from mnemo.smp.client import SmpClient


def check(run: runs.Run) -> dict[int, list[dict[str, Any]]]:
    """By fit: ``tick`` and ``step`` of each snapshot, newest first, and what is ``damaged`` of it.

    Raises:
        SmpError: The SMP does not answer any more.
    """
    if run.status is None:
        return {}
    with runs.connect(run.paths) as client:
        return {fit: _check_fit(client, fit) for fit in sorted(run.fits)}


def _check_fit(client: SmpClient, fit: int) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    below: int | None = None
    while below != 0:
        fetched, fds = client.ask(m.Fetch(below or 0, fit), m.Fetched)
        generation = fetched.generation
        try:
            if generation is None:
                break
            below = generation.tick
            damaged = "; ".join(filter(None, map(_damage, fds)))
            found.append({"tick": below, "step": generation.step, "damaged": damaged})
        finally:
            close_all(fds)
    return found


def _damage(fd: int) -> str:
    """The first thing that is wrong with a segment; empty if nothing is."""
    buffer = bytearray(CHUNK)
    try:
        header = segment.read_header(fd)
        meta = segment.read_meta(fd, header)
    except IntegrityError as error:
        return str(error)
    for index, start in enumerate(range(0, header.bulk_size, CHUNK)):
        chunk = memoryview(buffer)[: min(CHUNK, header.bulk_size - start)]
        os.preadv(fd, [chunk], PAGE + start)
        if not segment.verify_chunk(meta.digests, index, chunk):
            return (
                f"chunk {index} of rank {meta.rank}'s snapshot of step {header.step} fails its "
                "checksum"
            )
    return ""
