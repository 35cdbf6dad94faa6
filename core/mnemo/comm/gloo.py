"""One gloo communicator of a group, and the thread that runs its collectives one after the other.

A caller never waits in gloo, and gloo never holds a caller's tensor longer than the caller's work:
`cut` shuts the sockets down, upon which the operation that is under way fails within milliseconds,
and only then is its work ended. No copies are needed for that.

The device is a lazy one: nothing is connected before the first collective (all members), or the
first message (two of them), so a group that is not used costs no links. The first collective begins
with an exchange of a few bytes of our own, for as long as members are missing it is that which
waits, and no tensor of a caller.
"""

from __future__ import annotations

import json
import os
import queue
import threading
import time
from typing import TYPE_CHECKING, Any

import torch

from mnemo.comm import sockets
from mnemo.comm.c10d import AllToAllOptions, Gloo, ProcessGroupGloo
from mnemo.comm.waiting import wait_for
from mnemo.comm.work import Collective
from mnemo.errors import CommError, GroupBrokenError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from datetime import timedelta

    from mnemo.comm.c10d import Store, Work

    Job = Callable[[Gloo], list[Any] | None]

_GLANCE_S = 0.002
_CLOSED_WITHIN_S = 5.0
_kept: list[Gloo | None] = []
"""Those that have not closed their sockets: they cannot be destroyed safely."""
_making = threading.Lock()


class LinkError(Exception):
    """An operation of gloo failed while it waited for others."""


def ended(work: Work) -> None:
    """Wait for an operation of gloo.

    Raises:
        LinkError: It failed.
    """
    try:
        work.wait()
    except RuntimeError as error:
        raise LinkError(str(error).partition("\n")[0]) from None


