"""Finds out where a process stands among the ranks, from torch.distributed and the machine."""

from __future__ import annotations

import hashlib
import itertools
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
import torch.distributed as dist

from mnemo.config import ResolvedConfig
from mnemo.errors import ConfigError
from mnemo.session.identity import RunIdentity, resolve_identity
from mnemo.smp.paths import default_parent
from mnemo.snapshot.layout import Share

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_fits = itertools.count()
_DEVICES: Final = ("cpu", "cuda")


def _alone(value: int) -> tuple[int, int]:
    """Agreement of a single rank with itself."""
    return value, value


def _own(text: bytes) -> list[bytes]:
    """What a single rank gathers."""
    return [text]


@dataclass(frozen=True)
class Place:
    """Where this process stands among the ranks."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    """Which of this node's ranks this is, from 0."""
    members: int = 1
    """Ranks on this node."""
    leaders: tuple[int, ...] = (0,)
    """The first rank of each node, in ascending order."""
    node: int = 0
    """Which of these nodes this is, from 0."""
    replicas: bool = False
    """Whether all members hold the same parameters and optimizer state."""
    agree: Callable[[int], tuple[int, int]] = _alone
    """Collective: smallest and largest of the ranks' values."""
    gather: Callable[[bytes], list[bytes]] = _own
    """Collective: what each rank gave, by rank."""

    def share(self, *, divide: bool) -> Share:
        """What this rank copies of a state: its part if replicas ``divide`` it, else all."""
        if divide and self.replicas and self.members > 1:
            return Share(self.local_rank, self.members)
        return Share(0, 1)


def next_fit() -> int:
    """How many trainings this process has begun before this one."""
    return next(_fits)


def is_distributed() -> bool:
    """Whether a process group is there to be used."""
    return dist.is_available() and dist.is_initialized()


def current_place(
    config: ResolvedConfig, *, replicas: bool, device: torch.device | None = None
) -> Place:
    """This process's place among the ranks of the default process group. Collective.

    Ranks are on one node where they share a machine and its directory of runs, so that they find
    the same snapshot process.

    Raises:
        ConfigError: There are several ranks that do not know each other yet, or on a device that
            is not supported.
    """
    _require_supported(device)
    if not is_distributed():
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ConfigError(
                f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but torch.distributed is not "
                "initialised: call torch.distributed.init_process_group() before mnemo starts"
            )
        return Place()

    def agree(value: int) -> tuple[int, int]:
        pair = torch.tensor([value, -value], dtype=torch.int64, device=device)
        dist.all_reduce(pair, op=dist.ReduceOp.MIN)
        return int(pair[0]), -int(pair[1])

    def gather(text: bytes) -> list[bytes]:
        longest = agree(len(text))[1]
        mine = torch.tensor(
            list(len(text).to_bytes(8, "little") + text.ljust(longest)),
            dtype=torch.uint8,
            device=device,
        )
        all_of_them = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(all_of_them, mine)
        rows = [bytes(row.tolist()) for row in all_of_them]
        return [row[8 : 8 + int.from_bytes(row[:8], "little")] for row in rows]

    rank = dist.get_rank()
    machines = gather(_machine(config.run.dir))
    leaders = tuple(r for r, machine in enumerate(machines) if machine not in machines[:r])
    mates = [r for r, machine in enumerate(machines) if machine == machines[rank]]
    return Place(
        rank=rank,
        world_size=len(machines),
        local_rank=mates.index(rank),
        members=len(mates),
        leaders=leaders,
        node=leaders.index(mates[0]),
        replicas=replicas and len(machines) > 1,
        agree=agree,
        gather=gather,
    )


def _require_supported(device: torch.device | None) -> None:
    kind = "cpu" if device is None else device.type
    if kind not in _DEVICES:
        raise ConfigError(
            f"the model is on {device}: mnemo keeps the state of {' and '.join(_DEVICES)} devices"
        )
    if kind != "cpu" and is_distributed() and dist.get_backend() == "mnemo":
        raise ConfigError(
            f"the process group's backend is mnemo, which is for CPUs in this version, and the "
            f"model is on {device}: use nccl. All but the replacing of single ranks works with it"
        )


def _machine(run_dir: str) -> bytes:
    """Sixteen bytes that are the same where processes find each other by `run.dir`."""
    directory = Path(os.path.realpath(run_dir or default_parent()))  # however it is spelled
    there = next(parent for parent in (directory, *directory.parents) if parent.exists())
    try:
        machine = _BOOT_ID.read_text()
    except OSError:  # a sandbox that hides it
        machine = platform.node()
    words = f"{machine}|{directory}|{there.stat().st_dev}"
    return hashlib.sha256(words.encode()).digest()[:16]


def shared_identity(config: ResolvedConfig) -> RunIdentity:
    """Rank 0's identity, on every rank. Collective."""
    identity = resolve_identity(config)
    if not is_distributed() or dist.get_world_size() == 1:
        return identity
    box: list[Any] = [identity]
    dist.broadcast_object_list(box, src=0)
    found: RunIdentity = box[0]
    return found
