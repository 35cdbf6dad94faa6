"""The SMP itself: serves the ranks of one node over a unix socket, for as long as it has to.

One asyncio loop. Who connects proves the run's secret, then asks; `mnemo.smp.fits` answers.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import socket
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec

from mnemo.clock import Clock, SystemClock
from mnemo.errors import ConfigError, IdentityError, MnemoError, ProtocolError, RunInUseError
from mnemo.protect import Neighbours
from mnemo.smp import messages as m
from mnemo.smp.board import Board
from mnemo.smp.fits import Answer, Fit, Seat
from mnemo.smp.paths import RunPaths
from mnemo.smp.shelf import Slot
from mnemo.transport import auth, local
from mnemo.transport.address import Address, is_as_asked, listen
from mnemo.transport.handshake import Identity

log = logging.getLogger("mnemo.smp")

LINGER_S: Final = 1.0
"""How long an SMP with nothing left to keep waits for a next fit of the same process."""
ADMISSION_S: Final = 30.0
"""How long a client may take to prove itself."""
_UNCOMMITTED_S: Final = 60.0
"""How long one that holds nothing to resume from waits for ranks: some join late."""
_BREATHER_S: Final = 0.1

_OF_SEATED: Final[dict[type[m.Message], Callable[[Fit, Seat, Any], Awaitable[Answer]]]] = {
    m.Recall: Fit.recall,
    m.Reserve: Fit.reserve,
    m.Begin: Fit.begin,
    m.Seal: Fit.seal,
    m.Drop: Fit.drop,
    m.Resume: Fit.resume,
    m.Finish: Fit.finish,
    m.Leave: Fit.leave,
}
_OF_SEATED_WITH_FDS: Final[
    dict[type[m.Message], Callable[[Fit, Seat, Any, list[int]], Awaitable[Answer]]]
] = {
    m.Adopt: Fit.adopt,
    m.KeepLedger: Fit.keep_ledger,
}


@dataclass(eq=False)
class Connection:
    """One client."""

    channel: local.AsyncChannel
    seat: Seat | None = None
    joined: bool = False
    """Whether it ever was a rank."""
    reading: list[Slot] = field(default_factory=list)
    """What it fetched last, pinned."""
    attends: bool = False
    """It launches the ranks: as long as it is there, more may come."""

    def read(self, slots: list[Slot]) -> None:
        """Pin ``slots``, and no longer those before."""
        for slot in slots:
            slot.pins += 1
        for slot in self.reading:
            slot.pins -= 1
        self.reading = slots


class Server:
    """Serves until there is nothing left to keep."""

    def __init__(
        self, paths: RunPaths, listener: socket.socket, secret: bytes, clock: Clock | None = None
    ) -> None:
        self.paths = paths
        self._listener = listener
        self._secret = secret
        self._clock = clock or SystemClock()
        self._fits: dict[int, Fit] = {}
        self._neighbours: Neighbours | None = None
        self._clients: set[Connection] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._stopping = False
        self._wake = asyncio.Event()
        self._keep_alive_s = 3600.0
        self._attended = False
        self._idle_since = self._clock.monotonic()
        self._started = self._clock.time()
        self._counts: Counter[str] = Counter(
            sealed=0, committed=0, skipped=0, refused=0, persisted=0, persist_failed=0
        )

    # --- life ---------------------------------------------------------------------------------

    async def run(self) -> None:
        """Serve until told to stop, or until nobody has wanted the state for long enough."""
        acceptor = asyncio.get_running_loop().create_task(self._accept())
        try:
            while not self._stopping:
                left = self._seconds_to_live()
                if left <= 0:
                    log.info("nobody came back in time: giving the memory back")
                    break
                self._wake.clear()
                await self._woken(left)
        finally:
            acceptor.cancel()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(acceptor, *self._tasks, return_exceptions=True)
            for fit in self._fits.values():
                await fit.close()
            if self._neighbours is not None:
                await self._neighbours.close()

    async def _woken(self, seconds: float) -> None:
        """Wait for something to happen; ``seconds`` are all that nothing may."""
        # Not wait_for: before Python 3.12 that may swallow a cancellation.
        timer = None
        if not math.isinf(seconds):
            timer = asyncio.get_running_loop().call_later(seconds, self._wake.set)
        try:
            await self._wake.wait()
        finally:
            if timer is not None:
                timer.cancel()

    def stop(self) -> None:
        """End `run` soon."""
        self._stopping = True
        self._wake.set()

    async def persist_and_stop(self) -> None:
        """On SIGTERM: the newest generation goes to storage, where there is one, before the end."""
        for fit in self._fits.values():
            if not fit.is_over:
                await fit.commits.flush()
        self.stop()

    def _seconds_to_live(self) -> float:
        if any(fit.seats for fit in self._fits.values()) or any(
            client.attends for client in self._clients
        ):
            self._idle_since = self._clock.monotonic()
            return math.inf
        left = self._idle_since + self._patience() - self._clock.monotonic()
        # A tool that looks on does not prolong the run's life, but is answered to its end.
        return max(left, LINGER_S) if self._clients else left

    def _patience(self) -> float:
        """Seconds to wait for the next rank while none is there, nor who would start one."""
        wanted = [fit for fit in self._fits.values() if not fit.is_over]
        if any(fit.commits.newest for fit in wanted):
            return self._keep_alive_s
        if self._attended or (self._fits and not wanted):
            return LINGER_S
        return min(_UNCOMMITTED_S, self._keep_alive_s)

    # --- connections --------------------------------------------------------------------------

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                sock, _ = await loop.sock_accept(self._listener)
            except OSError as error:  # out of descriptors, for now
                log.warning("a connection could not be accepted: %s", error)
                await asyncio.sleep(_BREATHER_S)
                continue
            task = loop.create_task(self._serve(sock))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _serve(self, sock: socket.socket) -> None:
        client = Connection(local.AsyncChannel(sock))
        overdue = asyncio.get_running_loop().call_later(ADMISSION_S, client.channel.hang_up)
        try:
            await self._admit(client.channel)
            overdue.cancel()
            self._clients.add(client)
            while await self._answer_one(client):
                pass
        except (OSError, MnemoError) as error:
            log.info("connection of process %d ended: %s", client.channel.pid, error)
        finally:
            overdue.cancel()
            self._forget(client)
            client.channel.close()

    async def _admit(self, channel: local.AsyncChannel) -> None:
        """Same user, and the run's secret proved both ways, before any request is looked at.

        Raises:
            MnemoError: Refused.
        """
        nonce = auth.new_nonce()
        try:
            if channel.uid != os.getuid():
                raise ProtocolError(
                    f"uid {channel.uid} is not uid {os.getuid()} of this run's owner: start both "
                    "as one user (in containers: the same mapped uid)"
                )
            await channel.send(m.encode(m.Challenge(nonce)))
            data, fds = await channel.receive()
            local.close_all(fds)
            hello = m.decode_request(data)
            if not isinstance(hello, m.Hello) or not auth.verify(
                self._secret, "client", hello.nonce, nonce, hello.proof
            ):
                raise ProtocolError("the run's secret was not proved")
        except MnemoError as error:
            self._counts["refused"] += 1
            await channel.send(m.encode(m.Failure("SmpError", str(error))))
            raise
        await channel.send(
            m.encode(m.Welcome(auth.proof(self._secret, "server", nonce, hello.nonce), os.getpid()))
        )

    async def _answer_one(self, client: Connection) -> bool:
        """Serve one request; False when the client has closed."""
        data, fds = await client.channel.receive()
        if not data:
            return False
        out: list[int] = []
        reply: m.Message
        try:
            with client.channel.watching(lambda: self._forget(client)):
                reply, out = await self._handle(client, m.decode_request(data), fds)
        except MnemoError as error:
            reply = m.Failure(type(error).__name__, str(error))
        except Exception as error:
            log.exception("a request of process %d failed", client.channel.pid)
            reply = m.Failure("SmpError", f"the snapshot process failed at this: {error!r}")
        finally:
            local.close_all(fds)
        await client.channel.send(m.encode(reply), out)
        return True

    def _forget(self, client: Connection) -> None:
        """The client is gone, or as good as; harmless a second time."""
        self._clients.discard(client)
        client.read([])
        if client.joined or client.attends:
            self._idle_since = self._clock.monotonic()
        if client.seat is not None:
            client.seat.fit.vacate(client.seat)
        for fit in self._fits.values():
            fit.wake()  # what it was reading may be free now
        self._wake.set()

    # --- requests -----------------------------------------------------------------------------

    async def _handle(self, client: Connection, request: m.Request, fds: list[int]) -> Answer:
        if isinstance(request, m.Join):
            return await self._join(client, request, fds)
        if isinstance(request, m.Listen):
            return self._listen(request), []
        if isinstance(request, m.Fetch):
            return self._fetch(client, request)
        if isinstance(request, m.FetchLedger | m.Flush):
            return await self._tell_of_fit(request)
        if isinstance(request, m.Look | m.Status):
            return self._tell(request), []
        if isinstance(request, m.Attend | m.Shutdown | m.Rollback):
            await self._manage(client, request)
            return m.Done(), []
        if isinstance(request, m.Over):
            await self._over(client)
            return m.Done(), []
        if client.seat is None:
            raise ProtocolError(f"{type(request).__name__} before Join")
        takes = _OF_SEATED_WITH_FDS.get(type(request))
        if takes is not None:
            return await takes(client.seat.fit, client.seat, request, fds)
        handler = _OF_SEATED.get(type(request))
        if handler is None:
            raise ProtocolError(f"{type(request).__name__} is not expected here")
        answer = await handler(client.seat.fit, client.seat, request)
        if isinstance(request, m.Leave):
            client.seat = None
        return answer

    async def _join(self, client: Connection, request: m.Join, fds: list[int]) -> Answer:
        if client.seat is not None:
            raise ProtocolError(f"this connection is rank {client.seat.rank} already")
        fit = self._fits.get(request.fit)
        if fit is not None and fit.is_over:
            del self._fits[request.fit]
            await fit.close()
            fit = self._fits.get(request.fit)  # another rank may have been faster
        if fit is None:
            board = (
                Board.taken_over(fds[0], request.members) if fds else Board.create(request.members)
            )
            fit = self._fits[request.fit] = Fit(
                request.fit, self.paths.run_id, request.members, board, self._counts, self._clock
            )
        client.seat = fit.sit(request, client.channel.pid)
        client.joined = True
        self._keep_alive_s = request.keep_alive_s
        await fit.store(request.persist)
        if request.protect is not None:
            await self._protect(fit, request.protect, handed_over=bool(fds))
        else:
            await fit.commits.unprotect()
        return m.Joined(fit.commits.newest), [fit.board.fd]

    def _tell(self, request: m.Look | m.Status) -> m.Message:
        if isinstance(request, m.Status):
            return m.StatusReply(msgspec.json.encode(self.status()))
        wanted = [fit for fit in self._fits.values() if not fit.is_finished]
        newest = max(wanted, key=lambda fit: fit.number, default=None)
        return m.Looked() if newest is None else newest.look()

    async def _tell_of_fit(self, request: m.FetchLedger | m.Flush) -> Answer:
        fit = self._fits.get(request.fit)
        if isinstance(request, m.FetchLedger):
            return m.Ledgers(), [] if fit is None else fit.ledger(request.rank)
        return m.Flushed(-1) if fit is None else await fit.commits.flush(request.tick), []

    def _listen(self, request: m.Listen) -> m.Listening:
        if self._neighbours is None:
            sock = listen(request.interface, request.ports)
            me = Identity(node=request.node, run=self.paths.run_id, secret=self._secret)
            self._neighbours = Neighbours(me, sock, {})
        elif self._neighbours.name != request.node:
            raise IdentityError(
                f"this node was {self._neighbours.name} of run {self.paths.run_id}, and is "
                f"{request.node} in this launch: give the ranks to the nodes as before, or give "
                "it another run.id"
            )
        elif not is_as_asked(self._neighbours.address, request.interface, request.ports):
            self._neighbours.listen(listen(request.interface, request.ports))
        return m.Listening(*self._neighbours.address)

    async def _protect(self, fit: Fit, settings: m.ProtectSettings, *, handed_over: bool) -> None:
        """Have ``fit`` protected; if ranks hand over what they hold, nothing of it is lost."""
        if self._neighbours is None:  # this process replaces one that listened
            host, port = settings.addresses[settings.node]
            try:
                self._listen(m.Listen(settings.node, host, str(port)))
            except ConfigError as error:
                log.error("other nodes do not find this one any more: %s", error)
                return
        assert self._neighbours is not None
        self._neighbours.limit(settings.bytes_per_s)
        for node, (host, port) in settings.addresses.items():
            self._neighbours.moved(node, Address(host, port))
        await fit.commits.protect(fit.number, settings, self._neighbours)
        self._neighbours.forget_all_but(
            {node for known in self._fits.values() for node in known.commits.neighbours}
        )
        if handed_over:
            fit.commits.take_part()

    async def _over(self, client: Connection) -> None:
        """See `m.Over`."""
        if client.seat is None:
            for fit in self._fits.values():
                if fit.is_finished:
                    await fit.give_up()
        elif not any(other.attends for other in self._clients):
            await client.seat.fit.leave(client.seat, m.Leave(finished=True))

    def _fetch(self, client: Connection, request: m.Fetch) -> Answer:
        if request.fit is None and client.seat is None:
            raise ProtocolError("Fetch before Join, and of no fit")
        seat = client.seat
        fit = seat.fit if seat and request.fit is None else self._fits.get(request.fit or 0)
        if fit is None:
            return m.Fetched(None), []
        fetched, fds, slots = fit.commits.fetch(request.below or None)
        # A rank reads before it writes, and until it does no newer generation can be committed.
        client.read([] if seat else slots)
        return fetched, fds

    async def _manage(
        self, client: Connection, request: m.Attend | m.Shutdown | m.Rollback
    ) -> None:
        if isinstance(request, m.Attend):
            client.attends = self._attended = True
        elif isinstance(request, m.Shutdown):
            if not request.force:
                self._refuse_while_training()
            self.stop()
        else:
            async with contextlib.AsyncExitStack() as persisting:
                for fit in self._fits.values():
                    if fit.commits.persister is not None:
                        await persisting.enter_async_context(fit.commits.persister.lock)
                self._refuse_while_training()
                for fit in self._fits.values():
                    fit.rollback(request.step)

    def _refuse_while_training(self) -> None:
        pids = [seat.pid for fit in self._fits.values() for seat in fit.seats.values()]
        if pids:
            raise RunInUseError(
                f"run {self.paths.run_id} is training (process {', '.join(map(str, pids))}): "
                "end it first"
            )

    def status(self) -> dict[str, Any]:
        """Everything that ``mnemo status`` shows, as plain data; sizes in bytes."""
        left = self._seconds_to_live()
        return {
            "run": self.paths.run_id,
            "pid": os.getpid(),
            "started": self._started,
            "keep_alive_s": self._keep_alive_s,
            "kept_for_s": None if math.isinf(left) else max(left, 0.0),
            "clients": len(self._clients),
            "counts": dict(self._counts),
            "fits": [fit.status() for fit in self._fits.values()],
        }
