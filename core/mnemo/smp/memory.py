"""How much memory snapshots may take here, and what the SMP's memory survives."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import psutil

_UNLIMITED = 1 << 60


@dataclass(frozen=True)
class MemoryLimit:
    """Bytes that can still be had, and what bounds them (``host`` or ``container``)."""

    available: int
    total: int
    bound: str


def _read_int(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _cgroup_directories() -> list[Path]:
    """Memory cgroup directories of this process, innermost first, v2 and v1."""
    found: list[Path] = []
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return found
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root = Path("/sys/fs/cgroup")
        elif "memory" in controllers.split(","):
            root = Path("/sys/fs/cgroup/memory")
        else:
            continue
        directory = root / path.lstrip("/")
        while True:
            found.append(directory)
            if directory == root or root not in directory.parents:
                break
            directory = directory.parent
    return found


def _cgroup_limit() -> tuple[int, int] | None:
    """``(available, limit)`` of the tightest memory cgroup, or None without a limit."""
    tightest: tuple[int, int] | None = None
    for directory in _cgroup_directories():
        for limit_name, usage_name in (
            ("memory.max", "memory.current"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ):
            limit = _read_int(directory / limit_name)
            usage = _read_int(directory / usage_name)
            if limit is None or usage is None or limit >= _UNLIMITED:
                continue
            room = limit - usage + _reclaimable(directory)
            if tightest is None or room < tightest[0]:
                tightest = (room, limit)
    return tightest


def _reclaimable(directory: Path) -> int:
    """Page cache that the kernel would give back, bytes."""
    try:
        pairs = (line.split() for line in (directory / "memory.stat").read_text().splitlines())
        stat = {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2}
    except (OSError, ValueError):
        return 0
    return stat.get("inactive_file", 0)


def memory_limit() -> MemoryLimit:
    """What this process, and those in its cgroup, can still allocate."""
    host = psutil.virtual_memory()
    limit = MemoryLimit(host.available, host.total, "host")
    group = _cgroup_limit()
    if group is not None and group[1] < host.total and group[0] < host.available:
        limit = MemoryLimit(group[0], group[1], "container")
    return limit


def survival_domain() -> dict[str, bool | None]:
    """What the memory of an SMP started here outlives; None where that cannot be told."""
    slurm = "SLURM_JOB_ID" in os.environ
    contained = Path("/.dockerenv").exists() or "KUBERNETES_SERVICE_HOST" in os.environ
    return {
        "the trainer's death": True,
        "the launcher's end": None if slurm else True,
        "the container's restart": False if contained else None,
        "an out-of-memory kill": not _oom_kills_group(),
    }


def _oom_kills_group() -> bool:
    return any(_read_int(d / "memory.oom.group") == 1 for d in _cgroup_directories())


def rank_above(smp_pid: int) -> None:
    """Make this process a likelier victim of the OOM killer than the SMP is.

    Raising one's own score needs no privilege; where it fails all the same, nothing is lost but
    the preference.
    """
    try:
        smp = int(Path(f"/proc/{smp_pid}/oom_score_adj").read_text())
        own = Path("/proc/self/oom_score_adj")
        if int(own.read_text()) < min(smp + 200, 1000):
            own.write_text(str(min(smp + 200, 1000)))
    except (OSError, ValueError):
        return
