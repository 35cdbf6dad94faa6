"""Says when the node's snapshot process stops answering, and when it answers again."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

_EVERY_S: Final = 5.0


async def watch(silent: Callable[[], int], say: Callable[[str], None]) -> None:
    """Ask now and then, until cancelled.

    Args:
        silent: See `mnemo.launcher.hooks.Hooks.silent`; may take seconds, in a thread.
        say: Tells people, once each time.
    """
    loop = asyncio.get_running_loop()
    since: float | None = None
    while True:
        asked = loop.time()
        pid = await asyncio.to_thread(silent)
        if pid and since is None:
            since = asked
            say(
                f"the snapshot process, {pid}, has given no answer for {loop.time() - asked:.0f} "
                "s: training goes on without snapshots. If it stays so, kill it, and another one "
                "takes its place"
            )
        elif since is not None and not pid:
            say(f"the snapshot process answers again, after {loop.time() - since:.0f} s")
            since = None
        await asyncio.sleep(_EVERY_S)
