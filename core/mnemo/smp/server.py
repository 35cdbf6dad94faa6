"""The SMP itself: serves the ranks of one node over a unix socket, and owns their snapshots.

One asyncio loop, no lock: everything that blocks (allocating, verifying, persisting) runs in
threads, and every decision is taken by `Shelf` on the loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import socket
import struct
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec

from mnemo import errors
from mnemo.clock import Clock, SystemClock
from mnemo.errors import (
    HostMemoryError,
    IntegrityError,
    MnemoError,
    ProtocolError,
    RunInUseError,
    SmpError,
)
from mnemo.smp import messages as m
from mnemo.smp import segment
from mnemo.smp.board import Board
from mnemo.smp.memory import memory_limit
from mnemo.smp.paths import RunPaths
from mnemo.smp.persist import Persister
from mnemo.smp.shelf import Shelf, Slot
from mnemo.transport import auth, local
from mnemo.types import GenerationState

log = logging.getLogger("mnemo.smp")

LINGER_S: Final = 1.0
"""How long an SMP with nothing left to keep waits for a next fit of the same process."""


@dataclass
class Fit:
    """One training: its shelf, its segments' descriptors, its board."""

    number: int
    shelf: Shelf
    board: Board
    fds: dict[tuple[int, int], int] = field(default_factory=dict)
    connected: dict[int, Connection] = field(default_factory=dict)
    finished: set[int] = field(default_factory=set)
    differ: str = ""
    persister: Persister | None = None
    checked: int = -1
    """Newest tick whose replicas were compared."""
    committed_at: float = 0.0
    """When that tick was committed, unix seconds."""

    @property
    def is_finished(self) -> bool:
        """Every member left and said that nothing is to be resumed."""
        return len(self.finished) >= self.shelf.members

    def rewound(self) -> None:
        """What was committed may be older now: what follows is compared and persisted anew."""
        tick, step = self.shelf.committed() or (-1, -1)
        self.checked = min(self.checked, tick)
        if self.persister is not None:
            self.persister.newest_step = min(self.persister.newest_step, step)

    def release(self) -> None:
        """Give all memory back."""
        for fd in self.fds.values():
            os.close(fd)
        self.fds.clear()
        self.shelf.ranks.clear()


