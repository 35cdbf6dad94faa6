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
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import msgspec
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from mnemo import comm, faults
from mnemo.comm import ddp
from mnemo.comm.c10d import PrefixStore
from mnemo.errors import GroupBrokenError, IntegrityError, MnemoError, ReplayError
from mnemo.recovery import control
from mnemo.session import answering
from mnemo.session.finder import Restored
from mnemo.session.place import Place
from mnemo.session.ready import Ready
from mnemo.session.sources import MemorySource
from mnemo.smp import ledger
from mnemo.smp import messages as m
from mnemo.smp.link import Link
from mnemo.snapshot import portion
from mnemo.snapshot.tree import TakenApart
from mnemo.transport.local import close_all

log = logging.getLogger("mnemo")

_MOST_OWN: Final = 32 << 20
"""Bytes of tensors that a rank has alone, which are copied at each step."""
_PATIENCE_S: Final = 30.0
"""How long a rank may take to get to the boundary at which another one was lost."""
_NEEDS_AGENT: Final = "needs mnemo run, and recover.in_process"
_GLANCE_S: Final = 0.002
_END_S: Final = 60.0
"""How long a process that cannot join waits to be ended."""


class Bid(msgspec.Struct, frozen=True):
    """What a new process says of itself in the Store."""

    tick: int
    """The boundary at which it begins again."""
    digest: int
    """Of what it is to be given."""
    wants: bool
    """It has not been given that yet."""


@dataclass(frozen=True)
class Replicas:
    """What all ranks hold alike, in data-parallel training."""

    tensors: Callable[[], Iterable[torch.Tensor]]
    """Gives those that are the same between two updates."""
    model: torch.nn.Module | None
    """As it is wrapped."""
    why_not: str = ""
    """Why no rank can be replaced; empty if one can."""


