"""Tasks that end when they are told to, and those that they wait for before them."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any


async def together(*parts: Coroutine[Any, Any, Any]) -> None:
    """Run ``parts`` at the same time; the first that fails ends the others, and is raised.

    Not `asyncio.gather`: where a part has just failed when the one who waits is cancelled, that
    raises the failure, and nothing is left of the cancellation.
    """
    tasks = [asyncio.ensure_future(part) for part in parts]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        for task in done:
            task.result()
    finally:
        await cancel(*tasks)


async def cancel(*tasks: asyncio.Future[Any]) -> None:
    """End ``tasks`` and wait until they have; what they raise is dropped."""
    for task in tasks:
        task.cancel()
    await ended(*tasks)


async def ended(*tasks: asyncio.Future[Any]) -> None:
    """Wait until ``tasks`` have ended; what they raise is dropped.

    Who is cancelled meanwhile is so afterwards: what the tasks use may be given back by then.
    """
    told: asyncio.CancelledError | None = None
    while pending := [task for task in tasks if not task.done()]:
        try:
            await asyncio.wait(pending)
        except asyncio.CancelledError as error:
            told = error
    for task in tasks:
        if not task.cancelled():
            task.exception()  # else asyncio would log that nobody saw it
    if told is not None:
        raise told
