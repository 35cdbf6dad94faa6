"""The collectives of a group: what each of them computes, and which results are the same on all.

Which of torch's names are called: Python calls the methods by name, C++ (DDP's reducer, functional
collectives) those that torch's trampoline class passes on. Older torch has other names for some.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any

import torch

from mnemo.comm import ordered
from mnemo.comm.c10d import AllgatherOptions, AllToAllOptions, BarrierOptions
from mnemo.comm.gloo import LinkError, ended
from mnemo.comm.operation import Operation

if TYPE_CHECKING:
    from collections.abc import Iterable
    from datetime import timedelta

    from mnemo.comm.c10d import Gloo, Work
    from mnemo.comm.operation import Job

Tensors = list[torch.Tensor]


class Collectives:
    """What is asked by name. A group runs it."""

    member: int
    scratch: ordered.Scratch

    @abstractmethod
    def ask(self, operation: Operation, results: list[Any], written: Tensors) -> Work:
        """Have it run.

        Args:
            operation: What is to be done.
            results: What the work's future is to hold.
            written: What is poisoned if it breaks.
        """

    def _own(self, name: str, outputs: Tensors, job: Job, written: Tensors | None = None) -> Work:
        """One with a result of this rank's own."""
        operation = Operation(name, outputs, job, kept=False)
        return self.ask(operation, outputs, outputs if written is None else written)

    # --- reductions -------------------------------------------------------------------------------

    def allreduce(self, tensors: Tensors, opts: Any) -> Work:
        """Reduce in place."""
        (tensor,) = tensors
        if tensor.is_sparse:
            return self._sparse_allreduce(tensors, opts)
        return self.allreduce_coalesced(tensors, opts)

    def _sparse_allreduce(self, tensors: Tensors, opts: Any) -> Work:
        def job(gloo: Gloo, into: Tensors) -> list[Any]:
            del into
            inner = gloo.allreduce(tensors, opts)
            ended(inner)
            results: list[Any] = inner.get_future().value()
            return results

        return self._own("sparse all-reduce", tensors, job, [])

    def allreduce_coalesced(self, tensors: Tensors, opts: Any) -> Work:
        """Reduce each in place."""
        op = opts.reduceOp

        def job(gloo: Gloo, into: Tensors) -> None:
            for each, result in zip(tensors, into, strict=True):
                ordered.allreduce(gloo, each, result, op, self.scratch)

        return self.ask(Operation(f"all-reduce {_name(op)}", tensors, job), tensors, tensors)

    def reduce(self, tensors: Tensors, opts: Any) -> Work:
        """Reduce to one rank."""
        (tensor,), op, root = tensors, opts.reduceOp, opts.rootRank

        def job(gloo: Gloo, into: Tensors) -> None:
            del into
            if ordered.applies(tensor, op):
                ordered.reduce(gloo, tensor, op, root)
            else:
                ended(gloo.reduce(tensors, opts))

        return self._own("reduce", tensors, job, tensors if root == self.member else [])

    def reduce_scatter(self, outputs: Tensors, inputs: list[Tensors], opts: Any) -> Work:
        """Reduce a list of tensors, each for the rank of its place."""
        (output,), (parts,), op = outputs, inputs, opts.reduceOp

        def job(gloo: Gloo, into: Tensors) -> None:
            del into
            if ordered.applies(output, op):
                whole = torch.cat([each.reshape(-1) for each in parts])
                ordered.reduce_scatter(gloo, output, whole, op, self.scratch)
            else:
                ended(gloo.reduce_scatter(outputs, inputs, opts))

        return self._own("reduce-scatter", outputs, job)

    def reduce_scatter_single(self, output: torch.Tensor, whole: torch.Tensor, opts: Any) -> Work:
        """Reduce one tensor, part by part, each for the rank of its place."""
        return self.reduce_scatter_single_coalesced([output], [whole], opts)

    def reduce_scatter_single_coalesced(self, outputs: Tensors, inputs: Tensors, opts: Any) -> Work:
        """Do so with each."""
        op = opts.reduceOp

        def job(gloo: Gloo, into: Tensors) -> None:
            del into
            for output, whole in zip(outputs, inputs, strict=True):
                if ordered.applies(output, op):
                    ordered.reduce_scatter(gloo, output, whole.contiguous(), op, self.scratch)
                else:
                    ended(gloo._reduce_scatter_base(output, whole, opts))

        return self._own("reduce-scatter", outputs, job)

    # --- copies -----------------------------------------------------------------------------------

    def broadcast(self, tensors: Tensors, opts: Any) -> Work:
        """From one rank to all."""
        here = opts.rootRank == self.member

        def job(gloo: Gloo, into: Tensors) -> None:
            if here and into is not tensors:
                _copy(tensors, into)
            ended(gloo.broadcast(into, opts))

        operation = Operation(f"broadcast from {opts.rootRank}", tensors, job, proves=False)
        return self.ask(operation, tensors, [] if here else tensors)

    def allgather(self, outputs: list[Tensors], inputs: Tensors, opts: Any) -> Work:
        """From all to all, into lists."""

        def job(gloo: Gloo, into: Tensors) -> None:
            ended(gloo.allgather(_rows(into, outputs), inputs, opts))

        return self._to_all(outputs, inputs, job)

    def allgather_coalesced(self, outputs: list[Tensors], inputs: Tensors, opts: Any) -> Work:
        """From all to all, several at once."""

        def job(gloo: Gloo, into: Tensors) -> None:
            ended(gloo.allgather_coalesced(_rows(into, outputs), inputs, opts))

        # One list for each rank, where `allgather` has one for each input.
        return self._to_all(outputs, inputs, job, of_ranks=True)

    def _to_all(
        self, outputs: list[Tensors], inputs: Tensors, job: Job, *, of_ranks: bool = False
    ) -> Work:
        everything = [each for row in outputs for each in row]

        def alone() -> None:
            for place, row in enumerate(outputs):
                _copy(inputs if of_ranks else [inputs[place]] * len(row), row)

        operation = Operation("all-gather", everything, job, alone=alone)
        return self.ask(operation, outputs, everything)

    def all_gather_single(self, output: torch.Tensor, mine: torch.Tensor, opts: Any = None) -> Work:
        """From all to all, into one tensor."""
        return self.all_gather_single_coalesced([output], [mine], opts)

    def all_gather_single_coalesced(
        self, outputs: Tensors, inputs: Tensors, opts: Any = None
    ) -> Work:
        """Do so with each."""
        opts = opts or AllgatherOptions()

        def job(gloo: Gloo, into: Tensors) -> None:
            for output, mine in zip(into, inputs, strict=True):
                ended(gloo._allgather_base(output, mine, opts))

        def alone() -> None:
            for output, mine in zip(outputs, inputs, strict=True):
                output.view(-1, *mine.shape).copy_(mine)

        return self.ask(Operation("all-gather", outputs, job, alone=alone), outputs, outputs)

    def gather(self, outputs: list[Tensors], inputs: Tensors, opts: Any) -> Work:
        """From all to one."""
        everything = [each for row in outputs for each in row]

        def job(gloo: Gloo, into: Tensors) -> None:
            del into
            ended(gloo.gather(outputs, inputs, opts))

        return self.ask(Operation("gather", everything, job, kept=False), outputs, everything)

    def scatter(self, outputs: Tensors, inputs: list[Tensors], opts: Any) -> Work:
        """From one to all, each its own."""

        def job(gloo: Gloo, into: Tensors) -> None:
            del into
            ended(gloo.scatter(outputs, inputs, opts))

        return self._own("scatter", outputs, job)

    def all_to_all_single(
        self,
        output: torch.Tensor,
        whole: torch.Tensor,
        output_sizes: list[int],
        input_sizes: list[int],
        opts: Any = None,
    ) -> Work:
        """Each to each its own part of a tensor."""
        opts = opts or AllToAllOptions()

        def job(gloo: Gloo, into: Tensors) -> None:
            del into
            ended(gloo.alltoall_base(output, whole, output_sizes, input_sizes, opts))

        return self._own("all-to-all", [output], job)

    def alltoall(self, outputs: Tensors, inputs: Tensors, opts: Any = None) -> Work:
        """Each to each its own tensor; gloo has it only for parts of one."""
        first = inputs[0]

        def job(gloo: Gloo, into: Tensors) -> None:
            del into
            whole = torch.cat([each.reshape(-1) for each in inputs])
            received = first.new_empty(sum(each.numel() for each in outputs))
            sizes = [[each.numel() for each in given] for given in (outputs, inputs)]
            ended(gloo.alltoall_base(received, whole, *sizes, opts or AllToAllOptions()))
            for each, part in zip(outputs, torch.split(received, sizes[0]), strict=True):
                each.copy_(part.view_as(each))

        return self._own("all-to-all", outputs, job)

    def barrier(self, opts: Any = None) -> Work:
        """Until all have come."""

        def job(gloo: Gloo, into: Tensors) -> None:
            del into
            ended(gloo.barrier(opts or BarrierOptions()))

        return self.ask(Operation("barrier", [], job), [], [])

    def monitored_barrier(self, timeout: timedelta, wait_all_ranks: bool = False) -> None:
        """Until all have come; rank 0 names who did not. torch itself asks only gloo.

        Raises:
            GroupBrokenError: Somebody did not come in time.
        """

        def job(gloo: Gloo, into: Tensors) -> None:
            del into
            try:
                gloo.monitored_barrier(timeout, wait_all_ranks)
            except RuntimeError as error:
                raise LinkError(str(error)) from None

        self.ask(Operation("barrier", [], job), [], []).wait()

    # Names of older torch.
    _allgather_base = all_gather_single
    allgather_into_tensor_coalesced = all_gather_single_coalesced
    _reduce_scatter_base = reduce_scatter_single
    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced
    alltoall_base = all_to_all_single


def _name(op: Any) -> str:
    return str(ordered.kind_of(op)).rpartition(".")[2]


def _copy(sources: Iterable[torch.Tensor], into: Iterable[torch.Tensor]) -> None:
    for source, target in zip(sources, into, strict=True):
        target.copy_(source)


def _rows(flat: Tensors, like: list[Tensors]) -> list[Tensors]:
    """The same tensors in rows as long as these."""
    each = iter(flat)
    return [[next(each) for _ in row] for row in like]