@dataclass(eq=False)
class Connection:
    """One client, after it has proved itself."""

    channel: local.AsyncChannel
    rank: int = -1
    fit: Fit | None = None
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
        self._clients: set[Connection] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Condition()
        self._stopping = asyncio.Event()
        self._keep_alive_s = 3600.0
        self._attended = False
        self._idle_since = self._clock.monotonic()
        self._started = self._clock.time()
        self._counts = {
            "sealed": 0,
            "committed": 0,
            "refused": 0,
            "persisted": 0,
            "persist_failed": 0,
        }

    # --- life ---------------------------------------------------------------------------------

    async def run(self) -> None:
        """Serve until told to stop, or until nobody has wanted the state for long enough."""
        loop = asyncio.get_running_loop()
        acceptor = loop.create_task(self._accept())
        try:
            while not self._stopping.is_set():
                wait = self._seconds_to_live()
                if wait <= 0:
                    log.info(
                        "nobody came back within %.0f s: giving the memory back", self._keep_alive_s
                    )
                    break
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(
                        self._stopping.wait(), min(wait, 0.5 if not self._clients else 5.0)
                    )
        finally:
            acceptor.cancel()
            for task in list(self._tasks):
                task.cancel()
            await asyncio.gather(acceptor, *self._tasks, return_exceptions=True)
            for fit in self._fits.values():
                if fit.persister is not None:
                    await fit.persister.close()
                fit.release()
                fit.board.close()

    def stop(self) -> None:
        """End `run` soon."""
        self._stopping.set()

    async def persist_and_stop(self) -> None:
        """On SIGTERM: the newest generation goes to storage, where there is one, before the end."""
        for fit in self._fits.values():
            if fit.persister is not None and not fit.is_finished:
                await self._flush(fit)
        self.stop()

    def _seconds_to_live(self) -> float:
        if any(fit.connected for fit in self._fits.values()) or any(
            client.attends for client in self._clients
        ):
            self._idle_since = self._clock.monotonic()
            return float("inf")
        keep = LINGER_S if all(f.is_finished for f in self._fits.values()) else self._keep_alive_s
        if not self._fits and not self._attended:
            keep = min(60.0, self._keep_alive_s)  # started, but nobody has joined yet
        left = self._idle_since + keep - self._clock.monotonic()
        # A tool that looks on does not prolong the run's life, but is answered to its end.
        return max(left, LINGER_S) if self._clients else left

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            sock, _ = await loop.sock_accept(self._listener)
            task = loop.create_task(self._serve(sock))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _serve(self, sock: socket.socket) -> None:
        channel = local.AsyncChannel(sock)
        client = Connection(channel)
        try:
            if await self._admit(client):
                self._clients.add(client)
                await self._answer_all(client)
        except (OSError, MnemoError) as error:
            log.info("connection of rank %d ended: %s", client.rank, error)
        finally:
            self._clients.discard(client)
            if client.rank >= 0:
                self._idle_since = self._clock.monotonic()
            client.read([])
            await self._gone(client)
            channel.close()

    async def _admit(self, client: Connection) -> bool:
        """Same user, and the run's secret proved both ways, before any request is looked at."""
        channel = client.channel
        if channel.uid != os.getuid():
            text = f"uid {channel.uid} is not uid {os.getuid()} of this run's owner: start both as one user (in containers: the same mapped uid)"
            await channel.send(m.encode(m.Failure("SmpError", text)))
            return False
        nonce = auth.new_nonce()
        await channel.send(m.encode(m.Challenge(nonce)))
        data, fds = await asyncio.wait_for(channel.receive(), timeout=30)
        local.close_all(fds)
        if not data:
            return False
        hello = m.decode_request(data)
        if not isinstance(hello, m.Hello) or not auth.verify(
            self._secret, "client", hello.nonce, nonce, hello.proof
        ):
            await channel.send(m.encode(m.Failure("SmpError", "the run's secret was not proved")))
            return False
        await channel.send(
            m.encode(m.Welcome(auth.proof(self._secret, "server", nonce, hello.nonce), os.getpid()))
        )
        return True

    async def _answer_all(self, client: Connection) -> None:
        while True:
            data, fds = await client.channel.receive()
            if not data:
                return
            try:
                request = m.decode_request(data)
                reply, out = await self._handle(client, request, fds)
            except MnemoError as error:
                reply, out = m.Failure(type(error).__name__, str(error)), []
            except OSError as error:
                reply, out = m.Failure("SmpError", f"{error.strerror or error}"), []
            finally:
                local.close_all(fds)
            await client.channel.send(m.encode(reply), out)

    async def _gone(self, client: Connection) -> None:
        """A client is gone: what it was writing is void unless it had sealed without saying so."""
        fit = client.fit
        if fit is None or fit.connected.get(client.rank) is not client:
            return
        del fit.connected[client.rank]
        for index, slot in fit.shelf.rank(client.rank).slots.items():
            if slot.state is GenerationState.WRITING:
                self._settle(fit, client.rank, index)
        await self._notify(fit)

    def _settle(self, fit: Fit, rank: int, index: int) -> None:
        """Believe the segment itself: sealed if its header says so, else void."""
        try:
            header = segment.read_header(fit.fds[rank, index])
        except IntegrityError:
            fit.shelf.void(rank, index)
            return
        slot = fit.shelf.rank(rank).slots[index]
        if header.state is GenerationState.SEALED:
            slot.state, slot.tick, slot.step = GenerationState.SEALED, header.tick, header.step
        else:
            fit.shelf.void(rank, index)

    # --- requests -----------------------------------------------------------------------------

    async def _handle(
        self, client: Connection, request: m.Request, fds: list[int]
    ) -> tuple[m.Message, list[int]]:
        handlers: dict[
            type[Any], Callable[[Connection, Any], Awaitable[tuple[m.Message, list[int]]]]
        ] = {
            m.Reserve: self._reserve,
            m.Begin: self._begin,
            m.Seal: self._seal,
            m.Drop: self._drop,
            m.Resume: self._resume,
            m.Leave: self._leave,
            m.Flush: self._flush_request,
        }
        if isinstance(request, m.Join):
            return await self._join(client, request)
        if isinstance(request, m.Status):
            return m.StatusReply(msgspec.json.encode(self.status())), []
        if isinstance(request, m.Attend):
            client.attends = self._attended = True
            return m.Done(), []
        if isinstance(request, m.Shutdown):
            if not request.force:
                self._refuse_while_training()
            self.stop()
            return m.Done(), []
        if isinstance(request, m.Rollback):
            return await self._rollback(request), []
        if isinstance(request, m.Fetch):
            return self._fetch(client, request)
        if client.fit is None:
            raise ProtocolError(f"{type(request).__name__} before Join")
        if isinstance(request, m.Adopt):
            return await self._adopt(client, request, fds), []
        handler = handlers.get(type(request))
        if handler is None:
            raise ProtocolError(f"{type(request).__name__} is not expected here")
        return await handler(client, request)

    async def _join(self, client: Connection, request: m.Join) -> tuple[m.Message, list[int]]:
        if not request.rank >= 0 or request.members < 1:
            raise ProtocolError(f"rank {request.rank} of {request.members} members")
        fit = self._fits.get(request.fit)
        if fit is None or fit.is_finished:
            if fit is not None:
                fit.release()
                fit.board.close()
            fit = Fit(request.fit, Shelf(request.members), Board.create(request.members))
            self._fits[request.fit] = fit
        holder = fit.connected.get(request.rank)
        if holder is not None and holder is not client:
            raise RunInUseError(
                f"run {self.paths.run_id} is in use: its rank {request.rank} is process {holder.channel.pid}, which is alive. "
                "Give this job another run.id, or end the other one"
            )
        if request.members != fit.shelf.members:
            raise errors.IdentityError(
                f"run {self.paths.run_id} has {fit.shelf.members} ranks on this node, this launch has {request.members}. "
                "Start it with as many as before, or with run.resume=never to begin anew"
            )
        client.fit, client.rank = fit, request.rank
        fit.connected[request.rank] = client
        fit.finished.discard(request.rank)
        self._keep_alive_s = request.keep_alive_s
        if request.persist is not None and fit.persister is None:
            fit.persister = Persister(request.persist, self.paths.run_id, fit.number, self._clock)
        return m.Joined(_generation(fit.shelf.committed())), [fit.board.fd]

    async def _reserve(self, client: Connection, request: m.Reserve) -> tuple[m.Message, list[int]]:
        fit = _fit(client)
        held = sum(s.size for shelf in fit.shelf.ranks.values() for s in shelf.slots.values())
        needed = request.size * request.buffers * fit.shelf.members - held
        limit = memory_limit()
        if needed > limit.available:
            raise HostMemoryError(
                f"{request.buffers} snapshot buffers of {_gib(request.size)} for {fit.shelf.members} ranks need "
                f"{_gib(request.size * request.buffers * fit.shelf.members)}; the {limit.bound} has {_gib(limit.available)} "
                f"of {_gib(limit.total)} left. Shard replicas (snapshot.shard_replicas), or raise the limit"
            )
        return m.Done(), []

    async def _begin(self, client: Connection, request: m.Begin) -> tuple[m.Message, list[int]]:
        fit, rank = _fit(client), client.rank
        shelf = fit.shelf
        async with self._changed:
            while True:
                index, surplus, create = shelf.grant(rank, request.tick, request.size)
                for old in surplus:
                    self._release(fit, rank, old)
                if index is not None or create:
                    break
                if surplus:
                    self._changed.notify_all()
                await self._changed.wait()
                if fit.connected.get(rank) is not client:
                    raise SmpError("superseded by another process of the same rank")
            if index is None:
                index = shelf.add(rank, request.size)
                shelf.write(rank, index, request.tick, request.step)
                try:
                    fd = await asyncio.to_thread(self._allocate, fit, rank, request.size)
                except MnemoError:
                    del shelf.rank(rank).slots[index]
                    raise
                fit.fds[rank, index] = fd
            shelf.write(rank, index, request.tick, request.step)
        live = tuple(shelf.rank(rank).slots)
        return m.Granted(index, live, shard=not fit.differ), [fit.fds[rank, index]]

    def _allocate(self, fit: Fit, rank: int, size: int) -> int:
        limit = memory_limit()
        if size > limit.available:
            raise HostMemoryError(
                f"a snapshot buffer of {_gib(size)} for rank {rank} does not fit: the {limit.bound} has {_gib(limit.available)} of {_gib(limit.total)} left"
            )
        try:
            return segment.create(f"mnemo:{self.paths.run_id}:{fit.number}:{rank}", size)
        except OSError as error:
            raise HostMemoryError(
                f"a snapshot buffer of {_gib(size)} could not be made: {error.strerror}"
            ) from error

    def _release(self, fit: Fit, rank: int, index: int) -> None:
        del fit.shelf.rank(rank).slots[index]
        os.close(fit.fds.pop((rank, index)))

    async def _seal(self, client: Connection, request: m.Seal) -> tuple[m.Message, list[int]]:
        fit = _fit(client)
        header = segment.read_header(_fd(fit, client.rank, request.index))
        if header.state is not GenerationState.SEALED or header.tick != request.tick:
            raise ProtocolError(
                f"segment {request.index} does not hold a sealed generation {request.tick}"
            )
        if not fit.shelf.seal(client.rank, request.index, request.tick):
            raise ProtocolError(
                f"segment {request.index} was not granted for generation {request.tick}"
            )
        self._counts["sealed"] += 1
        await self._notify(fit)
        return m.Sealed(_generation(fit.shelf.committed()), fit.differ), []

    async def _drop(self, client: Connection, request: m.Drop) -> tuple[m.Message, list[int]]:
        fit = _fit(client)
        fit.shelf.drop(client.rank, request.tick)
        await self._notify(fit)
        return m.Done(), []

    def _fetch(self, client: Connection, request: m.Fetch) -> tuple[m.Message, list[int]]:
        fit = client.fit if request.fit is None else self._fits.get(request.fit)
        committed = None if fit is None else fit.shelf.committed(below=request.below or None)
        if fit is None or committed is None:
            client.read([])
            return m.Fetched(None), []
        indexes = fit.shelf.members_of(committed[0])
        if client.fit is None:
            client.read([fit.shelf.rank(rank).slots[i] for rank, i in indexes.items()])
        return m.Fetched(_generation(committed)), [fit.fds[rank, i] for rank, i in indexes.items()]

    async def _resume(self, client: Connection, request: m.Resume) -> tuple[m.Message, list[int]]:
        fit = _fit(client)
        fit.shelf.forget_after(client.rank, request.tick)
        fit.rewound()
        await self._notify(fit)
        return m.Done(), []

    async def _adopt(self, client: Connection, request: m.Adopt, fds: list[int]) -> m.Message:
        fit = _fit(client)
        if len(request.indexes) != len(fds):
            raise ProtocolError(f"{len(fds)} descriptors for {len(request.indexes)} segments")
        for index, fd in zip(request.indexes, fds, strict=True):
            key = (client.rank, index)
            shelf = fit.shelf.rank(client.rank)
            shelf.next_index = max(shelf.next_index, index + 1)
            if key in fit.fds:
                continue
            try:
                header = segment.read_header(fd)
            except IntegrityError as error:
                log.warning(
                    "segment %d of rank %d is not taken over: %s", index, client.rank, error
                )
                continue
            fit.fds[key] = os.dup(fd)
            shelf.slots[index] = _slot_of(header)
        await self._notify(fit)
        return m.Done()

    async def _leave(self, client: Connection, request: m.Leave) -> tuple[m.Message, list[int]]:
        fit = _fit(client)
        if fit.connected.get(client.rank) is client:
            del fit.connected[client.rank]
        client.fit = None
        if request.finished:
            fit.finished.add(client.rank)
        if fit.is_finished:
            if fit.persister is not None:
                await self._flush(fit)
            fit.release()
        await self._notify(fit)
        return m.Done(), []

    async def _flush_request(
        self, client: Connection, request: m.Flush
    ) -> tuple[m.Message, list[int]]:
        del request
        return m.Flushed(await self._flush(_fit(client))), []

    def _refuse_while_training(self) -> None:
        pids = [c.channel.pid for fit in self._fits.values() for c in fit.connected.values()]
        if pids:
            raise RunInUseError(
                f"run {self.paths.run_id} is training (process {', '.join(map(str, pids))}): end it first"
            )

    async def _rollback(self, request: m.Rollback) -> m.Message:
        async with contextlib.AsyncExitStack() as persisting:
            for fit in self._fits.values():
                if fit.persister is not None:
                    await persisting.enter_async_context(fit.persister.lock)
            self._refuse_while_training()
            for fit in self._fits.values():
                for rank, shelf in fit.shelf.ranks.items():
                    for index, slot in shelf.slots.items():
                        if slot.step > request.step:
                            fit.shelf.void(rank, index)
                fit.rewound()
        return m.Done()

    # --- commits ------------------------------------------------------------------------------

    async def _notify(self, fit: Fit) -> None:
        """Something changed: compare replicas of a new commit, persist it if due, wake waiters."""
        committed = fit.shelf.committed()
        if committed is not None and committed[0] > fit.checked:
            fit.checked, fit.committed_at = committed[0], self._clock.time()
            self._counts["committed"] += 1
            fit.differ = fit.differ or self._compare(fit, committed[0])
            self._persist_if_due(fit)
        for rank in fit.shelf.ranks:
            for index in fit.shelf.surplus(rank):
                self._release(fit, rank, index)
        async with self._changed:
            self._changed.notify_all()

    def _compare(self, fit: Fit, tick: int) -> str:
        """Where the replicas of generation ``tick`` differ by their witnesses, or ''."""
        metas = {}
        for rank, index in fit.shelf.members_of(tick).items():
            fd = fit.fds[rank, index]
            try:
                metas[rank] = segment.read_meta(fd, segment.read_header(fd))
            except IntegrityError as error:
                log.warning("rank %d, generation %d: %s", rank, tick, error)
                fit.shelf.rank(rank).slots[index].damaged = True
                return ""
        found = differing_replica(metas)
        if found:
            log.warning(
                "replicas differ at generation %d: %s; from now on every rank keeps a whole copy",
                tick,
                found,
            )
            for rank, index in fit.shelf.members_of(tick).items():
                fit.shelf.rank(rank).slots[index].damaged = True
        return found

    def _persist_if_due(self, fit: Fit) -> None:
        if fit.persister is not None and fit.persister.due():
            task = asyncio.get_running_loop().create_task(self._persist(fit))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _flush(self, fit: Fit) -> int:
        if fit.persister is None:
            return -1
        await self._persist(fit)
        return fit.persister.newest_step

    async def _persist(self, fit: Fit) -> None:
        persister = fit.persister
        assert persister is not None
        async with persister.lock:
            committed = fit.shelf.committed()
            if committed is None or committed[1] <= persister.newest_step:
                return
            held = fit.shelf.members_of(committed[0])
            slots = [fit.shelf.rank(rank).slots[index] for rank, index in held.items()]
            for slot in slots:
                slot.pins += 1
            try:
                fds = {rank: os.dup(fit.fds[rank, index]) for rank, index in held.items()}
                ok = await persister.write(committed[1], committed[0], fds)
                self._counts["persisted" if ok else "persist_failed"] += 1
            finally:
                for slot in slots:
                    slot.pins -= 1
        await self._notify(fit)

    # --- what there is to see -----------------------------------------------------------------

    def status(self) -> dict[str, Any]:
        """Everything that ``mnemo status`` shows, as plain data; sizes in bytes."""
        return {
            "run": self.paths.run_id,
            "pid": os.getpid(),
            "started": self._started,
            "keep_alive_s": self._keep_alive_s,
            "kept_for_s": None if math.isinf(left := self._seconds_to_live()) else max(left, 0.0),
            "clients": len(self._clients),
            "counts": dict(self._counts),
            "fits": [self._fit_status(fit) for fit in self._fits.values()],
        }

    def _fit_status(self, fit: Fit) -> dict[str, Any]:
        committed = fit.shelf.committed()
        return {
            "fit": fit.number,
            "finished": fit.is_finished,
            "members": fit.shelf.members,
            "connected": {rank: c.channel.pid for rank, c in fit.connected.items()},
            "committed": None
            if committed is None
            else {"tick": committed[0], "step": committed[1], "time": fit.committed_at},
            "differ": fit.differ,
            "memory": sum(s.size for r in fit.shelf.ranks.values() for s in r.slots.values()),
            "progress": fit.board.positions(),
            "persist": None if fit.persister is None else fit.persister.status(),
            "segments": [
                {
                    "rank": rank,
                    "index": i,
                    "state": s.state.name,
                    "tick": s.tick,
                    "step": s.step,
                    "bytes": s.size,
                }
                for rank, shelf in sorted(fit.shelf.ranks.items())
                for i, s in shelf.slots.items()
            ],
        }


