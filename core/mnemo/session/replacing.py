"""One rank's part in replacing another one that was lost, while the training goes on.

`mnemo run` says who is lost. What the others are in the middle of waits from then on
(`mnemo.comm.hold`), and goes on when a new process has taken the lost one's place: it has begun
again at the boundary that the lost rank's ledger speaks of, with the parameters of one that is
left, and is given the results of all that was done since. None of this is the training thread's
matter. Whatever does not fit is said (`Cannot`), and all ranks start again from memory.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Final

import msgspec
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from mnemo import comm, faults
from mnemo.comm import ddp
from mnemo.errors import GroupBrokenError, MnemoError, ReplayError
from mnemo.recovery import control
from mnemo.session import answering
from mnemo.session.agreement import of_all_ranks
from mnemo.session.finder import Restored
from mnemo.session.joining import Joining, is_joining
from mnemo.session.meeting import Bid, Meeting, Phases, wanting
from mnemo.session.place import Place
from mnemo.session.ready import Ready
from mnemo.session.sources import MemorySource
from mnemo.smp.link import Link
from mnemo.snapshot import portion
from mnemo.snapshot.tree import TakenApart

log = logging.getLogger("mnemo")

_MOST_OWN: Final = 32 << 20
"""Bytes of tensors that a rank has alone, which are copied at each step."""
_PATIENCE_S: Final = 30.0
"""How long a rank may take to get to the boundary at which another one was lost."""
_NEEDS_AGENT: Final = "needs mnemo run, and recover.in_process"
_END_S: Final = 60.0
"""How long a process that cannot join waits to be ended."""


@dataclass(frozen=True)
class Replicas:
    """What all ranks hold alike, in data-parallel training."""

    tensors: Callable[[], Iterable[torch.Tensor]]
    """Gives those that are the same between two updates."""
    model: torch.nn.Module | None
    """As it is wrapped."""
    why_not: str = ""
    """Why no rank can be replaced; empty if one can."""


class Replacing:
    """Of one training, on every rank.

    The training thread calls `boundary` and `pass_update` from the first boundary on, on all ranks
    alike; in a process that takes a lost rank's place, `find` and `join` before that.
    """

    def __init__(self, channel: control.Channel, place: Place, link: Link, fit: int) -> None:
        """Begin to listen.

        Args:
            channel: To the agent; owned from here on.
            place: Where this process stands.
            link: To the SMP.
            fit: Which training of the process it is.
        """
        self._channel = channel
        self._place = place
        self._link = link
        self._fit = fit
        self._meeting = Meeting(place, dist.distributed_c10d._get_default_store())
        self._ready: Ready | None = None
        self._offered = False
        self._why_not = ""
        self._tick = -1
        self._joining = Joining(self._meeting, place, link, fit) if is_joining() else None
        self._listener = threading.Thread(target=self._listen, name="mnemo-control", daemon=True)
        self._listener.start()
        self._worker: threading.Thread | None = None
        if self._joining is None:
            self._start_work()

    # --- the training thread ------------------------------------------------------------------

    def prepare(self, identity: dict[str, str], replicas: Replicas) -> str:
        """Training begins. On all ranks alike.

        Args:
            identity: Fingerprints, as a snapshot has them.
            replicas: What all ranks hold alike.

        Returns:
            Why no rank can be replaced in this training, after which this is over; empty if one
            can.
        """
        model, why_not = replicas.model, replicas.why_not
        if isinstance(model, DistributedDataParallel):
            why_not = why_not or _obstacle(model) or self._group_of_any_rank()
            portions = self._portions = portion.Portions(identity, replicas.tensors)
            name = f"mnemo:ledger:{self._fit}:{self._place.rank}"
            self._model, self._ready = model, Ready(self._link, name, portions, model)
        else:
            why_not = why_not or "the model is not wrapped in DistributedDataParallel"
        if why_not:
            self.withdraw(why_not)
            self.close()
        return why_not

    def boundary(self, tick: int, step: int, taken: TakenApart) -> None:
        """A boundary is reached, with this state.

        Raises:
            Exception: The state cannot be written down.
        """
        assert self._ready is not None
        self._ready.write(tick, step, taken)
        if self._portions.own_size > _MOST_OWN:
            self.withdraw(f"a state of its own of {self._portions.own_size >> 20} MiB")

    def mark(self, tick: int) -> None:
        """All that was asked for until now was before this boundary. On all ranks alike."""
        self._tick = tick
        comm.mark(tick)
        if other := _group_of_others():
            self.withdraw(other)
        if not self._offered and not self._why_not:
            self._offered = True
            self._channel.tell(control.Replaceable(True))

    def pass_update(self) -> None:
        """Parameters are about to be updated: wait until all ranks have come here. Collective."""
        if self._tick < 0:
            return
        comm.pass_update(self._tick)
        if self._ready is not None:
            self._ready.pass_update()

    def withdraw(self, why: str, *, left: bool = False) -> None:
        """From here on this rank is not replaced any more; harmless a second time."""
        if not self._why_not:
            self._why_not = why
            self._channel.tell(control.Replaceable(False, why, left))

    def close(self, *, left: bool = False) -> None:
        """The training is over.

        Args:
            left: In the middle of it, perhaps by an exception that will end this process.
        """
        comm.keep_nothing()
        self.withdraw("its training is over", left=left)
        self._channel.close()
        self._listener.join()
        if self._worker is not None:
            self._worker.join()
        if self._ready is not None:
            self._ready.close()

    def _group_of_any_rank(self) -> str:
        """Of a group that cannot go on with another member, and that not all ranks know of."""
        return ", ".join(
            of_all_ranks(self._place, [other] if (other := _group_of_others()) else [])
        )

    # --- in a process that takes a lost rank's place ------------------------------------------

    def find(self, memory: MemorySource) -> Restored:
        """See `Joining.find`; waits to be ended where that fails."""
        assert self._joining is not None
        with self._or_cannot():
            return self._joining.find(memory)

    def join(self, inexact: str) -> None:
        """All is restored: become one of the group again. Waits to be ended where that fails.

        Args:
            inexact: What is not as the lost rank had it; empty if all is.
        """
        assert self._joining is not None
        self._joining.inexact = inexact
        with self._or_cannot():
            self._joining.join(self._model, self._go_on)
        self._tick, self._joining = self._joining.tick, None
        self._start_work()

    def refuse(self, why: str) -> None:
        """This process cannot take the lost rank's place: wait to be ended."""
        with self._or_cannot():
            raise ReplayError(why)

    @contextlib.contextmanager
    def _or_cannot(self) -> Iterator[None]:
        """Whatever goes wrong in the block is said to the agent, which ends this process then."""
        try:
            yield
        except Exception as error:
            log.debug("this process cannot take the lost rank's place", exc_info=True)
            lost = self._meeting.lost
            self._cannot((control.joins() or 0) if lost is None else lost.epoch, error)
            threading.Event().wait(_END_S)
            raise

    # --- what the agent says ------------------------------------------------------------------

    def _listen(self) -> None:
        while True:
            try:
                message = self._channel.receive()
            except MnemoError as error:
                log.warning("the agent is not understood: %s", error)
                continue
            if message is None:
                self._meeting.tell(None)
                return
            if isinstance(message, control.Ask):
                self._channel.tell(answering.answer(message))
            if isinstance(message, control.Lost):
                others = set(message.ranks) - {self._place.rank}
                comm.hold(message.epoch, others, message.why)
                self._meeting.tell(message)

    def _start_work(self) -> None:
        self._worker = threading.Thread(target=self._work, name="mnemo-replace", daemon=True)
        self._worker.start()

    def _work(self) -> None:
        while True:
            try:
                lost = self._meeting.next()
            except ReplayError:
                return
            faults.reach("replacing")
            try:
                self._go_on(lost)
            except GroupBrokenError as error:
                log.debug("another rank was lost meanwhile: %s", error)
            except Exception as error:  # all ranks start again then
                log.debug("no rank is replaced", exc_info=True)
                self._cannot(lost.epoch, error)

    def _cannot(self, epoch: int, error: Exception) -> None:
        words = str(error) if isinstance(error, MnemoError) else f"{type(error).__name__}: {error}"
        self._channel.tell(control.Cannot(epoch, words))

    # --- replacing ----------------------------------------------------------------------------

    def _go_on(self, lost: control.Lost) -> None:
        """Have the new processes take their places.

        Raises:
            GroupBrokenError: Another rank was lost meanwhile.
            ReplayError: They cannot.
        """
        if other := _group_of_others():
            raise ReplayError(other)
        meeting, joining = self._meeting, self._joining
        phases = Phases() if joining is None else joining.phases
        bids = meeting.bids(lost)
        phases.end("wait_for_process")
        if self._place.rank == meeting.source(lost) and wanting(bids):
            self._give(lost, bids)
            phases.end("hand_over")
        ticks = {rank: bid.tick for rank, bid in bids.items()}
        whole = joining is not None and joining.whole
        store, members = meeting.groups(lost), list(lost.members)
        comm.reconfigure(lost.epoch, members, store, joining=ticks, whole=whole)
        phases.end("groups")
        back = control.Back(lost.epoch, min(ticks.values()), phases.ms)
        if joining is not None:
            self._offered = True
            self._channel.tell(control.Replaceable(True))
            back = msgspec.structs.replace(back, source=joining.given_by, inexact=joining.inexact)
        self._channel.tell(back)

    def _give(self, lost: control.Lost, bids: dict[int, Bid]) -> None:
        """Hand the parameters over, which must not change meanwhile.

        Raises:
            ReplayError: They are not those of that boundary, or of another model.
        """
        assert self._ready is not None
        to = wanting(bids)
        offers = [self._ready.offer(bids[rank].tick, _PATIENCE_S) for rank in to]
        if any(o.digest != bids[r].digest for o, r in zip(offers, to, strict=True)):
            raise ReplayError("the lost rank held other tensors than the others do")
        tensors, store = list(offers[0].tensors), self._meeting.given(lost)
        comm.handover(lost.epoch, store, tensors, self._place.rank, to)
        for rank, offer in zip(to, offers, strict=True):
            self._ready.offer(bids[rank].tick, 0.0)
            if not offer.is_untouched:
                raise ReplayError("parameters were written between two updates")


