"""Takes snapshots in the background of the step that follows.

Parameters and optimizer state change only in the optimizer's update, so what `capture` lists after
one update may be copied until the next. `before_update` is called right before that and waits for
the copy; the time it waits is the *stall*. That nothing was written meanwhile is checked by each
tensor's ``_version``, and where asked by hashing the source beforehand: a tensor that was written
voids the snapshot and is copied at once from then on.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import mmap
import os
import queue
import threading
import time
from collections.abc import Callable, Collection, Iterator
from typing import Final

import numpy as np
import torch

from mnemo import faults
from mnemo.errors import MnemoError, SnapshotError
from mnemo.smp import messages as m
from mnemo.smp import segment
from mnemo.smp.link import Link
from mnemo.smp.segment import CHUNK, PAGE
from mnemo.snapshot import copier, tree
from mnemo.snapshot.job import CancelledError, Counters, Job
from mnemo.snapshot.layout import Bytes, Share
from mnemo.snapshot.plan import CopyPlan, plan_for
from mnemo.transport import auth

log = logging.getLogger("mnemo")

GRANT_LIMIT_S: Final = 1.0
"""How long an update waits for a buffer to become free before that snapshot is given up."""
_CLOSE_LIMIT_S: Final = 10.0
_LOOK_S: Final = 0.5
"""How often to see whether the SMP lives, while there is nothing to copy."""
_MADV_POPULATE_WRITE: Final = 23
_FIRST_VERIFIED: Final = 3
_VERIFY_EVERY: Final = 64
_WITNESS_ROUNDS: Final = 64


class SnapshotEngine:
    """Snapshots of one rank. `capture` and `before_update` are called by the training thread."""

    def __init__(
        self,
        link: Link,
        share: Share,
        *,
        rank: int,
        secret: bytes,
        identity: dict[str, str],
        drop_on_overrun: bool = False,
        verify: bool = False,
        on_event: Callable[[str, str], None] | None = None,
    ) -> None:
        """Start the copy thread.

        Args:
            link: Connection to the SMP.
            share: Which part of the replicated state this rank copies.
            rank: This rank.
            secret: The run's secret, for the MAC of the small state.
            identity: Fingerprints stored with every generation.
            drop_on_overrun: Give a snapshot up rather than let an update wait for it.
            verify: Hash what is to be copied when a snapshot is taken, and compare.
            on_event: Told of degradations, as ``(kind, words)``.
        """
        self._link = link
        self._share = share
        self._rank = rank
        self._secret = secret
        self._identity = identity
        self._drop_on_overrun = drop_on_overrun
        self._verify = verify
        self._on_event = on_event or (lambda kind, words: log.warning("%s: %s", kind, words))
        self._plan: CopyPlan | None = None
        self._parts: dict[str, tree.Part] = {}
        self._at_once: set[str] = set()
        self._maps: dict[int, Bytes] = {}
        self._inodes: dict[int, int] = {}
        self._job: Job | None = None
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._not_stored = self._not_protected = ""
        self._told_dropped = 0
        """Of the counter, what the SMP knows."""
        self.counters = Counters()
        self.committed: m.Generation | None = None
        """Newest generation that all ranks have sealed, as far as this rank was told."""
        self._thread = threading.Thread(target=self._work, name="mnemo-copy", daemon=True)
        self._thread.start()

    # --- the training thread ------------------------------------------------------------------

    def capture(
        self,
        tick: int,
        step: int,
        state: object,
        position: dict[str, int],
        *,
        volatile: Collection[int] = (),
        watch: tuple[str, ...] = (),
    ) -> None:
        """Take generation ``tick`` of ``state``, of which the large tensors are copied later.

        Args:
            tick: Number of the generation, the same on all ranks, growing.
            step: Optimizer steps done.
            state: Nested dicts, lists, tuples, tensors by reference; or that, taken apart.
            position: Where the run is, for people and for counting lost steps.
            volatile: ``data_ptr`` of tensors that may change before the next update (buffers).
            watch: Path prefixes of tensors that must be finite; else the snapshot is suspect.
        """
        begun = time.perf_counter()
        self.before_update()
        if self._job is not None and self._job.cancelled and not self._job.done.is_set():
            self.counters.dropped += 1  # it still waits for a buffer: so would this one
            return
        taken = state if isinstance(state, tree.TakenApart) else tree.take_apart(state, self._parts)
        plan, tensors = plan_for(self._plan, taken, volatile, watch, self._at_once)
        self._plan = plan
        for target, source in plan.own_moves():
            if isinstance(source, torch.Tensor):
                torch.from_numpy(target).copy_(source)
            else:
                np.copyto(target, source)
        shared = plan.shared_of(tensors)
        count = self.counters.captured
        verify = self._verify or count < _FIRST_VERIFIED or count % _VERIFY_EVERY == 0
        versions = [t._version for t in shared]
        before = None
        if verify:
            bounds = self._share.bounds(plan.layout.shared_size)
            before = [copier.hash_chunk(chunk) for chunk in plan.chunks_of(*bounds)]
        self._job = Job(tick, step, plan, taken.pack(), position, shared, versions, before)
        self.counters.captured += 1
        self._jobs.put(self._job)
        self.counters.capture_s += time.perf_counter() - begun

    def before_update(self) -> float:
        """Wait until the tensors may change; the seconds waited."""
        job = self._job
        if job is None or job.copied.is_set():
            return 0.0
        begun = time.perf_counter()
        if self._drop_on_overrun or not job.granted.wait(GRANT_LIMIT_S):
            job.give_up()
        job.copied.wait()
        waited = time.perf_counter() - begun
        self.counters.stall_s += waited
        return waited

    def finish(self, timeout_s: float) -> bool:
        """Wait until the newest snapshot is sealed or given up; False if it takes too long."""
        job = self._job
        if job is None:
            return True
        if not job.granted.wait(timeout_s) and job.give_up():
            return True
        return job.done.wait(timeout_s)

    def close(self, timeout_s: float = _CLOSE_LIMIT_S) -> bool:
        """End the copy thread; False if it still waits for the SMP. The link stays open."""
        self._jobs.put(None)
        self._thread.join(min(timeout_s, _CLOSE_LIMIT_S))
        if self._thread.is_alive():
            return False  # nothing is lost with it
        self._plan = self._job = None
        self._drop_maps(set())
        return True

    # --- the copy thread ----------------------------------------------------------------------

    def _work(self) -> None:
        while (job := self._next_job()) is not None:
            try:
                self._take(job)
            except CancelledError:
                self.counters.dropped += 1
                self._tell_dropped(job)
            except MnemoError as error:
                self.counters.failed += 1
                job.copied.set()
                self._on_event("snapshot failed", f"step {job.step}: {error}")
                self._tell_dropped(job)
            except Exception as error:
                self.counters.failed += 1
                job.copied.set()
                log.exception("snapshot of step %d failed", job.step)
                self._on_event(
                    "snapshot failed", f"step {job.step}: {type(error).__name__}: {error}"
                )
                self._tell_dropped(job)
            finally:
                job.tensors = []
                job.granted.set()
                job.copied.set()
                job.done.set()

    def _next_job(self) -> Job | None:
        """Wait for work; meanwhile see to it that somebody else holds the memory too."""
        while True:
            with contextlib.suppress(queue.Empty):
                return self._jobs.get(timeout=_LOOK_S)
            try:
                self._link.look()
            except Exception:
                log.exception("the snapshot process could not be looked after")

    def _take(self, job: Job) -> None:
        layout = job.plan.layout
        start, stop = self._share.bounds(layout.shared_size)
        size = layout.own_padded + stop - start
        skipped, self._told_dropped = (
            self.counters.dropped - self._told_dropped,
            (self.counters.dropped),
        )
        granted, fds = self._link.ask(m.Begin(job.tick, job.step, size, skipped), m.Granted)
        bulk = self._map(granted, fds[0], size)
        job.start()
        if not granted.shard and self._share.replicas > 1:
            self._share = Share(0, 1)
            raise SnapshotError("replicas differ: from now on every rank keeps a whole copy")
        fd = fds[0]
        begun = time.perf_counter()
        inode = self._inodes[granted.index]
        chunks, (own_job, shared_job) = job.plan.moves(bulk, inode, start, stop)
        own, _ = copier.copy(own_job)
        shared, finite = copier.copy(self._unless_cancelled(job, shared_job))
        witness = self._witness(job.plan, start // CHUNK, -(-stop // CHUNK))
        self._check_untouched(job, chunks, shared)
        self.counters.copy_s = time.perf_counter() - begun
        job.copied.set()
        if not finite:
            self.counters.suspect += 1
            self._on_event(
                "suspect",
                f"step {job.step} has non-finite parameters: the snapshot before it is kept",
            )
            raise CancelledError("non-finite parameters")
        faults.reach("seal", step=job.step)
        self._seal(job, granted.index, fd, size, (start, stop), own + shared, witness)

    def _seal(
        self,
        job: Job,
        index: int,
        fd: int,
        size: int,
        share: tuple[int, int],
        digests: bytes,
        witness: dict[int, int],
    ) -> None:
        layout = job.plan.layout
        if job.cancelled:
            raise CancelledError("given up before it was sealed")
        meta = segment.Meta(
            rank=self._rank,
            members=self._share.replicas,
            tensors=layout.entries,
            own_size=layout.own_size,
            shared_start=share[0],
            shared_stop=share[1],
            total=layout.total,
            digests=digests,
            small=job.small,
            small_mac=auth.mac(self._secret, "small", job.small),
            identity=self._identity,
            position=job.position,
            witness=witness,
        )
        segment.seal(fd, job.tick, job.step, size, meta)
        sealed, _ = self._link.ask(m.Seal(index, job.tick), m.Sealed)
        self.counters.sealed += 1
        self.committed = sealed.committed or self.committed
        if sealed.not_stored and not self._not_stored and self._rank == 0:
            self._on_event("persist failed", sealed.not_stored)
        self._not_stored = sealed.not_stored
        if sealed.not_protected and not self._not_protected and self._rank == 0:
            self._on_event("not protected", sealed.not_protected)
        self._not_protected = sealed.not_protected
        if sealed.differ and self._share.replicas > 1:
            self._share = Share(0, 1)
            self._on_event(
                "replicas differ", f"{sealed.differ}: from now on every rank keeps a whole copy"
            )

    def _map(self, granted: m.Granted, fd: int, size: int) -> Bytes:
        """The bulk of the granted segment, mapped once and kept; ``fd`` is this object's now."""
        inode = os.fstat(fd).st_ino
        self._drop_maps(
            {i for i in granted.live if i != granted.index or self._inodes.get(i) == inode}
        )
        self._link.hold(granted.index, fd)
        view = self._maps.get(granted.index)
        if view is None:
            mapped = mmap.mmap(fd, PAGE + segment.page_up(size))
            view = self._maps[granted.index] = np.frombuffer(
                mapped, dtype=np.uint8, count=size, offset=PAGE
            )
            self._inodes[granted.index] = inode
            _populate(view)
        return view

    def _drop_maps(self, keep: set[int]) -> None:
        """Unmap segments that are no more, so that their memory is given back."""
        for index in [i for i in self._maps if i not in keep]:
            if self._plan is not None:
                self._plan.jobs.pop(self._inodes[index], None)
            del self._maps[index], self._inodes[index]
        self._link.forget(set(self._maps))

    @staticmethod
    def _unless_cancelled(
        job: Job, chunks: copier.Job
    ) -> Iterator[tuple[Bytes, list[copier.Move]]]:
        for i, chunk in enumerate(chunks):
            if job.cancelled:
                raise CancelledError("the update did not wait")
            if i == len(chunks) // 2:
                faults.reach("mid_copy", step=job.step)
            yield chunk

    def _witness(self, plan: CopyPlan, first: int, stop: int) -> dict[int, int]:
        """Digests of chunks that other replicas copy: of all at first, then of a few in turn."""
        if self._share.replicas == 1 or plan.chunks is None:
            return {}
        others = [i for i in range(len(plan.chunks)) if not first <= i < stop]
        chosen = (
            others
            if plan.witnessed == 0
            else others[plan.witnessed % _WITNESS_ROUNDS :: _WITNESS_ROUNDS]
        )
        plan.witnessed += 1
        return {i: copier.hash_chunk(plan.chunks[i]) for i in chosen}

    def _check_untouched(self, job: Job, chunks: list[list[copier.Piece]], digests: bytes) -> None:
        """Nothing was written while it was being copied, or the snapshot is void."""
        names = [job.plan.names[i] for i in job.plan.shared]
        touched = [
            n for n, t, v in zip(names, job.tensors, job.versions, strict=True) if t._version != v
        ]
        if job.before is not None and not touched:
            for i, (chunk, before) in enumerate(zip(chunks, job.before, strict=True)):
                if before.to_bytes(8, "little") != digests[8 * i : 8 * i + 8]:
                    touched += job.plan.names_in(chunk)
        if reshaped := job.plan.reshaped():  # looked for here: it costs the training thread nothing
            self._plan = None
            raise SnapshotError(
                f"{reshaped[0]} has another shape, layout or type in the same memory: this "
                "snapshot is void, the next one takes it as it is"
            )
        if touched:
            self._at_once.update(touched)
            self._plan = None
            self.counters.torn += 1
            more = f" and {len(touched) - 1} more" if len(touched) > 1 else ""
            raise SnapshotError(
                f"{touched[0]}{more} was written while it was being copied, between two updates; "
                "it is copied at once from now on, which stalls the step"
            )

    def _tell_dropped(self, job: Job) -> None:
        try:
            self._link.ask(m.Drop(job.tick), m.Done)
        except MnemoError as error:
            log.debug("generation %d could not be given up: %s", job.tick, error)


def _populate(view: Bytes) -> None:
    """Fault the pages in before the first copy does so one by one; only speed is at stake.

    Through ctypes because `mmap.mmap.madvise` would hold the GIL for as long as it takes.
    """
    start = view.ctypes.data - view.ctypes.data % PAGE
    length = view.ctypes.data + view.nbytes - start
    ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), _MADV_POPULATE_WRITE)
