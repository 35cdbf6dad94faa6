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
from concurrent.futures import Future
from typing import Any, Final

from mnemo.clock import Clock
from mnemo.errors import IntegrityError, MnemoError
from mnemo.smp import segment
from mnemo.smp.messages import Generation, PersistSettings
from mnemo.storage import CheckpointStore

log = logging.getLogger("mnemo.smp.persist")

_READ: Final = 8 * segment.CHUNK
_NICE: Final = 10
_PATIENCE_S: Final = 2.0


def part_name(rank: int) -> str:
    """Name of ``rank``'s segment within a stored checkpoint."""
    return f"rank-{rank:05d}.seg"


def store_id(run_id: str, fit: int, node: str = "") -> str:
    """Name under which a fit's checkpoints are stored, those of each node by themselves."""
    parts = [run_id, f"fit-{fit}" if fit else "", node]
    return ".".join(part for part in parts if part)


def verified_stream(fd: int) -> Iterator[bytes]:
    """A sealed segment's bytes, each chunk checked before it leaves.

    Raises:
        IntegrityError: A chunk is not what was sealed.
    """
    page = os.pread(fd, segment.PAGE, 0)  # read once: it may be voided while this goes on
    header = segment.decode_header(page)
    meta = segment.read_meta(fd, header)
    yield page
    offset, end, index = segment.PAGE, segment.PAGE + header.bulk_size, 0
    while offset < end:
        block = os.pread(fd, min(_READ, end - offset), offset)
        view = memoryview(block)
        for start in range(0, len(block), segment.CHUNK):
            if not segment.verify_chunk(meta.digests, index, view[start : start + segment.CHUNK]):
                raise IntegrityError(
                    f"chunk {index} of snapshot step {header.step} is damaged in memory: "
                    "not persisted"
                )
            index += 1
        yield block
        offset += len(block)
    yield os.pread(fd, header.meta_offset - end + header.meta_size, end)


class Persister:
    """Writes one fit's generations to its store, one at a time."""

    def __init__(self, settings: PersistSettings, run_id: str, fit: int, clock: Clock) -> None:
        self.settings = settings
        self._store_id = store_id(run_id, fit, settings.node)
        self._clock = clock
        self._last = clock.monotonic()
        self._thread: threading.Thread | None = None
        self._cancel = threading.Event()
        self._store: CheckpointStore | None = None
        self.failure = ""
        """Why the newest attempt failed; empty if it did not."""
        self.lock = asyncio.Lock()
        self.newest: Generation | None = None
        """What the newest checkpoint on storage holds, of those written since the last rewind."""

    @property
    def newest_step(self) -> int:
        """Step of the newest checkpoint on storage, -1 for none yet."""
        return -1 if self.newest is None else self.newest.step

    def forget_after(self, tick: int) -> None:
        """Training goes on from ``tick``: what was persisted of later ones does not count."""
        if self.newest is not None and self.newest.tick > tick:
            self.newest = None

    @property
    def is_one_of_several(self) -> bool:
        """Whether other nodes store other ranks' parts of the same generations."""
        return bool(self.settings.node)

    def due(self) -> bool:
        """Whether the interval has passed and nothing is being written."""
        return (
            not self.lock.locked() and self._clock.monotonic() - self._last >= self.settings.every_s
        )

    async def write(self, generation: Generation, fds: dict[int, int]) -> bool:
        """Store one generation from the segments behind ``fds``; False, logged, if that failed."""
        self._last = self._clock.monotonic()
        done: Future[None] = Future()
        self._thread = threading.Thread(
            target=self._work,
            args=(done, generation, {rank: os.dup(fd) for rank, fd in fds.items()}),
            name="mnemo-persist",
            daemon=True,  # a store that hangs must not keep the process from ending
        )
        self._thread.start()
        try:
            await asyncio.wrap_future(done)
        except (MnemoError, OSError) as error:
            self.failure = str(error)
            log.warning("step %d could not be persisted: %s", generation.step, error)
            return False
        except Exception as error:
            self.failure = repr(error)
            log.exception("step %d could not be persisted", generation.step)
            return False
        self.newest, self.failure = generation, ""
        log.info(
            "step %d persisted to %s in %.1f s",
            generation.step,
            self._store_id,
            self._clock.monotonic() - self._last,
        )
        return True

    def _work(self, done: Future[None], generation: Generation, fds: dict[int, int]) -> None:
        """In a thread of its own, which owns ``fds``: the loop may give up waiting for it."""
        done.set_running_or_notify_cancel()
        _be_nice()
        try:
            self._write(generation, fds)
        except BaseException as error:  # noqa: BLE001 - told to the one who waits
            done.set_exception(error)
        else:
            done.set_result(None)
        finally:
            for fd in fds.values():
                os.close(fd)

    def _write(self, generation: Generation, fds: dict[int, int]) -> None:
        if self._store is None:
            self._store = CheckpointStore(
                self.settings.url, run_id=self._store_id, keep=self.settings.keep
            )
        parts = {part_name(rank): (lambda fd=fd: verified_stream(fd)) for rank, fd in fds.items()}
        meta = {"tick": generation.tick, "members": len(fds)}
        self._store.write(generation.step, parts, meta, cancel=self._cancel)

    def status(self) -> dict[str, Any]:
        """For ``mnemo status``."""
        return {
            "to": self.settings.shown,
            "newest_step": self.newest_step,
            "every_s": self.settings.every_s,
            "failure": self.failure,
        }

    async def close(self) -> None:
        """Give up what is being written; wait a little for the store to notice."""
        self._cancel.set()
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join, _PATIENCE_S)


def _be_nice() -> None:
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
