"""Why a resumed training may be rounded otherwise than an undisturbed one."""

from __future__ import annotations

import torch
from torch.nn.parallel import DistributedDataParallel

from mnemo import comm

_ENOUGH_TO_DIFFER = 3
"""Two numbers have one sum; that of three depends on the order."""


def first_sum_differs(model: torch.nn.Module | None, world_size: int) -> str:
    """What is different in the first step of a life, in words; '' if nothing is.

    DDP fills its buckets by the order of the parameters at first and by that of the gradients
    after one backward pass, unless it looks for unused parameters. Where an element lies decides
    in which order the ranks' values are added.
    """
    if (
        world_size < _ENOUGH_TO_DIFFER
        or not isinstance(model, DistributedDataParallel)
        or (model.find_unused_parameters and not model.static_graph)
        or isinstance(model.process_group, comm.Group)  # adds in the order of ranks
    ):
        return ""
    return (
        "DDP adds the gradients of the first step in another order, which more than two ranks "
        "round differently: find_unused_parameters=True does not"
    )