class GlooLinks:
    """A communicator.

    Args:
        store: Of this communicator alone.
        rank: In the group.
        size: Of the group.
        timeout: Of each operation, and for members to come.
        on_break: Called in any thread with what was seen of a peer's end, and this; to `cut` it.
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        size: int,
        timeout: timedelta,
        on_break: Callable[[str, GlooLinks], object],
    ) -> None:
        self._store, self._rank, self._size, self._timeout = store, rank, size, timeout
        self._on_break = on_break
        device, self._mine = _device()
        options = ProcessGroupGloo._Options()
        options._devices = [device]
        options._timeout = timeout
        options._threads = 1
        self._theirs: dict[int, sockets.Address] = {}
        self._gloo: Gloo | None = ProcessGroupGloo(store, rank, size, options)
        store.set(f"listens/{rank}", json.dumps(self._mine))
        self._jobs: queue.SimpleQueue[tuple[Collective, Job] | None] = queue.SimpleQueue()
        self._waiting: set[Collective] = set()
        self._lock = threading.Lock()
        self._broken: GroupBrokenError | None = None
        self._opened: frozenset[int] = frozenset()
        self._turn = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._ready = 0

    def run(self, work: Collective, job: Job) -> None:
        """Have ``job`` run after all that were asked for before."""
        with self._lock:
            broken = self._broken
            if broken is None:
                self._waiting.add(work)
                self._jobs.put((work, job))
        self._start()
        if broken is not None:
            self._give_up([work], broken)

    def peer(self, ranks: Sequence[int]) -> Gloo:
        """The communicator, for messages with ``ranks``, which have all come.

        Raises:
            LinkError: It was cut, or they have not come in time.
        """
        self._meet(ranks)
        gloo = self._gloo
        if gloo is None or self._broken is not None:
            raise LinkError(str(self._broken))
        return gloo

    @property
    def backend(self) -> Gloo:
        """What torch asks for its properties."""
        assert self._gloo is not None
        return self._gloo

    @property
    def idle(self) -> bool:
        """Whether no collective is under way."""
        return not self._waiting

    def sockets(self) -> frozenset[int]:
        """Inode numbers of the connections that are open."""
        return sockets.connected(self._mine, set(self._theirs.values()))

    def cut(self, why: GroupBrokenError) -> None:
        """End all that is under way; from here on nothing of it touches a tensor."""
        with self._lock:
            if self._broken is not None:
                return
            self._broken = why
            given_up, self._waiting = self._waiting, set()
        self._opened |= self.sockets()
        sockets.sever(self._mine, set(self._theirs.values()))
        self._give_up(given_up, why)
        self._jobs.put(None)
        self._start()

    def close(self) -> None:
        """Wait until nothing of it is left, after `cut`."""
        deadline = time.monotonic() + _CLOSED_WITHIN_S
        for each in self._threads:
            each.join(max(0.0, deadline - time.monotonic()))

    def _start(self) -> None:
        """Have a thread that takes the next turn."""
        with self._lock:
            if self._ready == 0:
                self._ready += 1
                thread = threading.Thread(target=self._serve, name="mnemo-comm", daemon=True)
                self._threads.append(thread)
                thread.start()

    def _serve(self) -> None:
        while True:
            with self._turn:
                asked = self._jobs.get()
                if asked is None:
                    self._destroy()
                    self._jobs.put(None)
                    return
                work, job = asked
                settle = self._do(work, job) and work.end()
                if settle:  # hooks of users' run in there, and may wait for what is asked later
                    with self._lock:
                        self._ready -= 1
            if settle:
                self._start()
                work.settle()
                with self._lock:
                    self._ready += 1
            del asked, work, job

    def _do(self, work: Collective, job: Job) -> bool:
        """Run it; whether its end is not told yet, as it is if it was given up before it began."""
        begun = False
        try:
            gloo = self._gloo
            assert gloo is not None
            if len(self._theirs) < self._size:
                self._connect(gloo)
            with self._lock:
                begun = work in self._waiting
                self._waiting.discard(work)
            if begun:
                with torch.inference_mode():
                    results = job(gloo)
                work.whole(results)
        except LinkError as error:
            self._on_break(str(error), self)
            assert self._broken is not None
            if begun:
                work.gave_up(self._broken)
        except Exception as error:  # noqa: BLE001 - the caller's mistake, said where it waits
            work.refused(error)
        return begun

    @staticmethod
    def _give_up(works: Iterable[Collective], why: GroupBrokenError) -> None:
        for work in works:
            work.gave_up(why)
            if work.end():
                work.settle()

    def _destroy(self) -> None:
        """Let go of gloo, which ends the process if it is destroyed while it sees sockets end."""
        deadline = time.monotonic() + _CLOSED_WITHIN_S
        # By their numbers: one that was reset by the other end has no address any more.
        while sockets.still_open(self._opened):
            if time.monotonic() > deadline:
                _kept.append(self._gloo)
                break
            time.sleep(_GLANCE_S)
        self._gloo = None

    def _connect(self, gloo: Gloo) -> None:
        self._meet(range(self._size))
        nothing = torch.zeros(self._size)
        ended(gloo.alltoall_base(nothing.clone(), nothing, [], [], AllToAllOptions()))
        self._opened = self.sockets()

    def _meet(self, ranks: Sequence[int]) -> None:
        """Wait until these have made their communicators, and learn where they listen."""
        missing = [rank for rank in ranks if rank not in self._theirs]
        if not missing:
            return
        keys = [f"listens/{rank}" for rank in missing]
        late = wait_for(self._store, keys, self._timeout, lambda: self._broken is not None)
        if self._broken is not None:
            raise LinkError(str(self._broken))
        if late:
            absent = [rank for rank, key in zip(missing, keys, strict=True) if key in late]
            msg = f"ranks {absent} of the group did not come within {self._timeout}"
            raise LinkError(msg)
        places = [sockets.Address(*json.loads(said)) for said in self._store.multi_get(keys)]
        # In one assignment: other threads look.
        self._theirs = {**self._theirs, **dict(zip(missing, places, strict=True))}


def _device() -> tuple[Any, sockets.Address]:
    """A device of gloo's, and where it listens.

    Raises:
        CommError: It cannot be told from other sockets of the process.
    """
    interface = os.environ.get("GLOO_SOCKET_IFNAME", "").partition(",")[0]
    for _ in range(10):
        with _making:
            before = sockets.listening()
            if interface:
                device = ProcessGroupGloo.create_device(interface=interface, lazy_init=True)
            else:
                device = ProcessGroupGloo.create_default_device(lazy_init=True)
            new = sockets.listening() - before
        if len(new) == 1:  # else another thread has begun to listen at the same moment
            return device, new.pop()
    msg = "gloo's listening socket was not found among those of this process, ten times"
    raise CommError(msg)
