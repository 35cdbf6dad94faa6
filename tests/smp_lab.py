"""A snapshot process for tests, and ranks that talk to it without a training around them."""

from __future__ import annotations

import contextlib
import os
import select
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import xxhash

from mnemo.errors import MnemoError
from mnemo.smp import lifecycle, segment
from mnemo.smp import messages as m
from mnemo.smp.client import SmpClient
from mnemo.smp.paths import RunPaths
from mnemo.smp.segment import CHUNK, PAGE, Meta, TensorEntry
from mnemo.transport import auth

if TYPE_CHECKING:
    from collections.abc import Iterator

SIZE = 2 * CHUNK + 1000
"""Bytes of the bulk of the segments that `Rank` writes, unless told."""


@contextlib.contextmanager
def run_directory(run_id: str = "lab") -> Iterator[RunPaths]:
    """A run's paths; whatever snapshot process is left in them is ended."""
    paths = RunPaths.of(run_id, os.environ["MNEMO_RUN__DIR"])
    try:
        yield paths
    finally:
        end(paths)


def end(paths: RunPaths) -> None:
    """Make the run's snapshot process give everything up, and wait until it has."""
    client = lifecycle.find(paths)
    if client is not None:
        with client, contextlib.suppress(MnemoError):
            client.tell(m.Shutdown(force=True))
            wait_for_exit(client.pid)
    if paths.directory.exists():
        paths.remove()


def wait_for_exit(pid: int, timeout_s: float = 20.0) -> None:
    """Wait until process ``pid`` has ended, which need not be a child."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        ended, _, _ = select.select([pidfd], [], [], timeout_s)
        assert ended, f"process {pid} lives after {timeout_s} s"
    finally:
        os.close(pidfd)


def content(rank: int, tick: int, size: int = SIZE) -> bytes:
    """What `Rank` writes: the same for the same numbers."""
    return np.random.default_rng((rank, tick)).bytes(size)


def seal(fd: int, tick: int, step: int, bulk: bytes, rank: int = 0, **more: Any) -> None:
    """Write and seal a segment as a trainer does, of one tensor named ``x``."""
    size = len(bulk)
    segment.begin(fd, tick, step, size)
    os.pwrite(fd, bulk, PAGE)
    digests = b"".join(
        xxhash.xxh3_64_intdigest(bulk[i : i + CHUNK]).to_bytes(8, "little")
        for i in range(0, size, CHUNK)
    )
    fields: dict[str, Any] = {
        "rank": rank,
        "members": 1,
        "tensors": (TensorEntry("x", "uint8", (size,), (1,), 0, size),),
        "own_size": 0,
        "shared_start": 0,
        "shared_stop": size,
        "total": size,
        "digests": digests,
        "small": b"",
        "small_mac": b"",
        "identity": {},
        "position": {"step": step},
    }
    segment.seal(fd, tick, step, size, Meta(**{**fields, **more}))


def read_bulk(fd: int) -> bytes:
    """A sealed segment's bulk, every chunk checked."""
    header = segment.read_header(fd)
    meta = segment.read_meta(fd, header)
    bulk = os.pread(fd, header.bulk_size, PAGE)
    for index, start in enumerate(range(0, header.bulk_size, CHUNK)):
        assert segment.verify_chunk(meta.digests, index, bulk[start : start + CHUNK])
    return bulk


def connect(paths: RunPaths) -> SmpClient:
    """A connection to the living snapshot process, without joining."""
    return SmpClient.connect(paths, auth.load_or_create_secret(paths.secret))


