"""The training of `benchmarks.recovery` under NVRx's in-process restart, with a rank in reserve.

NVRx runs the function again and brings no state: ranks that are left have theirs in memory, and
the one that was in reserve is sent it by one of them, which is the least that can be done.
"""

# Annotations are no strings here, for NVRx looks for the type of the parameter that it fills in.
import os
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from nvidia_resiliency_ext import inprocess
from torch.nn.parallel import DistributedDataParallel

from benchmarks.recovery_marks import mark
from benchmarks.recovery_plain import Training

_RANKS = int(os.environ["WORLD_SIZE"]) - 1
_PORT, *_PORTS = map(int, os.environ["STORE_PORTS"].split())
"""Of NVRx's Store, and of those of the group, before and after the kill."""
_latest: dict[str, Any] = {"step": 0}
"""State after the newest step that this process has done."""


def _group(iteration: int) -> None:
    """The process group of one run of the function."""
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = dist.TCPStore("127.0.0.1", _PORTS[iteration], ranks, is_master=rank == 0)
    patience = timedelta(seconds=60)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=patience)


def _newest(training: Training) -> int:
    """Have all start from the state of the rank that is furthest; its step."""
    steps: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(steps, _latest["step"])
    step = max(steps)
    if step:
        source = steps.index(step)
        found = [_latest.get("state")]
        if min(steps) < step:
            dist.broadcast_object_list(found, source)
        training.load(found[0])
    return step


@inprocess.Wrapper(
    store_kwargs={"port": _PORT},
    rank_assignment=inprocess.Compose(
        inprocess.rank_assignment.MaxActiveWorldSize(_RANKS),
        inprocess.rank_assignment.ShiftRanks(),
    ),
)
def train(call_wrapper: inprocess.CallWrapper = None) -> None:
    """Until killed."""
    mark("called")
    _group(call_wrapper.iteration)
    mark("group")
    training = Training()
    step = _newest(training)
    mark("ready")
    ddp = DistributedDataParallel(training.model)
    for window in training.batches(dist.get_rank(), dist.get_world_size(), step):
        call_wrapper.ping()
        step += 1
        training.backward(ddp, window, step)
        training.optimizer.step()
        training.optimizer.zero_grad()
        _latest.update(step=step, state=training.state())
        mark("step", step=step)


if __name__ == "__main__":
    mark("imported")
    train()
