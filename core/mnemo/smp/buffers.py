"""The memory of one training's snapshots: segments made, looked into, voided, given back.

What each of them is for is decided by `mnemo.smp.shelf`; here they are descriptors.
"""

from __future__ import annotations

import os

from mnemo.errors import HostMemoryError
from mnemo.smp import segment
from mnemo.smp.memory import memory_limit

Key = tuple[int, int]
"""Rank, and the index of one of its segments."""


def require_room(size: int, buffers: int, members: int, *, parities: int, held: int) -> None:
    """Make sure that ``members`` ranks can have ``buffers`` segments of ``size`` bytes each.

    Args:
        size: Bytes of one segment.
        buffers: Segments of one rank.
        members: Ranks.
        parities: Bytes of other nodes' parities.
        held: Bytes of all these that there are already.

    Raises:
        HostMemoryError: They do not fit; the message has the numbers.
    """
    wanted = size * buffers * members + parities
    limit = memory_limit()
    if wanted - held > limit.available:
        raise HostMemoryError(
            f"{buffers} snapshot buffers of {_size(size)} for {members} ranks"
            f"{f' and parities of {_size(parities)} for other nodes' if parities else ''} need "
            f"{_size(wanted)}; the {limit.bound} has {_size(limit.available)} of "
            f"{_size(limit.total)} left. "
            "Shard replicas (snapshot.shard_replicas), or raise the limit"
        )


class Buffers:
    """The descriptors of a training's segments, which are this object's to close.

    Args:
        name: What the segments are called in ``/proc``, before the rank.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._fds: dict[Key, int] = {}

    def __contains__(self, key: Key) -> bool:
        return key in self._fds

    def __getitem__(self, key: Key) -> int:
        return self._fds[key]

    def create(self, rank: int, size: int) -> int:
        """A new segment's descriptor, not kept yet. Blocks for as long as the memory is filled.

        Raises:
            HostMemoryError: It does not fit.
        """
        limit = memory_limit()
        if size > limit.available:
            raise HostMemoryError(
                f"a snapshot buffer of {_size(size)} for rank {rank} does not fit: the "
                f"{limit.bound} has {_size(limit.available)} of {_size(limit.total)} left"
            )
        try:
            return segment.create(f"{self._name}:{rank}"[:200], size)
        except OSError as error:
            raise HostMemoryError(
                f"a snapshot buffer of {_size(size)} could not be made: {error.strerror}"
            ) from error

    def keep(self, key: Key, fd: int) -> None:
        """Own ``fd`` from here on."""
        self._fds[key] = fd

    def header(self, key: Key) -> segment.Header:
        """What a segment says of itself.

        Raises:
            IntegrityError: It is damaged.
        """
        return segment.read_header(self._fds[key])

    def meta(self, key: Key) -> segment.Meta:
        """What a sealed segment says of its bulk.

        Raises:
            IntegrityError: It is damaged.
        """
        return segment.read_meta(self._fds[key], self.header(key))

    def begin(self, key: Key, tick: int, step: int, size: int) -> None:
        """Mark a segment as being written: from here on it holds nothing."""
        segment.begin(self._fds[key], tick, step, size)

    def close(self, key: Key) -> None:
        """Give a segment's memory back, unless somebody else holds it too."""
        os.close(self._fds.pop(key))


def _size(size: int) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"
