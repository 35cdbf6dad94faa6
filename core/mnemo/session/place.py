"""Finds out where a process stands, from torch.distributed and the launcher's environment."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from mnemo.config import ResolvedConfig
from mnemo.errors import ConfigError
from mnemo.session.identity import RunIdentity, resolve_identity

_fits = itertools.count()


def _alone(value: int) -> tuple[int, int]:
    """Agreement of a single rank with itself."""
    return value, value


@dataclass(frozen=True)
class Place:
    """Where this process stands among the ranks."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    members: int = 1
    """Ranks on this node."""
    replicas: bool = False
    """Whether all members hold the same parameters and optimizer state."""
    agree: Callable[[int], tuple[int, int]] = _alone
    """Collective: smallest and largest of the ranks' values."""


def next_fit() -> int:
    """How many trainings this process has begun before this one."""
    return next(_fits)


def is_distributed() -> bool:
    """Whether a process group is there to be used."""
    return dist.is_available() and dist.is_initialized()


def current_place(*, replicas: bool, device: torch.device | None = None) -> Place:
    """This process's place among the ranks of the default process group.

    Raises:
        ConfigError: The ranks are spread over several nodes, which this version does not do; or
            there are several that do not know each other yet.
    """
    if not is_distributed():
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ConfigError(
                f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but torch.distributed is not "
                "initialised: call torch.distributed.init_process_group() before mnemo starts"
            )
        return Place()
    world = dist.get_world_size()
    members = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    if members != world:
        raise ConfigError(
            f"{world} ranks on several nodes ({members} on this one): "
            "this version of mnemo protects one node"
        )
    rank = dist.get_rank()
    local = int(os.environ.get("LOCAL_RANK", rank))

    def agree(value: int) -> tuple[int, int]:
        pair = torch.tensor([value, -value], dtype=torch.int64, device=device)
        dist.all_reduce(pair, op=dist.ReduceOp.MIN)
        return int(pair[0]), -int(pair[1])

    return Place(rank, world, local, members, replicas and world > 1, agree)


def shared_identity(config: ResolvedConfig) -> RunIdentity:
    """Rank 0's identity, on every rank. Collective."""
    identity = resolve_identity(config)
    if not is_distributed() or dist.get_world_size() == 1:
        return identity
    box: list[Any] = [identity]
    dist.broadcast_object_list(box, src=0)
    found: RunIdentity = box[0]
    return found
