"""Puts one rank's state together from the segments of a generation.

Every chunk is checked against its digest on the way, in the pass that copies it.
"""

from __future__ import annotations

import bisect
import os
import pickle
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import torch
import xxhash

from mnemo.errors import IntegrityError
from mnemo.smp import segment
from mnemo.smp.segment import CHUNK, PAGE, Header, Meta, TensorEntry
from mnemo.snapshot import tree
from mnemo.snapshot.layout import Bytes, rebuild
from mnemo.transport import auth
from mnemo.types import GenerationState

_THREADS = 2
_STRETCH = 64 << 20
"""Bytes of tensors that share one allocation, and are freed together."""
_ALIGN = 64
_MOST_BUFFERS = 1024
"""IOV_MAX: buffers that one system call fills."""
_UNREADABLE = (
    pickle.UnpicklingError,
    msgspec.MsgspecError,
    EOFError,
    AttributeError,
    LookupError,
    ImportError,
    RuntimeError,
)


@dataclass(frozen=True)
class Source:
    """One rank's segment, wherever its bytes lie."""

    header: Header
    meta: Meta
    read: Callable[[int, list[Bytes]], None]
    """Fill buffers, one after the other, with the bulk's bytes from an offset on."""

    @classmethod
    def of_fd(cls, fd: int) -> Source:
        """A segment in memory, as long as ``fd`` is open.

        Its bytes are read rather than mapped: the kernel's copy into fresh memory costs less than
        the faults of a mapping (``docs/adr/0003``).

        Raises:
            IntegrityError: Not sealed, or damaged.
        """
        header = segment.read_header(fd)
        _require_sealed(header)

        def read(offset: int, targets: list[Bytes]) -> None:
            for i in range(0, len(targets), _MOST_BUFFERS):
                part = [target.data for target in targets[i : i + _MOST_BUFFERS]]
                wanted = sum(len(t) for t in part)
                if os.preadv(fd, part, PAGE + offset) != wanted:
                    raise IntegrityError(f"the snapshot of step {header.step} is cut off")
                offset += wanted

        return cls(header, segment.read_meta(fd, header), read)

    @classmethod
    def of_bytes(cls, raw: memoryview) -> Source:
        """A segment read from storage.

        Raises:
            IntegrityError: Not sealed, or damaged.
        """
        header = segment.decode_header(bytes(raw[:PAGE]))
        _require_sealed(header)
        meta = segment.decode_meta(bytes(raw[header.meta_offset : header.size]), header)
        bulk: Bytes = np.frombuffer(raw, dtype=np.uint8)[PAGE : PAGE + header.bulk_size]

        def read(offset: int, targets: list[Bytes]) -> None:
            for target in targets:
                np.copyto(target, bulk[offset : offset + len(target)])
                offset += len(target)

        return cls(header, meta, read)

    @property
    def shared_offset(self) -> int:
        """Where the shared part of the bulk space begins for this rank."""
        return -(-self.meta.own_size // CHUNK) * CHUNK


def _require_sealed(header: Header) -> None:
    if header.state is not GenerationState.SEALED:
        raise IntegrityError(f"the snapshot of step {header.step} was never completed")


def read_state(
    sources: Mapping[int, Source],
    rank: int,
    secret: bytes | None,
    tensors: list[Bytes] | None = None,
) -> Any:
    """The nested state that ``rank`` captured.

    Args:
        sources: Segments of the generation by rank. Only its own is needed if that is whole.
        rank: Whose state.
        secret: The run's secret, to check the MAC of the small part; None where the bytes come
            from the user's own storage and no secret outlived the run.
        tensors: What `read_tensors` has read of these very segments before.

    Raises:
        IntegrityError: Bytes fail their checksum or MAC, or a part is missing.
    """
    mine = sources.get(rank)
    if mine is None:
        raise IntegrityError(f"the generation holds nothing of rank {rank}")
    trusted = secret is None or mine.meta.small_mac == auth.mac(secret, "small", mine.meta.small)
    if not trusted:
        raise IntegrityError(
            f"the small state of rank {rank} at step {mine.header.step} fails its MAC"
        )
    memory = read_tensors(sources, rank) if tensors is None else tensors
    entries = mine.meta.tensors
    try:
        return tree.unpack(
            mine.meta.small,
            lambda i: rebuild(entries[i], torch.from_numpy(memory[i])),
            trusted=True,
        )
    except _UNREADABLE as error:
        raise IntegrityError(
            f"the small state of rank {rank} at step {mine.header.step} cannot be opened: {error}"
        ) from error


def read_tensors(sources: Mapping[int, Source], rank: int) -> list[Bytes]:
    """Fresh memory of every tensor that ``rank`` captured, filled and checked.

    Args:
        sources: Segments of the generation by rank, that of ``rank`` among them.
        rank: Whose state.

    Raises:
        IntegrityError: Bytes fail their checksum, or a part is missing.
    """
    mine = sources[rank]
    return _gather(mine.meta, [mine, *(s for r, s in sources.items() if r != rank)])


def _gather(meta: Meta, sources: list[Source]) -> list[Bytes]:
    """Fresh memory of every tensor, filled from the chunks of all sources; the first is ours."""
    memory = _allocate(meta.tensors)
    order = sorted(range(len(memory)), key=lambda i: meta.tensors[i].offset)
    starts = [meta.tensors[i].offset for i in order]
    shared = meta.total - sources[0].shared_offset
    missing = sum(entry.nbytes for entry in meta.tensors)
    covered: set[int] = set()

    def fill(source: Source, index: int, place: int) -> int:
        """Read chunk ``index`` of a source, which lies at ``place`` of our bulk space; check it."""
        size = min(CHUNK, source.header.bulk_size - index * CHUNK)
        targets, found = _targets(meta.tensors, order, starts, memory, place, size)
        source.read(index * CHUNK, targets)
        digest = xxhash.xxh3_64()
        for target in targets:
            digest.update(target.data)
        if not segment.is_digest(source.meta.digests, index, digest.intdigest()):
            raise IntegrityError(
                f"chunk {index} of rank {source.meta.rank}'s snapshot of step "
                f"{source.header.step} fails its checksum"
            )
        return found

    with ThreadPoolExecutor(_THREADS) as pool:
        for source in sources:
            if missing == 0:
                break
            if source.meta.total - source.shared_offset != shared:
                raise IntegrityError(
                    f"rank {source.meta.rank} shares out another state than rank {meta.rank}"
                )
            jobs = []
            for index, start in enumerate(range(0, source.header.bulk_size, CHUNK)):
                place = start
                if start >= source.shared_offset:
                    place = start - source.shared_offset + source.meta.shared_start
                    place += sources[0].shared_offset
                elif source is not sources[0]:
                    continue  # what only the other rank has
                if place not in covered:
                    covered.add(place)
                    jobs.append((source, index, place))
            share = -(-len(jobs) // _THREADS) or 1
            parts = [jobs[i : i + share] for i in range(0, len(jobs), share)]
            missing -= sum(pool.map(lambda part: sum(fill(*job) for job in part), parts))
    if missing:
        raise IntegrityError(
            f"{missing} bytes of rank {meta.rank}'s state are in no segment of the generation"
        )
    return memory


def _allocate(entries: tuple[TensorEntry, ...]) -> list[Bytes]:
    """Memory for every tensor, neighbours in one stretch: most of it is then huge pages."""
    memory: list[Bytes] = []
    places: list[tuple[int, int]] = []
    size = 0
    for i, entry in enumerate(entries):
        places.append((size, size + entry.nbytes))
        size += -(-entry.nbytes // _ALIGN) * _ALIGN
        if size >= _STRETCH or i == len(entries) - 1:
            stretch = np.empty(size, dtype=np.uint8)
            memory += [stretch[start:stop] for start, stop in places]
            places, size = [], 0
    return memory


def _targets(
    entries: tuple[TensorEntry, ...],
    order: list[int],
    starts: list[int],
    memory: list[Bytes],
    offset: int,
    size: int,
) -> tuple[list[Bytes], int]:
    """Where the bytes ``[offset, offset + size)`` of the bulk space go, gaps included.

    Returns:
        Buffers of ``size`` bytes in all, and how many of them belong to tensors.
    """
    targets: list[Bytes] = []
    end, cursor, found = offset + size, offset, 0
    position = max(0, bisect.bisect_right(starts, offset) - 1)
    while position < len(order) and starts[position] < end:
        entry = entries[order[position]]
        begin, stop = max(entry.offset, offset), min(entry.offset + entry.nbytes, end)
        if begin < stop:
            if begin > cursor:
                targets.append(np.empty(begin - cursor, dtype=np.uint8))
            inside = begin - entry.offset
            targets.append(memory[order[position]][inside : inside + stop - begin])
            found += stop - begin
            cursor = stop
        position += 1
    if cursor < end:
        targets.append(np.empty(end - cursor, dtype=np.uint8))
    return targets, found
