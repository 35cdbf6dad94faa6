"""Copies the bulk space into a segment, chunk by chunk, each hashed while still in the cache.

Copy and hash of 512 KiB together cost 1.1 times the copy alone; hashing afterwards costs 1.6 times
(``docs/adr/0002``). numpy and xxhash let go of the GIL for both.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import xxhash

from mnemo.smp.segment import CHUNK
from mnemo.snapshot.layout import Bytes, Layout

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


def copy_chunks(target: Bytes, chunks: Iterable[list[Piece]]) -> tuple[bytes, bool]:
    """Copy chunks into ``target`` one after the other.

    Returns:
        The xxh3-64 of each, little-endian, and whether all checked numbers are finite.
    """
    digests = []
    offset = 0
    finite = True
    for pieces in chunks:
        size = pieces[-1].stop
        chunk = target[offset : offset + size]
        for piece in pieces:
            part = chunk[piece.start : piece.stop]
            _copy(part, piece.source)
            if piece.number and finite:
                finite = _all_finite(part.view(piece.number))
        digests.append(xxhash.xxh3_64_intdigest(chunk))
        offset += size
    return struct.pack(f"<{len(digests)}Q", *digests), finite


def _all_finite(numbers: npt.NDArray[np.floating]) -> bool:
    """The sum is finite if all are; where it is not, large values may have added up to that."""
    with np.errstate(all="ignore"):
        return bool(np.isfinite(np.add.reduce(numbers)) or np.isfinite(numbers).all())


def _copy(target: Bytes, source: Bytes | torch.Tensor) -> None:
    if isinstance(source, torch.Tensor):
        torch.from_numpy(target).copy_(source)
    else:
        np.copyto(target, source)


def hash_chunk(pieces: list[Piece]) -> int:
    """The xxh3-64 that a chunk of ``pieces`` would have."""
    h = xxhash.xxh3_64()
    for piece in pieces:
        h.update(
            piece.source.cpu().numpy() if isinstance(piece.source, torch.Tensor) else piece.source
        )
    return h.intdigest()
