"""Waiting for keys of a Store whose client others need, too."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mnemo.comm.c10d import Store

PATIENCE = timedelta(seconds=60)
"""How long others may take to come, or to say how they left the last membership epoch."""
_FIRST_S, _LONGEST_S = 0.001, 0.008


def wait_for(
    store: Store, keys: Sequence[str], timeout: timedelta, stop: Callable[[], bool]
) -> list[str]:
    """Look until all are there. A blocking wait would hold the client, and warn when it ends.

    Returns:
        Those that are still missing when the time is over, or ``stop`` says so.
    """
    deadline, pause = time.monotonic() + timeout.total_seconds(), _FIRST_S
    while not store.check(list(keys)):
        if stop() or time.monotonic() > deadline:
            return [key for key in keys if not store.check([key])]
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_S)
    return []