@dataclass
class Rank:
    """One rank's raw connection."""

    client: SmpClient
    rank: int
    held: dict[int, int] = field(default_factory=dict)

    @classmethod
    def join(
        cls,
        paths: RunPaths,
        rank: int = 0,
        members: int = 1,
        *,
        keep_alive_s: float = 60.0,
        persist: m.PersistSettings | None = None,
        fit: int = 0,
    ) -> Rank:
        """Start or find the snapshot process and take a place."""
        client = lifecycle.ensure(paths)
        try:
            _, fds = client.ask(m.Join(fit, rank, members, keep_alive_s, persist), m.Joined)
        except BaseException:
            client.close()
            raise
        os.close(fds[0])
        return cls(client, rank)

    def begin(self, tick: int, size: int = SIZE, *, timeout_s: float = 30.0) -> m.Granted:
        """Wait for a segment to write ``tick`` into; its descriptor is kept in ``held``."""
        granted, fds = self.client.ask(
            m.Begin(tick, tick * 10, size), m.Granted, timeout_s=timeout_s
        )
        for index in [i for i in self.held if i not in granted.live or i == granted.index]:
            os.close(self.held.pop(index))
        self.held[granted.index] = fds[0]
        return granted

    def write(self, tick: int, size: int = SIZE, **more: Any) -> m.Sealed:
        """Take generation ``tick`` as a whole."""
        granted = self.begin(tick, size)
        return self.finish(granted, tick, size, **more)

    def finish(self, granted: m.Granted, tick: int, size: int = SIZE, **more: Any) -> m.Sealed:
        """Write and seal what `begin` was granted for."""
        bulk = content(self.rank, tick, size)
        seal(self.held[granted.index], tick, tick * 10, bulk, self.rank, **more)
        return self.client.ask(m.Seal(granted.index, tick), m.Sealed)[0]

    def newest(self, below: int = 0) -> tuple[int, dict[int, bytes]] | None:
        """Tick and bulks by rank of the newest committed generation, checked."""
        fetched, fds = self.client.ask(m.Fetch(below), m.Fetched)
        if fetched.generation is None:
            return None
        bulks = {}
        for fd in fds:
            header = segment.read_header(fd)
            bulks[segment.read_meta(fd, header).rank] = read_bulk(fd)
            os.close(fd)
        return fetched.generation.tick, bulks

    def fit(self) -> dict[str, Any]:
        """The status of this rank's training."""
        found: dict[str, Any] = self.client.status()["fits"][0]
        return found

    def close(self) -> None:
        """Hang up and let go of all segments."""
        self.client.close()
        for index in list(self.held):
            os.close(self.held.pop(index))


def damage(pid: int) -> int:
    """Flip a byte in each chunk of each segment that an SMP holds; how many segments."""
    found = 0
    for link in Path(f"/proc/{pid}/fd").iterdir():
        if not str(link.readlink()).startswith("/memfd:"):
            continue
        fd = os.open(link, os.O_RDWR)
        with contextlib.suppress(MnemoError):  # the board
            size = segment.read_header(fd).bulk_size
            for place in range(PAGE, PAGE + size, CHUNK):
                os.pwrite(fd, bytes([os.pread(fd, 1, place)[0] ^ 1]), place)
            found += 1
        os.close(fd)
    return found


def memory_of(pid: int) -> int:
    """Bytes of shared memory that process ``pid`` holds by descriptors."""
    total = 0
    seen = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            if "memfd:mnemo" in str(link.readlink()):
                found = link.stat()
                if found.st_ino not in seen:
                    seen.add(found.st_ino)
                    total += found.st_blocks * 512
    return total


@contextlib.contextmanager
def memory_group(limit: int) -> Iterator[Path]:
    """A memory cgroup (version 1) of ``limit`` bytes; skips where none can be made."""
    group = Path("/sys/fs/cgroup/memory") / f"mnemo-test-{os.getpid()}"
    try:
        group.mkdir()
        (group / "memory.limit_in_bytes").write_text(str(limit))
    except OSError as error:
        with contextlib.suppress(OSError):
            group.rmdir()
        pytest.skip(f"no memory cgroup (version 1) can be made here: {error}")
    try:
        yield group
    finally:
        group.rmdir()
