"""Reductions of floating-point numbers that do not depend on how gradients lie in buckets.

gloo's ring adds the ranks' numbers in an order that depends on the place in the tensor, so a
changed bucket layout changes the last bits. Here each number is reduced in the order of ranks,
wherever it lies: every rank gets one part of the tensor from all others, reduces it, and gives it
back. That moves the ring's bytes. Two ranks give each other all, which does, too. For whole numbers
gloo's own is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from mnemo.comm.c10d import (
    AllgatherOptions,
    AllreduceOptions,
    AllToAllOptions,
    GatherOptions,
    ReduceOp,
)
from mnemo.comm.gloo import begun, ended

if TYPE_CHECKING:
    from collections.abc import Callable

    from mnemo.comm.c10d import Gloo

    Pairwise = Callable[..., torch.Tensor]

_GLOO_HAS = {
    ReduceOp.SUM: ReduceOp.SUM,
    ReduceOp.AVG: ReduceOp.SUM,
    ReduceOp.PRODUCT: ReduceOp.PRODUCT,
}
"""For two ranks, as these commute."""

COPIED_BYTES = 2 << 20
"""Up to here, two ranks copy what has to stay as it is and use gloo's; beyond, they exchange pieces
of this size and add each when it has come."""

SMALL_BYTES = 32 << 10
"""Up to here, all give all everything: one round instead of two."""

_TAG = 1 << 30
"""Of messages between these; users' tags are small."""

_PAIRWISE: dict[Any, Pairwise] = {
    ReduceOp.SUM: torch.add,
    ReduceOp.AVG: torch.add,
    ReduceOp.PRODUCT: torch.mul,
    ReduceOp.MIN: torch.minimum,
    ReduceOp.MAX: torch.maximum,
}


def applies(tensor: torch.Tensor, op: Any) -> bool:
    """Whether the order matters for these numbers, and the operation is one of those here."""
    floating = tensor.is_floating_point() and tensor.layout == torch.strided
    return floating and ReduceOp.RedOpType(kind_of(op)) in _PAIRWISE


def allreduce(
    gloo: Gloo, tensor: torch.Tensor, into: torch.Tensor, op: Any, scratch: Scratch
) -> None:
    """Reduce ``tensor`` on all ranks.

    Args:
        gloo: The communicator.
        tensor: This rank's numbers.
        into: Where the result goes: the same tensor, or a contiguous one of its shape, and then
            ``tensor`` stays as it is.
        op: The reduction.
        scratch: For what comes from others.
    """
    if into is not tensor:
        flat, target = tensor.contiguous().view(-1), into.view(-1)
    elif torch.ops.aten.is_non_overlapping_and_dense(tensor):
        flat = target = flattened(tensor)
    else:
        whole = tensor.contiguous()
        allreduce(gloo, whole, whole, op, scratch)
        tensor.copy_(whole)
        return
    if flat.numel() == 0:
        return
    if not applies(tensor, op) or gloo.size() == 1:
        if target is not flat:
            target.copy_(flat)
        options = AllreduceOptions()
        mean = kind_of(op) == ReduceOp.AVG and not target.is_floating_point()
        options.reduceOp = ReduceOp.SUM if mean else op
        ended(gloo.allreduce([target], options))
        if mean:  # gloo has none of whole numbers
            target.copy_(target / gloo.size())
        return
    kind = ReduceOp.RedOpType(kind_of(op))
    two = gloo.size() == 2
    if two and kind in _GLOO_HAS and (target is flat or flat.nbytes <= COPIED_BYTES):
        if target is not flat:
            target.copy_(flat)
        options = AllreduceOptions()
        options.reduceOp = _GLOO_HAS[kind]
        ended(gloo.allreduce([target], options))
        if kind == ReduceOp.AVG:
            target.div_(2)
    elif flat.nbytes > SMALL_BYTES:
        in_turns = _allreduce_of_two if two else _allreduce_in_parts
        in_turns(gloo, flat, target, kind, scratch)
    else:
        everything = scratch.like(flat, gloo.size() * flat.numel())
        ended(gloo._allgather_base(everything, flat, AllgatherOptions()))
        _reduce_rows(everything.view(gloo.size(), -1), kind, target)


