"""How DDP lays gradients out in buckets, for a new process that joins others in mid-training.

DDP lays its buckets out anew after its first backward, when it knows in which order gradients come.
A new process has to have the same ones before its own first backward: a bucket is an operation.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from mnemo.comm.group import Group
from mnemo.comm.startup import unrecorded
from mnemo.errors import ReplayError

if TYPE_CHECKING:
    from torch.nn.parallel import DistributedDataParallel

Layout = list[list[int]]
"""For each bucket, the places of its parameters among those that DDP reduces."""


def obstacle(ddp: DistributedDataParallel) -> str | None:
    """Why a new process could not take part in this one's steps; None if it can."""
    inner: Any = ddp
    if inner.static_graph:
        return (
            "DDP's static_graph learns the graph in a first iteration that all ranks have at once"
        )
    stateful = [hook for hook, state in inner._comm_hooks if _keeps_something(state)]
    if stateful:
        return f"the communication hook {stateful[0].__qualname__} has a state of its own"
    return None


def layout(ddp: DistributedDataParallel) -> Layout | None:
    """The buckets; None as long as DDP has not laid them out by the order of gradients."""
    inner: Any = ddp
    if not inner._has_rebuilt_buckets and not inner.find_unused_parameters:
        return None
    return _buckets(inner)


def adopt(ddp: DistributedDataParallel, buckets: Layout | None) -> None:
    """Have the same layout as the others, in a new process that is alone and has done no backward.

    Args:
        ddp: That of this process.
        buckets: What `layout` gave on another rank at the boundary where this one begins. None: the
            others had done a backward and are to lay out theirs with their next forward.

    Raises:
        ReplayError: It cannot be had.
    """
    inner: Any = ddp
    if (why := obstacle(ddp)) is not None:
        raise ReplayError(why)
    if buckets is None:
        inner.reducer._push_all_rebuilt_params()
        return
    group = inner.process_group
    assert isinstance(group, Group)
    flat = [place for bucket in buckets for place in bucket]
    # What rank 0 tells the others of its layout (reducer.cpp, sync_bucket_indices).
    told = ([*flat, len(buckets)], [len(bucket) for bucket in buckets])
    with unrecorded(), group.told([torch.tensor(each, dtype=torch.int32) for each in told]):
        inner.reducer._push_all_rebuilt_params()
        inner._has_rebuilt_buckets = inner.reducer._rebuild_buckets()
    if _buckets(inner) != buckets:
        msg = f"DDP did not take the layout of the others: {buckets}"
        raise ReplayError(msg)


def _buckets(ddp: Any) -> Layout:
    parameters, _ = ddp._build_params_for_reducer()
    places = {id(each): place for place, each in enumerate(parameters)}
    buckets = ddp.reducer._get_zeros_like_grad_buckets()
    return [[places[id(each)] for each in bucket.parameters()] for bucket in buckets]


def _keeps_something(state: Any) -> bool:
    return state is not None and not isinstance(state, torch.distributed.ProcessGroup)
