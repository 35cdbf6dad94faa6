"""Committed generations to storage, in a thread of low priority of the SMP.

Nothing here is on a training step's path: the trainer never sees the storage. The generation's
segments are pinned meanwhile, and ranks are lent a third buffer.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

from mnemo.clock import Clock
from mnemo.errors import IntegrityError, MnemoError
from mnemo.smp import segment
from mnemo.smp.messages import PersistSettings
from mnemo.storage import CheckpointStore

log = logging.getLogger("mnemo.smp.persist")

_READ: Final = 8 * segment.CHUNK
_NICE: Final = 10


def part_name(rank: int) -> str:
    """Name of ``rank``'s segment within a stored checkpoint."""
    return f"rank-{rank:05d}.seg"


def store_id(run_id: str, fit: int) -> str:
    """Name under which a fit's checkpoints are stored."""
    return run_id if fit == 0 else f"{run_id}.fit-{fit}"


def verified_stream(fd: int) -> Iterator[bytes]:
    """A sealed segment's bytes, each chunk checked before it leaves.

    Raises:
        IntegrityError: A chunk is not what was sealed.
    """
    header = segment.read_header(fd)
    meta = segment.read_meta(fd, header)
    yield os.pread(fd, segment.PAGE, 0)
    offset, end, index = segment.PAGE, segment.PAGE + header.bulk_size, 0
    while offset < end:
        block = os.pread(fd, min(_READ, end - offset), offset)
        view = memoryview(block)
        for start in range(0, len(block), segment.CHUNK):
            if not segment.verify_chunk(meta.digests, index, view[start : start + segment.CHUNK]):
                raise IntegrityError(
                    f"chunk {index} of snapshot step {header.step} is damaged in memory: not persisted"
                )
            index += 1
        yield block
        offset += len(block)
    yield os.pread(fd, header.meta_offset - end + header.meta_size, end)


class Persister:
    """Writes one fit's generations to its store, one at a time."""

    def __init__(self, settings: PersistSettings, run_id: str, fit: int, clock: Clock) -> None:
        self._settings = settings
        self._store_id = store_id(run_id, fit)
        self._clock = clock
        self._last = clock.monotonic()
        self._pool = ThreadPoolExecutor(1, "mnemo-persist", initializer=_be_nice)
        self._cancel = threading.Event()
        self._store: CheckpointStore | None = None
        self._failure = ""
        self.lock = asyncio.Lock()
        self.newest_step = -1
        """Step of the newest checkpoint on storage, -1 for none yet."""

    def due(self) -> bool:
        """Whether the interval has passed and nothing is being written."""
        return (
            not self.lock.locked()
            and self._clock.monotonic() - self._last >= self._settings.every_s
        )

    async def write(self, step: int, tick: int, fds: dict[int, int]) -> bool:
        """Store one generation and close ``fds``; False, logged, if that failed."""
        self._last = self._clock.monotonic()
        loop = asyncio.get_running_loop()
        try:
            await loop.run_in_executor(self._pool, self._write, step, tick, fds)
        except (MnemoError, OSError) as error:
            self._failure = str(error)
            log.warning("step %d could not be persisted: %s", step, error)
            return False
        finally:
            for fd in fds.values():
                os.close(fd)
        self.newest_step, self._failure = step, ""
        log.info(
            "step %d persisted to %s in %.1f s",
            step,
            self._store_id,
            self._clock.monotonic() - self._last,
        )
        return True

    def _write(self, step: int, tick: int, fds: dict[int, int]) -> None:
        if self._store is None:
            self._store = CheckpointStore(
                self._settings.url, run_id=self._store_id, keep=self._settings.keep
            )
        parts = {part_name(rank): (lambda fd=fd: verified_stream(fd)) for rank, fd in fds.items()}
        self._store.write(step, parts, {"tick": tick, "members": len(fds)}, cancel=self._cancel)

    def status(self) -> dict[str, Any]:
        """For ``mnemo status``."""
        return {
            "to": self._settings.url,
            "newest_step": self.newest_step,
            "every_s": self._settings.every_s,
            "failure": self._failure,
        }

    async def close(self) -> None:
        """Give up what is being written and end the thread."""
        self._cancel.set()
        await asyncio.to_thread(self._pool.shutdown, wait=True)


def _be_nice() -> None:
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
