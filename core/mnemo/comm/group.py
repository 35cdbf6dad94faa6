"""The process group that torch, DDP, FSDP and users hold: it stays, what is inside is replaced.

Where lost ranks can be replaced, an operation that meets a break *waits*: nothing of it is in the
caller's tensors yet, so it is run again over new links, or is given the result that another member
has. Else it ends as broken.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import torch
import torch.distributed as dist

from mnemo.comm import ordered, startup
from mnemo.comm.c10d import HashStore, PrefixStore, ProcessGroup
from mnemo.comm.collectives import Collectives
from mnemo.comm.gloo import GlooLinks, LinkError
from mnemo.comm.kept import Entry, Kept, Mark, boundary
from mnemo.comm.line import Line
from mnemo.comm.messages import Messages
from mnemo.comm.modes import mode
from mnemo.comm.operation import fill, views
from mnemo.comm.work import Collective, Given, in_backward, poison
from mnemo.errors import GroupBrokenError, ReplayError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from datetime import timedelta

    from mnemo.comm.c10d import Gloo, Store, Work
    from mnemo.comm.operation import Operation

Tensors = list[torch.Tensor]
_QUIET_WITHIN_S = 10.0
groups: WeakValueDictionary[str, Group] = WeakValueDictionary()
"""Those of this process, by name."""


class Group(Collectives, Messages, ProcessGroup):
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
        super().__init__(rank, len(ranks))  # pyright: ignore[reportCallIssue] - torch's
        self.label = f"{name!r} (ranks {', '.join(map(str, ranks))})"
        self.ranks = tuple(ranks)
        self.member = rank
        self.built = mode.epoch
        """Membership epoch of the communicator."""
        self.asked = 0
        """Collectives since then; where results are kept, since the start."""
        self.sent: Counter[int] = Counter()
        self.received: Counter[int] = Counter()
        self.scratch = ordered.Scratch()
        self.kept = Kept() if mode.replaceable else None
        self.unkept = -1
        """Place of the last operation whose result is not kept."""
        self.key = self._called = name
        self._meant_for = ""
        self._timeout, self._store = timeout, store
        self._changed = threading.Condition()
        self._broken: GroupBrokenError | None = None
        self._held: str | None = None
        self._patience: float | None = None
        self._startup = startup.Startup(store) if mode.alone else None
        self._links = self.make_links(HashStore() if mode.alone else store)
        self._line = Line(self._run)
        groups[name] = self

    def make_links(self, store: Store) -> GlooLinks:
        """A communicator for it."""
        return GlooLinks(store, self.member, len(self.ranks), self._timeout)

    # --- its life ---------------------------------------------------------------------------------

    @property
    def broken(self) -> GroupBrokenError | None:
        """Why nothing of it ends any more."""
        return self._broken

    @property
    def held(self) -> bool:
        """Whether what is asked of it waits for `resume`."""
        return self._held is not None

    @property
    def torn(self) -> bool:
        """Whether it is held, or will be by whoever uses it next: its links are cut."""
        return self.held or self._links.is_cut is not None

    @property
    def alone(self) -> bool:
        """Whether it has no other members yet."""
        return self._startup is not None

    def mark_broken(self, why: str) -> None:
        """End all that is under way. From any thread, any number of times."""
        with self._changed:
            self._broken = self._broken or GroupBrokenError(self.label, why)
            self._changed.notify_all()
        self._links.cut(why)

    def hold(self, why: str) -> None:
        """Have all that is under way, and all that is asked later, wait. From any thread."""
        with self._changed:
            self._held, self._patience = why, None
            self._changed.notify_all()
        self._links.cut(why)

    def quiet(self) -> bool:
        """Once it is held: whether all that was under way has come to a rest."""
        return self._links.quiet(_QUIET_WITHIN_S)

    def on_break(self, why: str, links: GlooLinks) -> None:
        """A communicator broke; the group has, unless that one was replaced already."""
        with self._changed:
            if links is self._links and self._broken is None:
                if self.kept is None:
                    self._broken = GroupBrokenError(self.label, why)
                elif self._held is None:
                    self._held, self._patience = why, time.monotonic() + mode.patience_s
        links.cut(why)

    def live(self) -> GlooLinks:
        """The communicator; waits while the group is held.

        Raises:
            GroupBrokenError: The group is broken.
        """
        with self._changed:
            while self._held is not None and self._broken is None:
                left = None if self._patience is None else self._patience - time.monotonic()
                if left is not None and left <= 0:
                    why = f"{self._held}; within {mode.patience_s:g} s nobody said what to do"
                    self._broken = GroupBrokenError(self.label, why)
                else:
                    self._changed.wait(left)
            if self._broken is not None:
                raise self._broken.again()
            return self._links

    def outcome(self, why: str, links: GlooLinks) -> GroupBrokenError:
        """What to raise for a message over a communicator that broke, once that is known."""
        self.on_break(why, links)
        try:
            self.live()
        except GroupBrokenError as broken:
            return broken
        return GroupBrokenError(self.label, why)

    def rebuild(self, store: Store, membership_epoch: int) -> None:
        """Replace the communicator. Nothing is connected before it is used."""
        self.mark_broken(f"its communicator is replaced for membership epoch {membership_epoch}")
        self.resume(self.make_links(store), membership_epoch)
        self.asked = 0
        self.sent.clear()
        self.received.clear()

    def resume(self, links: GlooLinks, membership_epoch: int) -> None:
        """Go on over these, with what waits."""
        with self._changed:
            self._links, self._broken, self._held, self._patience = links, None, None, None
            self.built = membership_epoch
            self._changed.notify_all()

    def join(self, tick: int, place: int) -> None:
        """Be no more alone: the next operation is the others' at ``place``; before `resume`."""
        assert self.kept is not None
        self.kept.begin(tick, place)
        self.asked = place
        self._startup = None

    @contextlib.contextmanager
    def told(self, results: Tensors) -> Iterator[None]:
        """While it is alone: what is asked within gets these results, one after the other."""
        assert self._startup is not None
        self._startup.told = list(results)
        try:
            yield
        finally:
            self._startup.told = []

    def sockets(self) -> frozenset[int]:
        """Inode numbers of its connections."""
        return self._links.sockets()

    def shutdown(self) -> None:
        """Close it for good."""
        self.mark_broken("it was shut down")
        self._line.close(_QUIET_WITHIN_S)
        self._links.close()
        if groups.get(self.key) is self:
            del groups[self.key]

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
        if (gloo := self._links.backend) is not None:
            gloo.set_timeout(timeout)

    # --- how anything is run ----------------------------------------------------------------------

    def ask(self, operation: Operation, results: list[Any], written: Tensors) -> Work:
        """Have a collective run after all that were asked for before."""
        if self._broken is not None:
            self.asked += 1
            return self.given(results, written)
        work = Collective(operation, results, written)
        operation.recorded = startup.recorded()
        with self._changed:
            operation.index, self.asked = self.asked, self.asked + 1
            operation.links = self._links
            if not operation.kept:
                self.unkept = operation.index
            self._line.put(work)
        return work

    def given(self, results: list[Any], written: Tensors) -> Work:
        """What was asked of it when it was broken already.

        Raises:
            GroupBrokenError: Unless this is within backward.
        """
        assert self._broken is not None
        if not in_backward():
            raise self._broken.again()
        poison(written)
        return Given(results)

    def _run(self, work: Collective) -> None:
        """Have it end."""
        operation = work.operation
        assert operation is not None
        try:
            with torch.inference_mode():
                while not self._answered(operation):
                    links = self.live()
                    if self.kept is None and links is not operation.links:
                        why = "its communicator was replaced meanwhile"
                        raise GroupBrokenError(self.label, why)
                    if self._answered(operation):
                        break  # results came with these links
                    try:
                        work.whole(links.use(lambda gloo: self._do(operation, gloo)))
                        break
                    except LinkError as error:
                        self.on_break(str(error), links)
        except GroupBrokenError as why:
            work.gave_up(why)
        except ReplayError as error:
            if self.alone:
                work.refused(error)
            else:
                self.mark_broken(str(error))
                work.gave_up(GroupBrokenError(self.label, str(error)))
        except Exception as error:  # noqa: BLE001 - the caller's mistake, said where it waits
            work.refused(error)
            if (kept := self.kept) is not None:
                kept.add(Entry(operation.signature, None))

    def _answered(self, operation: Operation) -> bool:
        """Give it its result, if that is known."""
        if self._startup is not None:
            self._startup.answer(operation)
            return True
        kept = self.kept
        entry = kept.at(operation.index) if kept is not None else None
        if entry is None:
            return False
        if entry.signature != operation.signature:
            msg = (
                f"operation {operation.index} is {operation.signature!r} where the others did "
                f"{entry.signature!r}: a rank that begins again has to do the same"
            )
            raise ReplayError(msg)
        assert entry.data is not None
        fill(operation.outputs, entry.data)
        return True

    def _do(self, operation: Operation, gloo: Gloo) -> list[Any] | None:
        """Run it. What is kept goes to the caller's tensors at the very end."""
        kept = self.kept
        if kept is None:
            return operation.job(gloo, operation.outputs)
        room = kept.room(operation.outputs) if operation.kept else None
        if room is None:
            self.unkept = operation.index  # the caller's tensors change while it runs
        into = operation.outputs if room is None else views(room, operation.outputs)
        results = operation.job(gloo, into)
        kept.add(Entry(operation.signature, room, operation.recorded))
        if room is not None:
            fill(operation.outputs, room)
        if operation.proves and boundary.let_gone < boundary.latest:
            self._let_go(operation.index)
        return results

    # --- boundaries -------------------------------------------------------------------------------

    def mark(self, tick: int) -> None:
        """A boundary is reached."""
        assert self.kept is not None
        with self._changed:
            mark = Mark(self.asked, self.sent.total() + self.received.total())
        begun = self.kept.mark(tick, mark)
        if begun and self.member == 0:
            startup.publish(self._store, begun)

    def _let_go(self, place: int) -> None:
        """All members have asked for what is there: if that is the world, they were at the mark."""
        kept, tick = self.kept, boundary.latest
        mark = None if kept is None else kept.marks.get(tick)
        if mark is None or place < mark.asked or len(self.ranks) < dist.get_world_size():
            return
        boundary.let_gone = tick
        for group in list(groups.values()):
            if (theirs := group.kept) is not None:
                theirs.let_go(tick)

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
        if self.member not in new_ranks:
            return None
        name = group_name or f"{self.group_name}:{','.join(map(str, new_ranks))}"
        made = Group(
            name,
            [self.ranks[each] for each in new_ranks],
            new_ranks.index(self.member),
            PrefixStore(f"split/{name}", self._store),
            timeout or self._timeout,
        )
        made._set_group_name(name)
        made._set_group_desc(group_desc or "")
        return made

    def get_group_store(self) -> Store:
        """That of the first communicator."""
        return self._store