def _allreduce_of_two(
    gloo: Gloo, flat: torch.Tensor, target: torch.Tensor, kind: Any, scratch: Scratch
) -> None:
    """Each gives the other all: the bytes of a ring of two, in one round."""
    received = scratch.like(flat, flat.numel()) if target is flat else target
    other, numbers = 1 - gloo.rank(), COPIED_BYTES // flat.element_size()
    parts = [torch.split(each, numbers) for each in (received, flat, target)]
    coming = [begun(gloo.recv, [each], other, _TAG) for each in parts[0]]
    going = [begun(gloo.send, [each], other, _TAG) for each in parts[1]]
    pairwise = _PAIRWISE[kind]
    for theirs, mine, into, came, sent in zip(*parts, coming, going, strict=True):
        ended(came)
        ended(sent)
        pairwise(*((theirs, mine) if other == 0 else (mine, theirs)), out=into)
        if kind == ReduceOp.AVG:
            into.div_(2)


def _allreduce_in_parts(
    gloo: Gloo, flat: torch.Tensor, target: torch.Tensor, kind: Any, scratch: Scratch
) -> None:
    size = gloo.size()
    part = flat.numel() // size
    parts = [part] * (size - 1) + [flat.numel() - part * (size - 1)]
    mine = parts[gloo.rank()]
    received = scratch.like(flat, size * mine)
    ended(gloo.alltoall_base(received, flat, [mine] * size, parts, AllToAllOptions()))
    # By messages, straight into place: gloo's all-gather of this size makes and copies another.
    me, segments = gloo.rank(), torch.split(target, parts)
    _reduce_rows(received.view(size, mine), kind, segments[me])
    others = [(me + each) % size for each in range(1, size)]
    works = [begun(gloo.recv, [segments[each]], each, _TAG) for each in others]
    works += [begun(gloo.send, [segments[me]], each, _TAG) for each in others]
    for each in works:
        ended(each)


def reduce_scatter(
    gloo: Gloo, output: torch.Tensor, parts: torch.Tensor, op: Any, scratch: Scratch
) -> None:
    """Reduce each part, as long as ``output``, for the rank of its place."""
    received = scratch.like(output, parts.numel())
    ended(gloo.alltoall_base(received, parts.view(-1), [], [], AllToAllOptions()))
    rows = received.view(gloo.size(), -1)
    output.copy_(_reduce_rows(rows, kind_of(op), rows[0]).view_as(output))


def reduce(gloo: Gloo, tensor: torch.Tensor, op: Any, root: int) -> None:
    """Reduce ``tensor`` on ``root``; elsewhere it stays as it is."""
    options = GatherOptions()
    options.rootRank = root
    if gloo.rank() != root:
        ended(gloo.gather([], [tensor], options))
        return
    gathered = tensor.new_empty((gloo.size(), *tensor.shape))
    ended(gloo.gather([list(gathered)], [tensor], options))
    _reduce_rows(gathered, kind_of(op), tensor)


def _reduce_rows(rows: torch.Tensor, kind: Any, into: torch.Tensor) -> torch.Tensor:
    """Reduce in the order of rows, at least two of them."""
    pairwise = _PAIRWISE[ReduceOp.RedOpType(kind)]
    pairwise(rows[0], rows[1], out=into)
    for row in rows[2:]:
        pairwise(into, row, out=into)
    if kind == ReduceOp.AVG:
        into.div_(len(rows))
    return into


def flattened(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's memory in one dimension; a copy only if it has gaps."""
    if torch.ops.aten.is_non_overlapping_and_dense(tensor):
        return tensor.as_strided((tensor.numel(),), (1,))
    return tensor.reshape(-1)


def kind_of(op: Any) -> Any:
    """The reduction without its factor."""
    return op.op if isinstance(op, ReduceOp) else op


class Scratch:
    """Memory that is used again by the next reduction; new memory costs a page fault each 4 KiB."""

    def __init__(self) -> None:
        self._bytes = torch.empty(0, dtype=torch.uint8)

    def like(self, tensor: torch.Tensor, numel: int) -> torch.Tensor:
        """``numel`` numbers of the tensor's kind, with any values."""
        size = numel * tensor.element_size()
        if self._bytes.numel() < size:
            self._bytes = torch.empty(size, dtype=torch.uint8)
        return self._bytes[:size].view(tensor.dtype)
