"""What a test may leave behind, seen from outside: processes, threads, files, sockets, memory.

`watch` compares the machine before and after a test and waits a bounded time for what is
still on its way out. Things that other jobs on the machine create meanwhile are told apart:
processes by a marker in their environment or by their address-space layout (a fork without
exec keeps it), files by who holds them open. Linux only, as the project is.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import multiprocessing.resource_tracker
import multiprocessing.util
import os
import shutil
import signal
import tempfile
import threading
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    from collections.abc import Iterator

PATIENCE_S = 10.0
"""How long something may take to go away after a test."""

MARKER = "MNEMO_TEST_ID"
"""Environment variable that tells a test's processes from all others."""

# Set by importing or seeding Lightning and never unset by it; restored, not reported.
_FRAMEWORK_VARIABLES = frozenset(
    {"PL_GLOBAL_SEED", "PL_SEED_WORKERS", "CUBLAS_WORKSPACE_CONFIG", "CRC32C_SW_MODE"}
    | {"KMP_INIT_AT_FORK", "KMP_DUPLICATE_LIB_OK", "TORCHINDUCTOR_CACHE_DIR"}
    | {"PYTORCH_NVML_BASED_CUDA_CHECK"}
    | {"PYTEST_CURRENT_TEST", "PYTEST_VERSION"}
)
# Daemon threads that a library keeps for the whole life of the process.
_LIBRARY_THREADS = ("TMonitor", "tqdm", "fsspecIO")


@dataclass(frozen=True)
class Trace:
    """One thing that exists; two are the same thing when kind and key are equal."""

    kind: str
    key: object
    text: str = field(compare=False)

    def __str__(self) -> str:
        return f"{self.kind}: {self.text}"


@dataclass(frozen=True)
class Room:
    """The private place that a test gets; unix socket paths in it stay far below 107 bytes."""

    root: Path
    marker: str

    @classmethod
    def make(cls) -> Room:
        """Make a fresh one under the system's temporary directory."""
        marker = uuid.uuid4().hex
        root = Path(tempfile.gettempdir()) / f"mt-{marker[:10]}"
        for name in ("run", "journal", "tmp"):
            (root / name).mkdir(mode=0o700, parents=True)
        root.chmod(0o700)
        return cls(root, marker)

    def environment(self) -> dict[str, str]:
        """Return the variables that point a test and all its processes here."""
        return {
            MARKER: self.marker,
            "MNEMO_RUN__DIR": str(self.root / "run"),
            "MNEMO_RUN__JOURNAL": str(self.root / "journal"),
            "TMPDIR": str(self.root / "tmp"),
        }


def warm_up() -> None:
    """Start what Python starts once per process, so that no test is blamed for it."""
    multiprocessing.resource_tracker.ensure_running()
    multiprocessing.util.get_temp_dir()
    with contextlib.suppress(ImportError):
        import fsspec.asyn

        fsspec.asyn.get_loop()


@contextlib.contextmanager
def watch(*, patience_s: float = PATIENCE_S) -> Iterator[list[Trace]]:
    """Run a block in a private room; afterwards the yielded list names what it left behind.

    Left processes are killed, the environment is restored and the room is removed in any case.
    """
    left: list[Trace] = []
    room, environment = Room.make(), dict(os.environ)
    os.environ.update(room.environment())
    tempfile.tempdir, default_temp = None, tempfile.tempdir
    inside = dict(os.environ)
    before = take(room)
    try:
        yield left
    finally:
        left += wait_until_gone(room, before, patience_s)
        left += _environment_changes(inside, dict(os.environ))
        for trace in left:
            if isinstance(trace.key, psutil.Process):
                with contextlib.suppress(psutil.NoSuchProcess):
                    trace.key.send_signal(signal.SIGKILL)
                    trace.key.wait(timeout=5)
        os.environ.clear()
        os.environ.update(environment)
        tempfile.tempdir = default_temp
        shutil.rmtree(room.root, ignore_errors=True)


def take(room: Room) -> frozenset[Trace]:
    """List everything that exists now and that a test could be blamed for."""
    sources = (_processes(room), _threads(), _descriptors(), _mappings())
    return frozenset(itertools.chain(*sources, _sockets(room), _files(room)))


