"""Results are kept as long as a rank can be replaced, and no longer."""

from __future__ import annotations

import os
import signal
import time

import comm_lab
import pytest
import torch
import torch.distributed as dist

from mnemo import comm
from mnemo.errors import GroupBrokenError


def _keeps_and_then_does_not(rank: int, port: int, talk: comm_lab.Talk, size: int) -> float:
    del talk
    comm.mode.replaceable = True
    with comm_lab.group("mnemo", rank, size, port):
        group = dist.group.WORLD
        assert isinstance(group, comm.Group)
        tensor = torch.ones(10)
        comm.mark(2)
        dist.all_reduce(tensor)
        assert group.kept is not None
        comm.keep_nothing()
        dist.all_reduce(tensor)
        assert group.kept is None
        comm.mark(4)  # means nothing any more
        assert tensor.tolist() == [size**2] * 10
        if rank == size - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        begun = time.monotonic()
        with pytest.raises(GroupBrokenError):  # at once: nobody is to come
            dist.all_reduce(tensor)
        return time.monotonic() - begun


def test_who_keeps_nothing_waits_for_nobody() -> None:
    with comm_lab.world() as world:
        first, _ = world.start_all(_keeps_and_then_does_not, 2, 2)
        assert first.result() < comm.mode.patience_s / 2
