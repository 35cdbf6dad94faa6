"""The memory behind fragments: a node's segments as one sequence of bytes, and its parities.

Bytes go through a chunk that stays in the processor's cache rather than through a mapping, so the
process holds no pages of them, what fails its digest is never written, and whatever happens to a
descriptor's owner meanwhile is an error here and no signal.
"""

from __future__ import annotations

import asyncio
import os
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import Final

import numpy as np
import numpy.typing as npt
import xxhash
from msgspec import msgpack

from mnemo.errors import FragmentError, ProtectionError
from mnemo.protect.messages import Piece
from mnemo.protect.plan import Plan, page_up
from mnemo.protect.tasks import ended

_PAGE: Final = 4096
Table = npt.NDArray[np.uint64]
"""xxh3-64 of each chunk, fragments times chunks; 0 where a fragment has no bytes."""


class Shard:
    """The segments of one node's ranks, one after the other."""

    def __init__(self, pieces: Sequence[Piece], fds: Sequence[int]) -> None:
        """Describe what lies behind ``fds``, of which duplicates are kept until `close`.

        The first page of each is read now: whoever owns a segment may mark it as void at any time,
        without touching the rest.
        """
        self.pieces = tuple(pieces)
        self._starts = [0, *accumulate(page_up(piece.size) for piece in pieces)]
        self._fds = [os.dup(fd) for fd in fds]
        self._first_pages = [bytearray(os.pread(fd, _PAGE, 0)) for fd in fds]

    @property
    def size(self) -> int:
        """Bytes."""
        return self._starts[-1]

    def read(self, offset: int, into: memoryview) -> None:
        """Fill ``into`` with what lies at ``offset``; what no segment has is zeros."""
        for number, at, start, stop in self._extents(offset, len(into)):
            part = into[start:stop]
            kept = self._first_pages[number][at : at + len(part)]
            part[: len(kept)] = kept
            _read(self._fds[number], at + len(kept), part[len(kept) :], self.pieces[number].size)

    def write(self, offset: int, data: memoryview) -> None:
        """Put ``data`` to where `read` will find it."""
        for number, at, start, stop in self._extents(offset, len(data)):
            part = data[start:stop][: max(0, self.pieces[number].size - at)]
            _write(self._fds[number], at, part)
            if at < _PAGE:
                self._first_pages[number][at : at + len(part)] = part[: _PAGE - at]

    def _extents(self, offset: int, size: int) -> Iterator[tuple[int, int, int, int]]:
        """Segment, offset in it, and from where to where in the caller's bytes that is."""
        end, done = offset + size, offset
        while done < end:
            number = bisect_right(self._starts, done) - 1
            stop = min(end, self._starts[number + 1])
            yield number, done - self._starts[number], done - offset, stop - offset
            done = stop

    def close(self) -> None:
        """Let go of the descriptors."""
        for fd in self._fds:
            os.close(fd)
        self._fds = []


class Parities:
    """Memory for parities, reused: two sets, that of the last protected generation and a next."""

    def __init__(self, allocate: Callable[[int], int]) -> None:
        """Begin without any.

        Args:
            allocate: Makes so many bytes of memory and returns its descriptor, or raises
                `mnemo.errors.HostMemoryError`.
        """
        self._allocate = allocate
        self._free: list[int] = []
        self._used: set[int] = set()

    async def take(self, size: int) -> int:
        """A descriptor of at least ``size`` bytes of memory.

        Raises:
            HostMemoryError: There is not so much.
        """
        free, self._free = self._free, []
        fitting = [fd for fd in free if os.fstat(fd).st_size >= size]
        for fd in free:
            if fd not in fitting[:1]:
                os.close(fd)
        if fitting:
            fd = fitting[0]
        else:
            made = asyncio.ensure_future(asyncio.to_thread(self._allocate, size))
            try:
                await ended(made)
            except asyncio.CancelledError:
                if not made.exception():
                    self._free.append(made.result())
                raise
            fd = made.result()
        self._used.add(fd)
        return fd

    def give_back(self, fd: int) -> None:
        """It is free again."""
        self._used.discard(fd)
        self._free.append(fd)

    @property
    def memory(self) -> int:
        """Bytes of all of them."""
        return sum(os.fstat(fd).st_size for fd in (*self._free, *self._used))

    def close(self) -> None:
        """Give all memory back."""
        for fd in (*self._free, *self._used):
            os.close(fd)
        self._free, self._used = [], set()


