"""Process groups whose communicators can be replaced while the groups stay.

Importing this registers the backend ``mnemo`` with torch, and nothing else::

    import mnemo.comm

    dist.init_process_group("mnemo")

It wraps gloo. When a rank is lost, whoever supervises the ranks says so (`mark_broken`), and all
who wait for it go on at once; before results are used, `check` raises. When its place is taken,
all ranks call `reconfigure`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from mnemo.comm.group import Group
from mnemo.comm.membership import Changes, check, links, mark_broken, reconfigure

if TYPE_CHECKING:
    from mnemo.comm.c10d import ProcessGroup

__all__ = ["Changes", "Group", "check", "links", "mark_broken", "reconfigure"]


def _create(options: Any, own_options: object) -> ProcessGroup:
    del own_options
    ranks = list(options.global_ranks_in_group) or range(options.group_size)
    return Group(options.group_id, ranks, options.group_rank, options.store, options.timeout)


dist.Backend.register_backend("mnemo", _create, extended_api=True, devices=["cpu"])
