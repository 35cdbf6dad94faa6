"""One collective, as it is asked for: it may be run, run again, or be given its result."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mnemo.comm.c10d import Gloo
    from mnemo.comm.gloo import GlooLinks

    Job = Callable[[Gloo, list[torch.Tensor]], list[Any] | None]

_ALIGNED = 16


def nothing() -> None:
    """What a rank that is alone does for most operations."""


@dataclass(slots=True, eq=False)
class Operation:
    """What all members ask for at the same place in the group's order.

    Attributes:
        name: With what has to be the same on all members, but the tensors.
        outputs: The caller's tensors that hold the result afterwards.
        job: Computes it from the caller's inputs into tensors like ``outputs``, which may be
            these themselves; it gives other results only where gloo makes such.
        kept: The result is the same on all members, and lies in ``outputs``.
        proves: That it has ended proves that all members had asked for it.
        alone: What it does in a rank that is alone, with nothing recorded.
        recorded: It belongs to the record of the start.
        index: Its place.
        links: The communicator at that time. Where no results are kept it ends with it.
    """

    name: str
    outputs: list[torch.Tensor]
    job: Job
    kept: bool = True
    proves: bool = True
    alone: Callable[[], object] = field(default=nothing)
    recorded: bool = True
    index: int = -1
    links: GlooLinks | None = None

    @property
    def signature(self) -> str:
        """What has to be the same where a result of another rank is taken."""
        if not self.kept:
            return self.name
        tensors = (f"{str(each.dtype)[6:]}{list(each.shape)}" for each in self.outputs)
        return " ".join((self.name, *tensors))


def size_of(tensors: Sequence[torch.Tensor]) -> int:
    """Bytes that `views` needs."""
    return sum(-(-each.nbytes // _ALIGNED) * _ALIGNED for each in tensors)


def views(data: torch.Tensor, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Contiguous tensors like these, one after the other in ``data``, which is bytes."""
    found, at = [], 0
    for each in tensors:
        found.append(data[at : at + each.nbytes].view(each.dtype).view(each.shape))
        at += -(-each.nbytes // _ALIGNED) * _ALIGNED
    return found


def fill(tensors: Sequence[torch.Tensor], data: torch.Tensor) -> None:
    """Give these the values that lie in ``data``."""
    for each, value in zip(tensors, views(data, tensors), strict=True):
        each.copy_(value)