class Fragments:
    """One node's part of one generation: its own shard, its parities, everybody's digests."""

    def __init__(self, plan: Plan, position: int, shard: Shard, parity: int) -> None:
        """Take over ``shard``.

        Args:
            plan: The layout.
            position: Of this node in the group.
            shard: Its segments, or those that are to become them.
            parity: Descriptor of memory for its parities.

        Raises:
            ProtectionError: The shard is not what the plan says.
        """
        if shard.pieces != plan.generation.shards[position]:
            raise ProtectionError(
                f"epoch {plan.generation.epoch}: this node's shard has {shard.size} bytes, and the "
                f"group was told {plan.sizes[position]}"
            )
        self.plan = plan
        self.position = position
        self.shard = shard
        self.parity = parity
        self.tables: dict[int, Table] = {}
        """Digests by stripe."""
        self.unchanged = 0.0
        """Share of the group's data that the generation protected before had as well, if known."""
        self._closed = False

    @property
    def is_whole(self) -> bool:
        """Whether all stripes are done, here and at their hubs."""
        return len(self.tables) == len(self.plan.group.nodes)

    def read(self, stripe: int, chunk: int, into: memoryview) -> None:
        """Fill ``into`` with the beginning of a chunk of this node's fragment of ``stripe``.

        Raises:
            FragmentError: It is kept no more.
        """
        is_parity, offset = self._find(stripe, chunk)
        if is_parity:
            _read(self.parity, offset, into, offset + len(into))
        else:
            self.shard.read(offset, into)

    def write(self, stripe: int, chunk: int, data: memoryview) -> None:
        """Store a chunk of this node's fragment of ``stripe``.

        Raises:
            FragmentError: It is kept no more.
        """
        is_parity, offset = self._find(stripe, chunk)
        if is_parity:
            _write(self.parity, offset, data)
        else:
            self.shard.write(offset, data)

    def _find(self, stripe: int, chunk: int) -> tuple[bool, int]:
        plan = self.plan
        if self._closed:
            raise FragmentError(f"epoch {plan.generation.epoch} is kept here no more")
        within = chunk * plan.generation.chunk
        if plan.index_of(self.position, stripe) >= plan.group.code.k:
            return True, plan.parity_offset(self.position, stripe) + within
        return False, plan.shard_offset(self.position, stripe) + within

    def take_table(self, stripe: int, payload: memoryview) -> Table:
        """Note the digests of a stripe as its hub sent them."""
        shape = (self.plan.group.code.n, self.plan.chunks(stripe))
        table: Table = np.frombuffer(payload, "<u8").reshape(shape)
        self.tables[stripe] = table
        return table

    def all_digests(self) -> bytes:
        """Those of all stripes, in order."""
        return b"".join(self.tables[stripe].tobytes() for stripe in sorted(self.tables))

    def take_all_digests(self, payload: memoryview) -> None:
        """Note what `all_digests` gave elsewhere."""
        start = 0
        for stripe in range(len(self.plan.group.nodes)):
            stop = start + self.plan.digest_bytes(stripe)
            self.take_table(stripe, payload[start:stop])
            start = stop

    def compare(self, before: Fragments) -> None:
        """Set `unchanged` by the digests of the generation before, which has to be like this."""
        k = self.plan.group.code.k
        chunks = same = 0
        for stripe, table in self.tables.items():
            data, old = table[:k], before.tables[stripe][:k]
            chunks += int(np.count_nonzero(data))
            same += int(np.count_nonzero((data == old) & (data != 0)))
        self.unchanged = same / chunks

    @property
    def seal(self) -> bytes:
        """A digest of all that is known of the generation, equal on all nodes."""
        return seal_of(self.plan, self.all_digests())

    def close(self) -> int:
        """Let go of the shard; return the descriptor of the parities."""
        self._closed = True
        self.shard.close()
        return self.parity


def seal_of(plan: Plan, digests: bytes | memoryview) -> bytes:
    """See `Fragments.seal`."""
    whole = xxhash.xxh3_128(msgpack.encode(plan.generation))
    whole.update(digests)
    return whole.digest()


def _read(fd: int, offset: int, into: memoryview, end: int) -> None:
    """Read up to ``end``; zeros for the rest."""
    wanted = max(0, min(len(into), end - offset))
    done = 0
    while done < wanted:
        count = os.preadv(fd, [into[done:wanted]], offset + done)
        if not count:
            break
        done += count
    into[done:] = bytes(len(into) - done)


def _write(fd: int, offset: int, data: memoryview) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(fd, data[done:], offset + done)
