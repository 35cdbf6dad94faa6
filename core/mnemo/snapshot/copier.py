"""Copies the bulk space into a segment, chunk by chunk, each hashed while still in the cache.

Copy and hash of 512 KiB together cost 1.1 times the copy alone; hashing afterwards costs 1.6 times
(``docs/adr/0002``). numpy and xxhash let go of the GIL for both.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import xxhash

from mnemo.smp.segment import CHUNK
from mnemo.snapshot.layout import Bytes, Layout

_SAMPLED = 1021
"""One number in so many is checked: what is not finite spreads over whole tensors within a step,
and a loss computed with it tells. Checking all costs a quarter of a memcpy."""
_ZEROS: Bytes = np.zeros(CHUNK, dtype=np.uint8)


@dataclass(frozen=True)
class Piece:
    """``source`` goes to ``[start, stop)`` of a chunk."""

    start: int
    stop: int
    source: Bytes | torch.Tensor
    """numpy bytes, or a uint8 tensor on a device."""
    number: str = ""
    """numpy's name of the floating-point type whose values are to be checked, or ''."""


def pieces_of(
    layout: Layout,
    sources: list[Bytes | torch.Tensor],
    start: int,
    stop: int,
    numbers: list[str] | None = None,
) -> list[list[Piece]]:
    """What every chunk of ``[start, stop)`` of the bulk space consists of; gaps are zeros.

    Args:
        layout: Places of the tensors.
        sources: Bytes of each tensor, in the order of ``layout.entries``.
        start: First byte, at a chunk's border.
        stop: End.
        numbers: `Piece.number` of each tensor.
    """
    chunks: list[list[Piece]] = [[] for _ in range(-(-(stop - start) // CHUNK))]

    def add(offset: int, source: Bytes | torch.Tensor, number: str = "") -> None:
        begin, end = max(offset, start), min(offset + len(source), stop)
        while begin < end:
            chunk, inside = divmod(begin - start, CHUNK)
            length = min(end - begin, CHUNK - inside)
            part = source[begin - offset : begin - offset + length]
            chunks[chunk].append(Piece(inside, inside + length, part, number))
            begin += length

    cursor = start
    order = sorted(range(len(sources)), key=lambda i: layout.entries[i].offset)
    for i in order:
        entry = layout.entries[i]
        if entry.nbytes and entry.offset + entry.nbytes > start and entry.offset < stop:
            _fill(add, cursor, entry.offset)
            add(entry.offset, sources[i], numbers[i] if numbers else "")
            cursor = entry.offset + entry.nbytes
    _fill(add, cursor, stop)
    return chunks


def _fill(add: Callable[[int, Bytes], None], begin: int, end: int) -> None:
    """Zeros between two tensors, so that equal states have equal bytes."""
    while begin < end:
        length = min(end - begin, CHUNK)
        add(begin, _ZEROS[:length])
        begin += length


@dataclass(frozen=True)
class Move:
    """One copy within a chunk, ready to be done."""

    target: Bytes
    source: Bytes | torch.Tensor
    numbers: npt.NDArray[np.floating] | None
    """A sample of the numbers in ``target``, where they are to be checked."""


Job = list[tuple[Bytes, list[Move]]]
"""Every chunk of a target with the moves that fill it."""


def plan_moves(target: Bytes, chunks: Iterable[list[Piece]]) -> Job:
    """Everything about copying ``chunks`` into ``target`` that need not be done each time."""
    job: Job = []
    offset = 0
    for pieces in chunks:
        size = pieces[-1].stop
        chunk = target[offset : offset + size]
        moves = []
        for piece in pieces:
            part = chunk[piece.start : piece.stop]
            numbers = part.view(piece.number)[::_SAMPLED] if piece.number else None
            moves.append(Move(part, piece.source, numbers))
        job.append((chunk, moves))
        offset += size
    return job


def copy(job: Iterable[tuple[Bytes, list[Move]]]) -> tuple[bytes, bool]:
    """Do all moves, chunk by chunk.

    Returns:
        The xxh3-64 of each chunk, little-endian, and whether the numbers checked are finite.
    """
    digests = []
    finite = True
    digest: Any = xxhash.xxh3_64_intdigest  # its stubs do not know arrays as buffers
    copyto, total = np.copyto, np.add.reduce
    with np.errstate(all="ignore"):
        for chunk, moves in job:
            for move in moves:
                if isinstance(move.source, torch.Tensor):
                    torch.from_numpy(move.target).copy_(move.source)
                else:
                    copyto(move.target, move.source)
                if move.numbers is not None and finite and not math.isfinite(total(move.numbers)):
                    # large values may have added up to infinity
                    finite = bool(np.isfinite(move.numbers).all())
            digests.append(digest(chunk))
    return struct.pack(f"<{len(digests)}Q", *digests), finite


def hash_chunk(pieces: list[Piece]) -> int:
    """The xxh3-64 that a chunk of ``pieces`` would have."""
    h = xxhash.xxh3_64()
    for piece in pieces:
        source = piece.source
        h.update((source.cpu().numpy() if isinstance(source, torch.Tensor) else source).data)
    return h.intdigest()
