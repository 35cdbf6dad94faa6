"""What is safe when a training is about to end, asked of a snapshot process that may hang."""

from __future__ import annotations

import time

import msgspec

from mnemo.errors import SmpError
from mnemo.session.sources import NOTHING
from mnemo.smp import lifecycle
from mnemo.smp import messages as m
from mnemo.smp.paths import RunPaths
from mnemo.transport.local import close_all


class Saved(msgspec.Struct, frozen=True):
    """Of one node: steps of the newest snapshots, `NOTHING` for none."""

    kept: int = NOTHING
    """In memory, sealed by all ranks of the node."""
    stored: int = NOTHING
    """On storage."""
    failure: str = ""
    """Why nothing is known; empty if it is."""
    not_stored: str = ""
    """Why it is not known whether the newest is on storage; empty if it is, or none should be."""


def ask_what_is_saved(paths: RunPaths, fit: int, *, store: bool, timeout_s: float) -> Saved:
    """What of this node is safe; to ``store`` has the newest snapshot persisted first.

    Asked on a connection of its own: a rank's may have to wait for a buffer.

    Args:
        paths: Of the run.
        fit: Whose snapshots.
        store: Persist first.
        timeout_s: Seconds after which no answer is waited for.
    """
    deadline, stored = time.monotonic() + timeout_s, NOTHING
    client = lifecycle.find(paths, timeout_s)
    if client is None:
        return Saved(failure=f"the snapshot process did not answer within {timeout_s:.1f} s")
    with client:
        try:
            found, fds = client.ask(m.Fetch(fit=fit), m.Fetched, timeout_s=timeout_s)
        except SmpError as error:
            return Saved(failure=str(error))
        close_all(fds)
        kept = NOTHING if found.generation is None else found.generation.step
        try:
            if store:
                left_s = max(0.0, deadline - time.monotonic())
                stored = client.ask(m.Flush(fit), m.Flushed, timeout_s=left_s)[0].step
        except SmpError as error:
            return Saved(kept, stored, not_stored=str(error))
    return Saved(kept, stored)
