"""Process groups whose communicators can be replaced while the groups stay.

Importing this registers the backend ``mnemo`` with torch, and nothing else::

    import mnemo.comm

    dist.init_process_group("mnemo")

It wraps gloo. When a rank is lost, whoever supervises the ranks says so. Where ranks can be
replaced (`mode`), operations then wait (`hold`) until another process has taken its place, begun
again at the last boundary (`mark`), and all have called `reconfigure`. Otherwise all who wait go
on at once (`mark_broken`), and before results are used, `check` raises.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from mnemo.comm.group import Group
from mnemo.comm.handing import handover
from mnemo.comm.membership import (
    Changes,
    check,
    give_up,
    keep_nothing,
    links,
    mark,
    mark_broken,
    pass_update,
    reconfigure,
)
from mnemo.comm.modes import mode
from mnemo.comm.replacing import hold
from mnemo.comm.startup import unrecorded

if TYPE_CHECKING:
    from mnemo.comm.c10d import ProcessGroup

__all__ = [
    "Changes",
    "Group",
    "check",
    "give_up",
    "handover",
    "hold",
    "keep_nothing",
    "links",
    "mark",
    "mark_broken",
    "mode",
    "pass_update",
    "reconfigure",
    "unrecorded",
]


def _create(options: Any, own_options: object) -> ProcessGroup:
    del own_options
    ranks = list(options.global_ranks_in_group) or range(options.group_size)
    return Group(options.group_id, ranks, options.group_rank, options.store, options.timeout)


dist.Backend.register_backend("mnemo", _create, extended_api=True, devices=["cpu"])
