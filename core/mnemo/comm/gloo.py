"""One gloo communicator of a group: it can be cut.

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
import threading
import time
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from mnemo.comm import sockets
from mnemo.comm.c10d import AllToAllOptions, Gloo, ProcessGroupGloo
from mnemo.comm.waiting import wait_for
from mnemo.errors import CommError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from datetime import timedelta

    from mnemo.comm.c10d import Store, Work

T = TypeVar("T")

_GLANCE_S = 0.002
_CLOSED_WITHIN_S = 5.0
_TAG = 1 << 28
"""Of greetings; users' are small."""
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


def begun(begin: Callable[..., Work], *given: Any) -> Work:
    """Begin a message; gloo says at once if it knows that the link is broken.

    Raises:
        LinkError: It does.
    """
    try:
        return begin(*given)
    except RuntimeError as error:
        if "gloo/transport" not in str(error):
            raise
        raise LinkError(str(error).partition("\n")[0]) from None


class GlooLinks:
    """A communicator.

    Args:
        store: Of this communicator alone.
        rank: In the group.
        size: Of the group.
        timeout: Of each operation, and for members to come.
    """

    def __init__(self, store: Store, rank: int, size: int, timeout: timedelta) -> None:
        self._store, self._size, self._timeout = store, size, timeout
        device, self._mine = _device()
        options = ProcessGroupGloo._Options()
        options._devices = [device]
        options._timeout = timeout
        options._threads = 2  # with one, its loop spins: ten times the processor time
        self._theirs: dict[int, sockets.Address] = {}
        self._gloo: Gloo | None = ProcessGroupGloo(store, rank, size, options)
        store.set(f"listens/{rank}", json.dumps(self._mine))
        self._lock = threading.Lock()
        self._in_use = threading.Lock()
        self._cut: str | None = None
        self._opened: frozenset[int] = frozenset()
        self._burial: threading.Thread | None = None
        self._connecting: threading.Thread | None = None

    def use(self, job: Callable[[Gloo], T]) -> T:
        """Do a collective: connect all members, if they are not yet. One at a time.

        Raises:
            LinkError: It was cut, or somebody does not answer. No tensor is touched any more.
        """
        with self._in_use:
            if len(self._theirs) < self._size:
                self._connect()
            return job(self._whole())

    def use_with(self, ranks: Sequence[int], job: Callable[[Gloo], T]) -> T:
        """Do what needs these members alone. Nothing else is done meanwhile.

        Raises:
            LinkError: It was cut, or one of them does not answer.
        """
        with self._in_use:
            gloo = self.peer(ranks)
            self._await(partial(_greet, gloo, ranks))
            return job(gloo)

    def peer(self, ranks: Sequence[int]) -> Gloo:
        """The communicator, for messages with ``ranks``, which have all come.

        Raises:
            LinkError: It was cut, or they have not come in time.
        """
        self._meet(ranks)
        return self._whole()

    def _whole(self) -> Gloo:
        gloo = self._gloo
        if gloo is None or self._cut is not None:
            raise LinkError(self._cut)
        return gloo

    @property
    def backend(self) -> Gloo | None:
        """What torch asks for its properties; None once it was cut and is gone."""
        return self._gloo

    @property
    def is_cut(self) -> str | None:
        """Why, if it is."""
        return self._cut

    def sockets(self) -> frozenset[int]:
        """Inode numbers of the connections that are open."""
        return sockets.connected(self._mine, set(self._theirs.values()))

    def cut(self, why: str) -> None:
        """Have all that is under way fail."""
        with self._lock:
            if self._cut is not None:
                return
            self._cut = why
        self._sever()
        self._burial = threading.Thread(target=self._bury, name="mnemo-comm-end", daemon=True)
        self._burial.start()

    def quiet(self, within_s: float) -> bool:
        """Wait until no collective is under way; whether that came about."""
        if not self._in_use.acquire(timeout=within_s):
            return False
        self._in_use.release()
        return True

    def close(self) -> None:
        """Wait until nothing of it is left, after `cut`."""
        assert self._burial is not None
        self._burial.join(2 * _CLOSED_WITHIN_S)

    def _bury(self) -> None:
        """Let go of gloo, which ends the process if it is destroyed while it sees sockets end."""
        while not self.quiet(_GLANCE_S):  # what was just connecting has sockets only now
            self._sever()
        if self._connecting is not None:
            self._connecting.join()
        deadline = time.monotonic() + _CLOSED_WITHIN_S
        # By their numbers: one that was reset by the other end has no address any more.
        while sockets.still_open(self._opened):
            if time.monotonic() > deadline:
                _kept.append(self._gloo)
                break
            time.sleep(_GLANCE_S)
        self._gloo = None

    def _sever(self) -> None:
        self._opened |= self.sockets()
        sockets.sever(self._mine, set(self._theirs.values()))

    def _connect(self) -> None:
        self._meet(range(self._size))
        self._await(partial(_greet_all, self._whole(), self._size))
        self._opened = self.sockets()

    def _await(self, connect: Callable[[], None]) -> None:
        """Do what has others connect. Where they do not, there is no socket to shut down yet."""
        done = threading.Event()
        failed: list[Exception] = []

        def run() -> None:
            try:
                connect()
            except Exception as error:  # noqa: BLE001 - raised below
                failed.append(error)
            done.set()

        self._connecting = threading.Thread(target=run, name="mnemo-comm-connect", daemon=True)
        self._connecting.start()
        while not done.wait(_GLANCE_S):
            if self._cut is not None:
                raise LinkError(self._cut)
        if failed:
            raise failed[0]

    def _meet(self, ranks: Sequence[int]) -> None:
        """Wait until these have made their communicators, and learn where they listen."""
        missing = [rank for rank in ranks if rank not in self._theirs]
        if not missing:
            return
        keys = [f"listens/{rank}" for rank in missing]
        late = wait_for(self._store, keys, self._timeout, lambda: self._cut is not None)
        if self._cut is not None:
            raise LinkError(self._cut)
        if late:
            absent = [rank for rank, key in zip(missing, keys, strict=True) if key in late]
            msg = f"ranks {absent} of the group did not come within {self._timeout}"
            raise LinkError(msg)
        places = [sockets.Address(*json.loads(said)) for said in self._store.multi_get(keys)]
        # In one assignment: other threads look.
        self._theirs = {**self._theirs, **dict(zip(missing, places, strict=True))}


def _greet(gloo: Gloo, ranks: Sequence[int]) -> None:
    """Exchange a byte with each of these."""
    byte = torch.zeros(1, dtype=torch.uint8)
    works = [begun(gloo.recv, [byte.clone()], each, _TAG) for each in ranks]
    works += [begun(gloo.send, [byte], each, _TAG) for each in ranks]
    for each in works:
        ended(each)


def _greet_all(gloo: Gloo, size: int) -> None:
    nothing = torch.zeros(size)
    ended(gloo.alltoall_base(nothing.clone(), nothing, [], [], AllToAllOptions()))


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
