"""Everything that the ranks have started, wherever it went: nothing outlives the agent.

The agent adopts orphans, so that every descendant stays one. The snapshot process is spared.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
from contextlib import suppress
from typing import TYPE_CHECKING, Final

import psutil

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

_PR_SET_CHILD_SUBREAPER: Final = 36
_KILL_ROUNDS: Final = 30


def adopt_orphans() -> None:
    """Become the parent of descendants whose own parent dies."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def reap_orphans(own: Collection[int]) -> None:
    """Collect adopted children that have ended; those in ``own`` are somebody else's to reap."""
    for child in psutil.Process().children():
        with suppress(psutil.NoSuchProcess, ChildProcessError):
            if child.pid not in own and child.status() == psutil.STATUS_ZOMBIE:
                os.waitpid(child.pid, os.WNOHANG)


def descendants() -> list[psutil.Process]:
    """Every process below this one but those of mnemo's own: snapshot process, Store."""
    return [p for p in psutil.Process().children(recursive=True) if not _is_own(p)]


def end_orphans(rank: int, own: Collection[int]) -> None:
    """Kill what a rank that has died left behind outside of its process group.

    Args:
        rank: The rank, as in the environment of all that it started.
        own: Children that are no orphans.
    """
    for child in psutil.Process().children():
        with suppress(psutil.Error):
            its = child.pid not in own and child.environ().get("RANK") == str(rank)
            if its and not _is_own(child):
                for process in (*child.children(recursive=True), child):
                    process.kill()


def _is_own(process: psutil.Process) -> bool:
    try:
        return process.environ().get("MNEMO_ROLE") in {"smp", "store"}
    except psutil.Error:
        return False


async def end_descendants(grace_s: float, hurry: Callable[[], bool]) -> list[str]:
    """End everything that is left.

    Args:
        grace_s: Seconds that the processes get after SIGTERM; 0 kills at once.
        hurry: Asked now and then: cuts the grace short.

    Returns:
        Names and numbers of processes that could not be killed.
    """
    loop = asyncio.get_running_loop()
    left = descendants()
    if left and grace_s:
        deadline = loop.time() + grace_s
        for process in left:
            with suppress(psutil.NoSuchProcess):
                process.terminate()
        while left and loop.time() < deadline and not hurry():
            _, left = psutil.wait_procs(left, timeout=0.05)
            await asyncio.sleep(0)  # lets signals and output in
    for _ in range(_KILL_ROUNDS):
        # Again and again: what is being killed may have forked.
        left = descendants()
        if not left:
            return []
        for process in left:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(left, timeout=1.0)
    return [f"{process.pid}" for process in left]
