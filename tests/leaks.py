"""What a test may leave behind, seen from outside: processes, threads, files, sockets, memory.

`watch` compares the machine before and after a test and waits a bounded time for what is
still on its way out. Things that other jobs on the machine create meanwhile are told apart:
processes by a marker in their environment or by their address-space layout (a fork without
exec keeps it), files by who holds them open. So are those of another test process that runs
beside this one. Linux only, as the project is.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import multiprocessing.resource_tracker
import multiprocessing.util
import os
import re
import select
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

patience_s = 10.0
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
class Process:
    """One process, told by when it began from others that had or will have its id."""

    pid: int
    began: int
    parent: int = field(compare=False)
    layout: tuple[bytes, bytes] | None = field(compare=False)
    """Where code and stack start: random per exec, kept by a fork. None if hidden."""


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
def watch() -> Iterator[list[Trace]]:
    """Run a block in a private room; afterwards the yielded list names what it left behind.

    Left processes are killed, the environment is restored and the room is removed in any case.
    """
    left: list[Trace] = []
    room, environment = Room.make(), dict(os.environ)
    os.environ.update(room.environment())
    tempfile.tempdir, default_temp = None, tempfile.tempdir
    inside = dict(os.environ)
    processes, before = frozenset(_processes()), take(room)
    try:
        yield left
    finally:
        left += wait_until_gone(room, processes, before)
        left += _environment_changes(inside, dict(os.environ))
        for trace in left:
            if isinstance(trace.key, Process):
                _end(trace.key)
        os.environ.clear()
        os.environ.update(environment)
        tempfile.tempdir = default_temp
        shutil.rmtree(room.root, ignore_errors=True)


def take(room: Room) -> frozenset[Trace]:
    """List everything but processes that exists now and that a test could be blamed for."""
    sources = (_threads(), _descriptors(), _mappings(), _sockets(room), _files(room))
    return frozenset(itertools.chain(*sources))


def wait_until_gone(
    room: Room, processes: frozenset[Process], before: frozenset[Trace]
) -> list[Trace]:
    """Return what exists beyond those, after at most `patience_s` seconds of waiting."""
    deadline = time.monotonic() + patience_s
    while True:
        left = take(room) - before
        left |= set(_left_processes(room, processes))
        ours = {t.key.pid for t in left if isinstance(t.key, Process)} | {os.getpid()}
        foreign = _held_by_others({t.text for t in left if t.kind in _SHARED_KINDS}, ours)
        left = {t for t in left if t.text not in foreign}
        if not left or time.monotonic() > deadline:
            return sorted(left, key=str)
        gc.collect()
        time.sleep(0.02)  # descriptors and files announce nothing; waiting would reap zombies


def _processes() -> Iterator[Process]:
    for name in os.listdir("/proc"):  # noqa: PTH208 - names only, as fast as it gets
        if name.isdigit():
            with contextlib.suppress(OSError):
                with open(f"/proc/{name}/stat", "rb") as file:  # noqa: PTH123 - as above
                    fields = file.read().rpartition(b")")[2].split()
                layout = None if fields[25] == b"0" else (fields[23], fields[25])
                yield Process(int(name), int(fields[19]), int(fields[1]), layout)


def _left_processes(room: Room, before: frozenset[Process]) -> Iterator[Trace]:
    now = {process.pid: process for process in _processes()}
    # The tests may share a child, which may have forked what is an orphan by now.
    family = {os.getpid()}
    while more := {p.pid for p in now.values() if p.parent in family} - family:
        family |= more
    layouts = {now[pid].layout for pid in family} - {None}
    marker = room.marker.encode()
    for process in set(now.values()) - before:
        pid = process.pid
        with contextlib.suppress(psutil.NoSuchProcess, OSError):
            if not (
                pid in family
                or process.layout in layouts
                or marker in Path(f"/proc/{pid}/environ").read_bytes()
                or marker in Path(f"/proc/{pid}/cmdline").read_bytes()
            ):
                continue
            status = psutil.Process(pid).status()
            if status == psutil.STATUS_ZOMBIE and process.parent == 1:
                continue  # it has ended; some containers' first process is slow to take note
            command = psutil.Process(pid).name()
            with contextlib.suppress(psutil.ZombieProcess):
                command = " ".join(psutil.Process(pid).cmdline())[:200]
            yield Trace("process", process, f"{pid} {status} {command}")


def _end(process: Process) -> None:
    """Kill it, and reap it if it is a child; an orphan is reaped by others, in their own time."""
    with contextlib.suppress(ProcessLookupError):
        ended = os.pidfd_open(process.pid)
        try:
            if process in _processes():  # and not another one of its id
                signal.pidfd_send_signal(ended, signal.SIGKILL)
                select.select([ended], [], [], 5)
        finally:
            os.close(ended)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(process.pid, os.WNOHANG)


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
_TORCHS = re.compile(r"/dev/shm/torch_(\d+)_")  # named after the process that made it


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
    """Return those of ``paths`` that a process outside the test made or has a file open under."""
    held: set[str] = set()
    if not paths:
        return held
    others = set(psutil.pids()) - ours
    for path in paths:
        if (made := _TORCHS.match(path)) and int(made[1]) in others:
            held.add(path)
    for pid in others:
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