def begin(place: Place, link: Link, fit: int) -> tuple[Replacing | None, str]:
    """Take part, if all ranks can; else None, and why not. Collective.

    Args:
        place: Where this process stands.
        link: To the SMP.
        fit: Which training of the process it is: later ones begin where a new process is not.
    """
    why_not = ""
    if control.CONTROL_VARIABLE not in os.environ:
        why_not = _NEEDS_AGENT
    elif fit:
        why_not = "this is not the program's first training"
    elif other := _group_of_others():
        why_not = other
    elif not place.replicas:
        why_not = "ranks do not hold the same"
    elif len(place.leaders) > 1:
        why_not = "there are several nodes"
    channel = None if why_not else control.connect()
    if place.agree(int(channel is not None))[0]:
        assert channel is not None
        return Replacing(channel, place, link, fit), ""
    if channel is not None:
        channel.close()
    comm.keep_nothing()
    return None, why_not or _NEEDS_AGENT


not_repeated = comm.unrecorded
"""Around what a process that takes a lost rank's place does alone, and with its own values."""


def _group_of_others() -> str:
    """Of a process group that cannot go on with another member; empty if there is none.

    Such as one of gloo's, which a program makes beside ours to gather objects.
    """
    if not dist.is_available() or not dist.is_initialized():
        return "needs process groups of backend mnemo"
    for group, (backend, _) in dist.distributed_c10d._world.pg_map.copy().items():
        if not isinstance(group, comm.Group):
            return f"needs process groups of backend mnemo, and one has backend {backend}"
    return ""


def _obstacle(model: DistributedDataParallel) -> str:
    if model.parameters_to_ignore:
        return "DDP is told to ignore parameters, which each rank may have others of"
    return ddp.obstacle(model) or ""