def is_joining() -> bool:
    """Whether this process takes a lost rank's place, and has not joined the others yet."""
    return control.joins() is not None and comm.mode.alone


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
        self._store = PrefixStore("mnemo/replacing", _default_store())
        self._ready: Ready | None = None
        self._offered = False
        self._why_not = ""
        self._tick = -1
        self._news: queue.SimpleQueue[control.Lost | None] = queue.SimpleQueue()
        self._lost: control.Lost | None = None
        """The newest that the agent said."""
        self._page: portion.Page | None = None
        self._begun = -1
        """Tick of what the ledger of the lost rank holds."""
        self._phases: _Phases | None = None
        """Of a process that takes a lost rank's place, until it has."""
        self._has_all = False
        """This process has all of its boundary's state from a snapshot, and joins with it."""
        self._given_by: int | None = None
        """The rank that this process has its parameters from, if from any."""
        self._listener = threading.Thread(target=self._listen, name="mnemo-control", daemon=True)
        self._listener.start()
        self._worker: threading.Thread | None = None
        if not is_joining():
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
            why_not = why_not or _obstacle(model)
            portions = self._portions = portion.Portions(identity, replicas.tensors)
            name = f"mnemo:ledger:{self._fit}:{self._place.rank}"
            self._model, self._ready = model, Ready(self._link, name, portions, model)
        else:
            why_not = why_not or "the model is not wrapped in DistributedDataParallel"
        if why_not:
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

    # --- in a process that takes a lost rank's place ------------------------------------------

    def find(self, memory: MemorySource) -> Restored:
        """What the lost rank had at its last boundary.

        All of it from the snapshot that was taken there, if one was, which holds it also when the
        others have updated their parameters since; else the replicas' part from one of them. Waits
        to be ended where neither is to be had.

        Args:
            memory: Where snapshots are looked for.
        """
        self._phases = phases = _Phases()
        with self._or_cannot():
            entry = self._read_ledger()
            page = self._page = portion.open_page(entry.content)
            self._begun = entry.tick
            held = memory.newest(entry.tick + 1, entry.tick - 1)
            if held is not None and held.identity == page.form.identity:
                self._has_all = True
                phases.end("read")
                self._bid(self._next(), wants=False)
                return Restored.of(held)
            tensors = portion.room_for(page.form)
            while True:
                lost = self._next()
                with contextlib.suppress(GroupBrokenError):
                    self._given_by = self._receive(lost, tensors)
                    break
            whole = portion.join(page, tensors)
            phases.end("receive")
        return Restored(
            whole["state"],
            whole["rng"],
            entry.tick,
            page.step,
            f"replica of rank {self._given_by}",
            page.form.tensors,
            page.form.identity,
            whole["base"],
        )

    def join(self) -> None:
        """All is restored: become one of the group again. Waits to be ended where that fails."""
        with self._or_cannot():
            lost = self._lost
            assert self._page is not None
            assert lost is not None
            faults.reach("joining", step=self._page.step)
            phases = self._phases or _Phases()
            phases.end("restore")
            ddp.adopt(self._model, self._page.layout)
            phases.end("buckets")
            while True:
                with contextlib.suppress(GroupBrokenError):
                    self._go_on(lost)
                    break
                lost = self._next()
                self._bid(lost, wants=False)
        self._tick = self._begun
        self._start_work()

    def refuse(self, why: str) -> None:
        """This process cannot take the lost rank's place: wait to be ended."""
        with self._or_cannot():
            raise ReplayError(why)

    def _read_ledger(self) -> ledger.Entry:
        _, fds = self._link.ask(m.FetchLedger(self._fit, self._place.rank), m.Ledgers)
        try:
            if not fds:
                raise IntegrityError("the snapshot process holds no ledger of the lost rank")
            return ledger.read(fds[0])
        finally:
            close_all(fds)

    def _next(self) -> control.Lost:
        """The next word of the agent's.

        Raises:
            ReplayError: There is none to come.
        """
        lost = self._news.get()
        while not self._news.empty():
            lost = self._news.get()
        if lost is None:
            raise ReplayError("the agent has hung up")
        self._lost = lost
        return lost

    def _bid(self, lost: control.Lost, *, wants: bool) -> None:
        assert self._page is not None
        bid = Bid(self._begun, self._page.form.digest(), wants)
        key = f"{lost.epoch}/{self._place.rank}"
        self._store.set(key, msgspec.json.encode(bid).decode())

    def _receive(self, lost: control.Lost, tensors: list[Any]) -> int:
        self._bid(lost, wants=True)
        bids = self._bids(lost)
        source = self._source(lost)
        comm.handover(lost.epoch, self._given(lost), tensors, source, self._wanting(bids))
        return source

    @contextlib.contextmanager
    def _or_cannot(self) -> Iterator[None]:
        """Whatever goes wrong in the block is said to the agent, which ends this process then."""
        try:
            yield
        except Exception as error:
            log.debug("this process cannot take the lost rank's place", exc_info=True)
            epoch = control.joins() if self._lost is None else self._lost.epoch
            self._cannot(epoch or 0, error)
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
                self._news.put(None)
                return
            if isinstance(message, control.Ask):
                self._channel.tell(answering.answer(message))
            if isinstance(message, control.Lost):
                others = set(message.ranks) - {self._place.rank}
                comm.hold(message.epoch, others, message.why)
                self._news.put(message)

    def _start_work(self) -> None:
        self._worker = threading.Thread(target=self._work, name="mnemo-replace", daemon=True)
        self._worker.start()

    def _work(self) -> None:
        while True:
            try:
                lost = self._next()
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
        phases = self._phases or _Phases()
        bids = self._bids(lost)
        phases.end("wait_for_process")
        if self._place.rank == self._source(lost) and self._wanting(bids):
            self._give(lost, bids)
            phases.end("hand_over")
        store = PrefixStore(str(lost.epoch), self._store)
        joining = {rank: bid.tick for rank, bid in bids.items()}
        whole = self._has_all
        comm.reconfigure(lost.epoch, list(lost.members), store, joining=joining, whole=whole)
        phases.end("groups")
        if self._place.rank in lost.ranks:
            self._offered = True
            self._channel.tell(control.Replaceable(True))
        begun = min(joining.values())
        self._channel.tell(control.Back(lost.epoch, begun, phases.ms, self._given_by))
        self._has_all, self._given_by, self._phases = False, None, None

    def _source(self, lost: control.Lost) -> int:
        return min(set(range(self._place.world_size)) - set(lost.ranks))

    def _bids(self, lost: control.Lost) -> dict[int, Bid]:
        """What the new processes say, once all have.

        Raises:
            GroupBrokenError: Another rank was lost meanwhile.
        """
        keys = [f"{lost.epoch}/{rank}" for rank in lost.ranks]
        while not self._store.check(keys):
            if not self._news.empty():
                raise GroupBrokenError("of all ranks", "another rank was lost")
            time.sleep(_GLANCE_S)
        decode = msgspec.json.Decoder(Bid).decode
        return {r: decode(self._store.get(k)) for r, k in zip(lost.ranks, keys, strict=True)}

    def _given(self, lost: control.Lost) -> Any:
        return PrefixStore(f"{lost.epoch}/given", self._store)

    @staticmethod
    def _wanting(bids: dict[int, Bid]) -> list[int]:
        return sorted(rank for rank, bid in bids.items() if bid.wants)

    def _give(self, lost: control.Lost, bids: dict[int, Bid]) -> None:
        """Hand the parameters over, which must not change meanwhile.

        Raises:
            ReplayError: They are not those of that boundary, or of another model.
        """
        assert self._ready is not None
        wanting = self._wanting(bids)
        offers = [self._ready.offer(bids[rank].tick, _PATIENCE_S) for rank in wanting]
        if any(o.digest != bids[r].digest for o, r in zip(offers, wanting, strict=True)):
            raise ReplayError("the lost rank held other tensors than the others do")
        comm.handover(
            lost.epoch, self._given(lost), list(offers[0].tensors), self._place.rank, wanting
        )
        for rank, offer in zip(wanting, offers, strict=True):
            self._ready.offer(bids[rank].tick, 0.0)
            if not offer.is_untouched:
                raise ReplayError("parameters were written between two updates")


