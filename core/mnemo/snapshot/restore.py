"""Puts one rank's state together from the segments of a generation.

Every chunk is checked against its digest on the way, in the pass that copies it.
"""

from __future__ import annotations

import mmap
import os
import pickle
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import torch

from mnemo.errors import IntegrityError
from mnemo.smp import segment
from mnemo.smp.segment import CHUNK, PAGE, Header, Meta, TensorEntry
from mnemo.snapshot import tree
from mnemo.snapshot.layout import Bytes, rebuild
from mnemo.transport import auth
from mnemo.types import GenerationState

_UNREADABLE = (
    pickle.UnpicklingError,
    msgspec.MsgspecError,
    EOFError,
    AttributeError,
    ImportError,
    RuntimeError,
)


@dataclass(frozen=True)
class Source:
    """One rank's segment, wherever its bytes lie."""

    header: Header
    meta: Meta
    bulk: memoryview

    @classmethod
    def of_fd(cls, fd: int) -> Source:
        """A segment in memory; the mapping lives as long as the object.

        Raises:
            IntegrityError: Not sealed, or damaged.
        """
        header = segment.read_header(fd)
        _require_sealed(header)
        meta = segment.read_meta(fd, header)
        view = memoryview(mmap.mmap(fd, os.fstat(fd).st_size, prot=mmap.PROT_READ))
        return cls(header, meta, view[PAGE : PAGE + header.bulk_size])

    @classmethod
    def of_bytes(cls, raw: memoryview) -> Source:
        """A segment read from storage.

        Raises:
            IntegrityError: Not sealed, or damaged.
        """
        header = segment.decode_header(bytes(raw[:PAGE]))
        _require_sealed(header)
        meta = segment.decode_meta(bytes(raw[header.meta_offset : header.size]), header)
        return cls(header, meta, raw[PAGE : PAGE + header.bulk_size])

    def chunks(self) -> Iterator[tuple[int, memoryview]]:
        """Checked chunks and where each lies in the bulk space.

        Raises:
            IntegrityError: A chunk fails its checksum.
        """
        meta = self.meta
        padded = -(-meta.own_size // CHUNK) * CHUNK
        for index, start in enumerate(range(0, self.header.bulk_size, CHUNK)):
            chunk = self.bulk[start : start + CHUNK]
            if not segment.verify_chunk(meta.digests, index, chunk):
                raise IntegrityError(
                    f"chunk {index} of rank {meta.rank}'s snapshot of step {self.header.step} fails its checksum"
                )
            yield (start if start < padded else start + meta.shared_start), chunk


def _require_sealed(header: Header) -> None:
    if header.state is not GenerationState.SEALED:
        raise IntegrityError(f"the snapshot of step {header.step} was never completed")


def read_state(sources: Mapping[int, Source], rank: int, secret: bytes | None) -> Any:
    """The nested state that ``rank`` captured.

    Args:
        sources: Segments of the generation by rank. Only its own is needed if that is whole.
        rank: Whose state.
        secret: The run's secret, to check the MAC of the small part; None where the bytes come
            from the user's own storage and no secret outlived the run.

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
    memory = _gather(mine.meta, [mine, *(s for r, s in sources.items() if r != rank)])
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


def _gather(meta: Meta, sources: list[Source]) -> list[Bytes]:
    """Fresh memory of every tensor, filled from the chunks of all sources."""
    memory: list[Bytes] = [np.empty(entry.nbytes, dtype=np.uint8) for entry in meta.tensors]
    order = sorted(range(len(memory)), key=lambda i: meta.tensors[i].offset)
    starts = [meta.tensors[i].offset for i in order]
    padded = -(-meta.own_size // CHUNK) * CHUNK
    missing = sum(entry.nbytes for entry in meta.tensors)
    for number, source in enumerate(sources):
        if missing == 0:
            break
        if (
            number
            and source.meta.tensors
            and source.meta.total - _padded(source.meta) != meta.total - padded
        ):
            raise IntegrityError(
                f"rank {source.meta.rank} shares out another state than rank {meta.rank}"
            )
        for place, chunk in source.chunks():
            offset = place
            if number:  # another rank's: only the shared part counts, from where ours begins
                if place < _padded(source.meta):
                    continue
                offset = place - _padded(source.meta) + padded
            missing -= _scatter(meta.tensors, order, starts, memory, offset, chunk)
    if missing:
        raise IntegrityError(
            f"{missing} bytes of rank {meta.rank}'s state are in no segment of the generation"
        )
    return memory


def _padded(meta: Meta) -> int:
    return -(-meta.own_size // CHUNK) * CHUNK


def _scatter(
    entries: tuple[TensorEntry, ...],
    order: list[int],
    starts: list[int],
    memory: list[Bytes],
    offset: int,
    chunk: memoryview,
) -> int:
    """Copy what tensors have in ``chunk``, which lies at ``offset``; the bytes copied."""
    source: Bytes = np.frombuffer(chunk, dtype=np.uint8)
    end = offset + len(source)
    position = max(0, int(np.searchsorted(starts, offset, side="right")) - 1)
    copied = 0
    while position < len(order) and starts[position] < end:
        entry = entries[order[position]]
        begin, stop = max(entry.offset, offset), min(entry.offset + entry.nbytes, end)
        if begin < stop:
            np.copyto(
                memory[order[position]][begin - entry.offset : stop - entry.offset],
                source[begin - offset : stop - offset],
            )
            copied += stop - begin
        position += 1
    return copied
