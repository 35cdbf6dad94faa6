"""The process group that torch, DDP, FSDP and users hold: it stays, what is inside is replaced.

Which of torch's names are called: Python calls the methods by name, C++ (DDP's reducer, functional
collectives) those that torch's trampoline class passes on. Older torch has other names for some.
"""

from __future__ import annotations

import threading
from collections import Counter
from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import torch

from mnemo.comm import ordered
from mnemo.comm.c10d import (
    AllgatherOptions,
    AllToAllOptions,
    BarrierOptions,
    PrefixStore,
    ProcessGroup,
)
from mnemo.comm.gloo import GlooLinks, LinkError, ended
from mnemo.comm.work import Collective, Delegated, Given, in_backward, poison
from mnemo.errors import GroupBrokenError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from datetime import timedelta

    from mnemo.comm.c10d import Gloo, Store, Work
    from mnemo.comm.gloo import Job

Tensors = list[torch.Tensor]
groups: WeakValueDictionary[str, Group] = WeakValueDictionary()
"""Those of this process, by name."""


class Group(ProcessGroup):
    """A process group over gloo whose communicator can be replaced.

    Args:
        name: As torch names it; the same on all members.
        ranks: Global ranks of the members, in the order of group ranks.
        rank: This process's, within the group.
        store: For the first communicator.
        timeout: Of each operation.
    """

    def __init__(
        self, name: str, ranks: Sequence[int], rank: int, store: Store, timeout: timedelta
    ) -> None:
        super().__init__(rank, len(ranks))
        self.label = f"{name!r} (ranks {', '.join(map(str, ranks))})"
        self.ranks = tuple(ranks)
        self.built = 0
        """Membership epoch of the communicator."""
        self.asked = 0
        """Collectives since then."""
        self.sent: Counter[int] = Counter()
        self.received: Counter[int] = Counter()
        self.key = self._called = name
        self._meant_for = ""
        self._rank, self._timeout, self._store = rank, timeout, store
        self._lock = threading.Lock()
        self._broken: GroupBrokenError | None = None
        self._scratch = ordered.Scratch()
        self._links = self._make(store)
        groups[name] = self

    def _make(self, store: Store) -> GlooLinks:
        return GlooLinks(store, self._rank, len(self.ranks), self._timeout, self._on_break)

    # --- its life ---------------------------------------------------------------------------------

    @property
    def broken(self) -> GroupBrokenError | None:
        """Why nothing of it ends any more."""
        return self._broken

    def mark_broken(self, why: str) -> None:
        """End all that is under way. From any thread, any number of times."""
        self._on_break(why, self._links)

    def _on_break(self, why: str, links: GlooLinks) -> GroupBrokenError:
        """A communicator broke; the group has, unless that one was replaced already."""
        with self._lock:
            broken = self._broken or GroupBrokenError(self.label, why)
            if links is self._links:
                self._broken = broken
        links.cut(broken)
        return broken

    def rebuild(self, store: Store, membership_epoch: int) -> None:
        """Replace the communicator. Nothing is connected before it is used."""
        self.mark_broken(f"its communicator is replaced for membership epoch {membership_epoch}")
        links = self._make(store)
        with self._lock:
            self._links, self._broken = links, None
        self.built, self.asked = membership_epoch, 0
        self.sent.clear()
        self.received.clear()

    def sockets(self) -> frozenset[int]:
        """Inode numbers of its connections."""
        return self._links.sockets()

    def shutdown(self) -> None:
        """Close it for good."""
        self.mark_broken("it was shut down")
        self._links.close()

    abort = shutdown

    # --- what torch asks --------------------------------------------------------------------------

    def getBackendName(self) -> str:  # noqa: N802 - torch's name
        """As registered."""
        return "mnemo"

    def getGroupName(self) -> str:  # noqa: N802
        """As functional collectives find it."""
        return self._called

    def setGroupName(self, name: str) -> None:  # noqa: N802
        """Called by torch once it is made."""
        self._called = name

    def getGroupDesc(self) -> str:  # noqa: N802
        """What it is for."""
        return self._meant_for

    def setGroupDesc(self, text: str) -> None:  # noqa: N802
        """Called by torch once it is made."""
        self._meant_for = text

    def _get_backend(self, device: torch.device) -> Gloo:
        """What FSDP asks for how to allocate."""
        del device
        return self._links.backend

    @property
    def _device_types(self) -> list[torch.device]:
        return [torch.device("cpu")]

    def set_timeout(self, timeout: timedelta) -> None:
        """Of the operations from here on."""
        self._timeout = timeout
        self._links.backend.set_timeout(timeout)

    # --- how anything is run ----------------------------------------------------------------------

    def _collective(self, job: Job, results: list[Any], written: Tensors) -> Work:
        self.asked += 1
        if self._broken is not None:
            return self._given(results, written)
        work = Collective(results, written)
        self._links.run(work, job)
        return work

    def _given(self, results: list[Any], written: Tensors) -> Work:
        assert self._broken is not None
        if not in_backward():
            raise self._broken.again()
        poison(written)
        return Given(results)

    def _plain(self, name: str, *args: Any, results: list[Any], written: Tensors) -> Work:
        """One operation of gloo's."""

        def job(gloo: Gloo) -> None:
            ended(getattr(gloo, name)(*args))

        return self._collective(job, results, written)

    # --- reductions -------------------------------------------------------------------------------

    def allreduce(self, tensors: Tensors, opts: Any) -> Work:
        """Reduce in place."""
        (tensor,) = tensors
        if not ordered.applies(tensor, opts.reduceOp):
            return self._gloos_allreduce(tensors, opts)
        op = opts.reduceOp

        def job(gloo: Gloo) -> None:
            ordered.allreduce(gloo, tensor, op, self._scratch)

        return self._collective(job, tensors, tensors)

    def _gloos_allreduce(self, tensors: Tensors, opts: Any) -> Work:
        def job(gloo: Gloo) -> list[Any] | None:
            inner = gloo.allreduce(tensors, opts)
            ended(inner)
            return inner.get_future().value() if tensors[0].is_sparse else None

        return self._collective(job, tensors, [] if tensors[0].is_sparse else tensors)

    def allreduce_coalesced(self, tensors: Tensors, opts: Any) -> Work:
        """Reduce each in place."""
        if not all(ordered.applies(each, opts.reduceOp) for each in tensors):
            return self._plain(
                "allreduce_coalesced", tensors, opts, results=tensors, written=tensors
            )
        op = opts.reduceOp

        def job(gloo: Gloo) -> None:
            for each in tensors:
                ordered.allreduce(gloo, each, op, self._scratch)

        return self._collective(job, tensors, tensors)

    def reduce(self, tensors: Tensors, opts: Any) -> Work:
        """Reduce to one rank."""
        (tensor,), op, root = tensors, opts.reduceOp, opts.rootRank
        written = tensors if root == self._rank else []
        if not ordered.applies(tensor, op):
            return self._plain("reduce", tensors, opts, results=tensors, written=written)

        def job(gloo: Gloo) -> None:
            ordered.reduce(gloo, tensor, op, root)

        return self._collective(job, tensors, written)

    def reduce_scatter(self, outputs: Tensors, inputs: list[Tensors], opts: Any) -> Work:
        """Reduce a list of tensors, each for the rank of its place."""
        (output,), (parts,) = outputs, inputs
        if not ordered.applies(output, opts.reduceOp):
            return self._plain(
                "reduce_scatter", outputs, inputs, opts, results=outputs, written=outputs
            )
        op = opts.reduceOp

        def job(gloo: Gloo) -> None:
            whole = torch.cat([each.reshape(-1) for each in parts])
            ordered.reduce_scatter(gloo, output, whole, op, self._scratch)

        return self._collective(job, outputs, outputs)

    def reduce_scatter_single(self, output: torch.Tensor, whole: torch.Tensor, opts: Any) -> Work:
        """Reduce one tensor, part by part, each for the rank of its place."""
        return self.reduce_scatter_single_coalesced([output], [whole], opts)

    def reduce_scatter_single_coalesced(self, outputs: Tensors, inputs: Tensors, opts: Any) -> Work:
        """Do so with each."""
        op = opts.reduceOp

        def job(gloo: Gloo) -> None:
            for output, whole in zip(outputs, inputs, strict=True):
                if ordered.applies(output, op):
                    ordered.reduce_scatter(gloo, output, whole.contiguous(), op, self._scratch)
                else:
                    ended(gloo._reduce_scatter_base(output, whole, opts))

        return self._collective(job, outputs, outputs)

    # --- copies -----------------------------------------------------------------------------------

    def broadcast(self, tensors: Tensors, opts: Any) -> Work:
        """From one rank to all."""
        written = [] if opts.rootRank == self._rank else tensors
        return self._plain("broadcast", tensors, opts, results=tensors, written=written)

    def allgather(self, outputs: list[Tensors], inputs: Tensors, opts: Any) -> Work:
        """From all to all, into lists."""
        written = [each for row in outputs for each in row]
        return self._plain("allgather", outputs, inputs, opts, results=outputs, written=written)

    def allgather_coalesced(self, outputs: list[Tensors], inputs: Tensors, opts: Any) -> Work:
        """From all to all, several at once."""
        written = [each for row in outputs for each in row]
        return self._plain(
            "allgather_coalesced", outputs, inputs, opts, results=outputs, written=written
        )

    def all_gather_single(self, output: torch.Tensor, mine: torch.Tensor, opts: Any = None) -> Work:
        """From all to all, into one tensor."""
        return self.all_gather_single_coalesced([output], [mine], opts)

    def all_gather_single_coalesced(
        self, outputs: Tensors, inputs: Tensors, opts: Any = None
    ) -> Work:
        """Do so with each."""
        opts = opts or AllgatherOptions()

        def job(gloo: Gloo) -> None:
            for output, mine in zip(outputs, inputs, strict=True):
                ended(gloo._allgather_base(output, mine, opts))

        return self._collective(job, outputs, outputs)

    def gather(self, outputs: list[Tensors], inputs: Tensors, opts: Any) -> Work:
        """From all to one."""
        written = [each for row in outputs for each in row]
        return self._plain("gather", outputs, inputs, opts, results=outputs, written=written)

    def scatter(self, outputs: Tensors, inputs: list[Tensors], opts: Any) -> Work:
        """From one to all, each its own."""
        return self._plain("scatter", outputs, inputs, opts, results=outputs, written=outputs)

    def all_to_all_single(
        self,
        output: torch.Tensor,
        whole: torch.Tensor,
        output_sizes: list[int],
        input_sizes: list[int],
        opts: Any = None,
    ) -> Work:
        """Each to each its own part of a tensor."""
        return self._plain(
            "alltoall_base",
            *(output, whole, output_sizes, input_sizes, opts or AllToAllOptions()),
            results=[output],
            written=[output],
        )

    def alltoall(self, outputs: Tensors, inputs: Tensors, opts: Any = None) -> Work:
        """Each to each its own tensor; gloo has it only for parts of one."""
        first = inputs[0]

        def job(gloo: Gloo) -> None:
            whole = torch.cat([each.reshape(-1) for each in inputs])
            received = first.new_empty(sum(each.numel() for each in outputs))
            sizes = [[each.numel() for each in given] for given in (outputs, inputs)]
            ended(gloo.alltoall_base(received, whole, *sizes, opts or AllToAllOptions()))
            for each, part in zip(outputs, torch.split(received, sizes[0]), strict=True):
                each.copy_(part.view_as(each))

        return self._collective(job, outputs, outputs)

    def barrier(self, opts: Any = None) -> Work:
        """Until all have come."""
        return self._plain("barrier", opts or BarrierOptions(), results=[], written=[])

    def monitored_barrier(self, timeout: timedelta, wait_all_ranks: bool = False) -> None:
        """Until all have come; rank 0 names who did not. torch itself asks only gloo.

        Raises:
            GroupBrokenError: Somebody did not come in time.
        """

        def job(gloo: Gloo) -> None:
            try:
                gloo.monitored_barrier(timeout, wait_all_ranks)
            except RuntimeError as error:
                raise LinkError(str(error)) from None

        self._collective(job, [], []).wait()

    # Names of older torch.
    _allgather_base = all_gather_single
    allgather_into_tensor_coalesced = all_gather_single_coalesced
    _reduce_scatter_base = reduce_scatter_single
    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced
    alltoall_base = all_to_all_single

    # --- messages ---------------------------------------------------------------------------------

    def send(self, tensors: Tensors, to: int, tag: int) -> Work:
        """To one rank."""
        self.sent[to] += 1
        return self._message([to], lambda gloo: gloo.send(tensors, to, tag), tensors, [])

    def recv(self, tensors: Tensors, source: int, tag: int) -> Work:
        """From one rank."""
        self.received[source] += 1
        return self._message(
            [source], lambda gloo: gloo.recv(tensors, source, tag), tensors, tensors
        )

    def recv_anysource(self, tensors: Tensors, tag: int) -> Work:
        """From whichever rank is first."""
        everybody = range(len(self.ranks))
        self.received[-1] += 1
        return self._message(
            everybody, lambda gloo: gloo.recv_anysource(tensors, tag), tensors, tensors
        )

    def _message(
        self,
        peers: Sequence[int],
        issue: Callable[[Gloo], Work],
        tensors: Tensors,
        written: Tensors,
    ) -> Work:
        links = self._links
        if self._broken is None:
            try:
                inner = issue(links.peer(peers))
            except LinkError as error:
                self._on_break(str(error), links)
            else:
                return Delegated(inner, tensors, written, partial(self._message_failed, links))
        return self._given(tensors, written)

    def _message_failed(self, links: GlooLinks, error: Exception | None) -> GroupBrokenError:
        return self._on_break(str(error or "a message was given up"), links)

    # --- groups of its members --------------------------------------------------------------------

    def split_group(
        self,
        new_ranks: Sequence[int],
        timeout: timedelta | None = None,
        opts: Any = None,
        group_name: str | None = None,
        group_desc: str | None = None,
        device_types: Any = None,
    ) -> Group | None:
        """A group of some of the members, by their ranks in this one; None for the others."""
        del opts, device_types
        if self._rank not in new_ranks:
            return None
        name = group_name or f"{self.group_name}:{','.join(map(str, new_ranks))}"
        made = Group(
            name,
            [self.ranks[each] for each in new_ranks],
            new_ranks.index(self._rank),
            PrefixStore(f"split/{name}", self._store),
            timeout or self._timeout,
        )
        made._set_group_name(name)
        made._set_group_desc(group_desc or "")
        return made

    def get_group_store(self) -> Store:
        """That of the first communicator."""
        return self._store