class _Phases:
    """Milliseconds of what follows each other."""

    def __init__(self) -> None:
        self.ms: dict[str, float] = {}
        self._since = time.perf_counter()

    def end(self, name: str) -> None:
        now = time.perf_counter()
        self.ms[name] = round(1000 * (now - self._since), 2)
        self._since = now


def begin(place: Place, link: Link, fit: int) -> tuple[Replacing | None, str]:
    """Take part, if all ranks can; else None, and why not. Collective.

    Args:
        place: Where this process stands.
        link: To the SMP.
        fit: Which training of the process it is: later ones begin where a new process is not.
    """
    why_not = ""
    if not comm.mode.replaceable:
        why_not = _NEEDS_AGENT
    elif not _uses_our_groups():
        why_not = "needs process groups of backend mnemo"
    elif not place.replicas:
        why_not = "ranks do not hold the same"
    elif len(place.leaders) > 1:
        why_not = "there are several nodes"
    elif fit:
        why_not = "this is not the program's first training"
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


def _uses_our_groups() -> bool:
    """Whether all process groups of this process can go on with another member."""
    if not dist.is_available() or not dist.is_initialized():
        return False
    groups = dist.distributed_c10d._world.pg_map
    return all(isinstance(group, comm.Group) for group in groups)


def _obstacle(model: DistributedDataParallel) -> str:
    if model.parameters_to_ignore:
        return "DDP is told to ignore parameters, which each rank may have others of"
    return ddp.obstacle(model) or ""


def _default_store() -> Any:
    return dist.distributed_c10d._get_default_store()
