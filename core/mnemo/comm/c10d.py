"""Names of torch.distributed that are not in its stubs, or differently; untyped here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    Gloo = Any
    ProcessGroup = Any
    Store = Any
    Work = Any
    AllgatherOptions: Any
    AllreduceOptions: Any
    AllToAllOptions: Any
    BarrierOptions: Any
    BroadcastOptions: Any
    GatherOptions: Any
    HashStore: Any
    PrefixStore: Any
    ProcessGroupGloo: Any
    ReduceOp: Any
else:
    from torch._C._distributed_c10d import (
        AllgatherOptions,
        AllreduceOptions,
        AllToAllOptions,
        BarrierOptions,
        BroadcastOptions,
        GatherOptions,
        HashStore,
        PrefixStore,
        ProcessGroup,
        ReduceOp,
        Store,
        Work,
    )
    from torch.distributed import ProcessGroupGloo

    Gloo = ProcessGroupGloo

__all__ = [
    "AllToAllOptions",
    "AllgatherOptions",
    "AllreduceOptions",
    "BarrierOptions",
    "BroadcastOptions",
    "GatherOptions",
    "Gloo",
    "HashStore",
    "PrefixStore",
    "ProcessGroup",
    "ProcessGroupGloo",
    "ReduceOp",
    "Store",
    "Work",
]