def differing_replica(metas: dict[int, segment.Meta]) -> str:
    """Compare the digests that ranks computed of their own copies of shared chunks.

    Returns:
        Which rank differs in which tensor from the one that keeps the chunk, or ''.
    """
    own: dict[int, tuple[int, int]] = {}
    for rank, meta in metas.items():
        first = meta.shared_start // segment.CHUNK
        skip = -(-meta.own_size // segment.CHUNK)
        digests = struct.unpack(f"<{len(meta.digests) // 8}Q", meta.digests)
        for i, digest in enumerate(digests[skip:]):
            own[first + i] = (rank, digest)
    for rank, meta in metas.items():
        for chunk, digest in meta.witness.items():
            keeper = own.get(chunk)
            if keeper is not None and keeper[1] != digest:
                return f"rank {rank} differs from rank {keeper[0]} in {_tensor_at(meta, chunk)}"
    return ""


def _tensor_at(meta: segment.Meta, chunk: int) -> str:
    offset = page_own(meta) + chunk * segment.CHUNK
    for entry in meta.tensors:
        if entry.offset < offset + segment.CHUNK and entry.offset + entry.nbytes > offset:
            return entry.name
    return f"chunk {chunk}"


def page_own(meta: segment.Meta) -> int:
    """Where the shared part of the bulk space starts, bytes."""
    return -(-meta.own_size // segment.CHUNK) * segment.CHUNK


def _slot_of(header: segment.Header) -> Slot:
    if header.state is GenerationState.SEALED:
        return Slot(header.bulk_size, GenerationState.SEALED, header.tick, header.step)
    return Slot(header.bulk_size)


def _fit(client: Connection) -> Fit:
    assert client.fit is not None
    return client.fit


def _fd(fit: Fit, rank: int, index: int) -> int:
    fd = fit.fds.get((rank, index))
    if fd is None:
        raise ProtocolError(f"rank {rank} has no segment {index}")
    return fd


def _generation(pair: tuple[int, int] | None) -> m.Generation | None:
    return None if pair is None else m.Generation(*pair)


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"
