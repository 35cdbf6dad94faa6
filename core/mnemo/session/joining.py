"""A new process in a lost rank's place: finds what that one had, and becomes one of the group."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from torch.nn.parallel import DistributedDataParallel

from mnemo import comm, faults
from mnemo.comm import ddp
from mnemo.errors import GroupBrokenError, IntegrityError
from mnemo.recovery import control
from mnemo.session.finder import Restored
from mnemo.session.meeting import Bid, Meeting, Phases, wanting
from mnemo.session.place import Place
from mnemo.session.sources import MemorySource
from mnemo.smp import ledger
from mnemo.smp import messages as m
from mnemo.smp.link import Link
from mnemo.snapshot import portion
from mnemo.transport.local import close_all


def is_joining() -> bool:
    """Whether this process takes a lost rank's place, and has not joined the others yet."""
    return control.joins() is not None and comm.mode.alone


class Joining:
    """`find`, then `join`, by the training thread."""

    def __init__(self, meeting: Meeting, place: Place, link: Link, fit: int) -> None:
        """Nothing is known yet.

        Args:
            meeting: With the others.
            place: Where this process stands.
            link: To the SMP.
            fit: Which training of the process it is.
        """
        self._meeting = meeting
        self._place = place
        self._link = link
        self._fit = fit
        self._page: portion.Page | None = None
        self.tick = -1
        """Of the boundary at which it begins."""
        self.whole = False
        """All of that boundary's state is from a snapshot."""
        self.given_by: int | None = None
        """The rank that parameters are from, if they are from any."""
        self.inexact = ""
        """What it cannot have as the lost rank had it."""
        self.phases = Phases()

    def find(self, memory: MemorySource) -> Restored:
        """What the lost rank had at its last boundary.

        All of it from the snapshot that was taken there, if one was, which holds it also when the
        others have updated their parameters since; else the replicas' part from one of them.

        Args:
            memory: Where snapshots are looked for.

        Raises:
            MnemoError: Neither is to be had.
        """
        entry = self._read_ledger()
        page = self._page = portion.open_page(entry.content)
        self.tick = entry.tick
        held = memory.newest(entry.tick + 1, entry.tick - 1)
        if held is not None and held.identity == page.form.identity:
            self.whole = True
            self.phases.end("read")
            self._bid(self._meeting.next(), wants=False)
            return Restored.of(held)
        tensors = portion.room_for(page.form)
        while True:
            lost = self._meeting.next()
            with contextlib.suppress(GroupBrokenError):
                self.given_by = self._receive(lost, tensors)
                break
        state = portion.join(page, tensors)
        self.phases.end("receive")
        return Restored(
            state["state"],
            state["rng"],
            entry.tick,
            page.step,
            f"replica of rank {self.given_by}",
            page.form.tensors,
            page.form.identity,
            state["base"],
        )

    def join(self, model: DistributedDataParallel, go_on: Callable[[control.Lost], None]) -> None:
        """All is restored: become one of the group again.

        Args:
            model: As it is wrapped.
            go_on: Has all new processes take their places, with the others.

        Raises:
            MnemoError: It cannot be.
        """
        lost, page = self._meeting.lost, self._page
        assert lost is not None
        assert page is not None
        faults.reach("joining", step=page.step)
        self.phases.end("restore")
        ddp.adopt(model, page.layout)
        self.phases.end("buckets")
        while True:
            with contextlib.suppress(GroupBrokenError):
                go_on(lost)
                return
            lost = self._meeting.next()
            self._bid(lost, wants=False)

    def _read_ledger(self) -> ledger.Entry:
        _, fds = self._link.ask(m.FetchLedger(self._fit, self._place.rank), m.Ledgers)
        try:
            if not fds:
                raise IntegrityError("the snapshot process holds no ledger of the lost rank")
            return ledger.read(fds[0])
        finally:
            close_all(fds)

    def _bid(self, lost: control.Lost, *, wants: bool) -> None:
        assert self._page is not None
        self._meeting.bid(lost, Bid(self.tick, self._page.form.digest(), wants))

    def _receive(self, lost: control.Lost, tensors: list[Any]) -> int:
        self._bid(lost, wants=True)
        to = wanting(self._meeting.bids(lost))
        source = self._meeting.source(lost)
        comm.handover(lost.epoch, self._meeting.given(lost), tensors, source, to)
        return source