def wait_until_gone(room: Room, before: frozenset[Trace], patience_s: float) -> list[Trace]:
    """Return what exists beyond ``before``, after at most ``patience_s`` seconds of waiting."""
    deadline = time.monotonic() + patience_s
    while True:
        left = take(room) - before
        ours = {t.key.pid for t in left if isinstance(t.key, psutil.Process)} | {os.getpid()}
        foreign = _held_by_others({t.text for t in left if t.kind in _SHARED_KINDS}, ours)
        left = {t for t in left if t.text not in foreign}
        if not left or time.monotonic() > deadline:
            return sorted(left, key=str)
        gc.collect()
        time.sleep(0.02)  # descriptors and files announce nothing; waiting would reap zombies


def _processes(room: Room) -> Iterator[Trace]:
    own_pid, own_layout = os.getpid(), _layout(os.getpid())
    children = {child.pid for child in psutil.Process().children(recursive=True)}
    marker = room.marker.encode()
    for pid in psutil.pids():
        with contextlib.suppress(psutil.NoSuchProcess, OSError):
            if pid == own_pid or not (
                pid in children
                or _layout(pid) == own_layout
                or marker in Path(f"/proc/{pid}/environ").read_bytes()
                or marker in Path(f"/proc/{pid}/cmdline").read_bytes()
            ):
                continue
            process = psutil.Process(pid)
            if process.status() == psutil.STATUS_ZOMBIE and process.ppid() == 1:
                continue  # it has ended; some containers' first process is slow to take note
            command = process.name()
            with contextlib.suppress(psutil.ZombieProcess):
                command = " ".join(process.cmdline())[:200]
            yield Trace("process", process, f"{pid} {process.status()} {command}")


def _layout(pid: int) -> tuple[bytes, ...]:
    """Where a process's code and stack start: random per exec, kept by a fork."""
    fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    return (fields[23], fields[25])


def _threads() -> Iterator[Trace]:
    for thread in threading.enumerate():
        name = f"{thread.name} ({type(thread).__name__})"
        if not any(known in name for known in _LIBRARY_THREADS):
            yield Trace("thread", thread, name)


def _descriptors() -> Iterator[Trace]:
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208 - names only, as fast as it gets
        with contextlib.suppress(OSError):  # the listing's own descriptor is closed by now
            target = str(Path(f"/proc/self/fd/{name}").readlink())
            kind = "memfd" if target.startswith("/memfd:") else "file descriptor"
            yield Trace(kind, (name, target), f"{name} -> {target}")


def _mappings() -> Iterator[Trace]:
    with open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:  # noqa: PTH123
        for line in maps:
            if "/memfd:" in line or "/dev/shm/" in line:
                _, _, _, _, inode, path = line.split(None, 5)
                yield Trace("shared memory mapping", (inode, path), f"{path.strip()} ({inode})")


def _sockets(room: Room) -> Iterator[Trace]:
    for line in Path("/proc/net/unix").read_text(errors="replace").splitlines()[1:]:
        _, _, path = line.partition(str(room.root))
        if path:
            yield Trace("unix socket", path, f"{room.root}{path}")


_SHARED_KINDS = ("/dev/shm entry", "/tmp entry")


def _files(room: Room) -> Iterator[Trace]:
    for entry in os.scandir("/dev/shm"):
        yield Trace("/dev/shm entry", entry.inode(), entry.path)
    for entry in os.scandir("/tmp"):
        if entry.name.startswith("mnemo"):
            yield Trace("/tmp entry", entry.inode(), entry.path)
    for place, kind in (("tmp", "temporary file"), ("run", "run directory entry")):
        for path in (room.root / place).iterdir():
            if not path.name.startswith("torchinductor_"):  # torch's cache, made at import
                yield Trace(kind, path, str(path))


def _held_by_others(paths: set[str], ours: set[int]) -> set[str]:
    """Return those of ``paths`` in or under which a process outside the test has a file open."""
    held: set[str] = set()
    if not paths:
        return held
    for pid in set(psutil.pids()) - ours:
        with contextlib.suppress(OSError):
            for link in Path(f"/proc/{pid}/fd").iterdir():
                with contextlib.suppress(OSError):
                    target = str(link.readlink())
                    held |= {p for p in paths if target == p or target.startswith(p + "/")}
    return held


def _environment_changes(before: dict[str, str], after: dict[str, str]) -> list[Trace]:
    names = (before.keys() | after.keys()) - _FRAMEWORK_VARIABLES
    return [
        Trace("environment", name, f"{name}: {before.get(name)!r} became {after.get(name)!r}")
        for name in sorted(names)
        if before.get(name) != after.get(name)
    ]
