"""Bytes of many tensors from one rank to others, in chunks, checked."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import xxhash

from mnemo.comm.gloo import begun, ended
from mnemo.errors import IntegrityError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from mnemo.comm.c10d import Gloo, Work

    Tensors = Sequence[torch.Tensor]

_CHUNK_BYTES = 8 << 20
_TAG = 1 << 29
"""Users' are small."""


def send(gloo: Gloo, to: Sequence[int], pieces: Tensors) -> None:
    """Send ``pieces``, flat bytes, and wait until it was all received.

    Raises:
        LinkError: A receiver is gone.
    """
    digest = xxhash.xxh3_64()
    under_way: list[Work] = []
    for chunk in _chunks(pieces):
        whole = chunk[0] if len(chunk) == 1 else torch.cat(chunk)
        works = [begun(gloo.send, [whole], each, _TAG) for each in to]
        _hash(digest, whole)
        _await(under_way)
        under_way = works
    _await(under_way)
    sum_of = torch.tensor(list(digest.digest()), dtype=torch.uint8)
    for each in to:
        ended(begun(gloo.send, [sum_of], each, _TAG))
    for each in to:
        ended(begun(gloo.recv, [torch.empty(1, dtype=torch.uint8)], each, _TAG))


def receive(gloo: Gloo, source: int, pieces: Tensors) -> None:
    """Receive into ``pieces``, of the sizes that were sent.

    Raises:
        LinkError: The sender is gone.
        IntegrityError: Other bytes came than were sent.
    """
    digest = xxhash.xxh3_64()
    before: tuple[Work, torch.Tensor, list[torch.Tensor]] | None = None
    for chunk in _chunks(pieces):
        size = sum(each.numel() for each in chunk)
        whole = chunk[0] if len(chunk) == 1 else torch.empty(size, dtype=torch.uint8)
        work = begun(gloo.recv, [whole], source, _TAG)
        if before is not None:
            _arrived(digest, *before)
        before = (work, whole, chunk)
    if before is not None:
        _arrived(digest, *before)
    said = torch.empty(8, dtype=torch.uint8)
    ended(begun(gloo.recv, [said], source, _TAG))
    if bytes(said.tolist()) != digest.digest():
        msg = f"what rank {source} of the group handed over did not arrive as it was"
        raise IntegrityError(msg)
    ended(begun(gloo.send, [torch.zeros(1, dtype=torch.uint8)], source, _TAG))


def _arrived(
    digest: xxhash.xxh3_64, work: Work, whole: torch.Tensor, chunk: list[torch.Tensor]
) -> None:
    ended(work)
    _hash(digest, whole)
    if len(chunk) > 1:
        sizes = [each.numel() for each in chunk]
        for each, part in zip(chunk, torch.split(whole, sizes), strict=True):
            each.copy_(part)


def _chunks(pieces: Tensors) -> Iterator[list[torch.Tensor]]:
    """Those pieces that travel together; long ones are cut."""
    chunk: list[torch.Tensor] = []
    size = 0
    for piece in pieces:
        for part in torch.split(piece, _CHUNK_BYTES):
            if size + part.numel() > _CHUNK_BYTES:
                yield chunk
                chunk, size = [], 0
            if part.numel():
                chunk.append(part)
                size += part.numel()
    if chunk:
        yield chunk


def _await(works: Sequence[Work]) -> None:
    for each in works:
        ended(each)


def _hash(digest: Any, whole: torch.Tensor) -> None:
    digest.update(whole.numpy())
