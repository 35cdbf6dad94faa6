"""Are replicas equal? Each rank also hashes chunks that another one copies; the SMP compares."""

from __future__ import annotations

import struct

from mnemo.smp.segment import CHUNK, Meta


def differing_replica(metas: dict[int, Meta]) -> str:
    """Compare the digests that ranks computed of their own copies of shared chunks.

    Args:
        metas: Of each rank, for one generation.

    Returns:
        Which rank differs in which tensor from the one that keeps the chunk, or ''.
    """
    if words := _sharing_otherwise(metas):
        return words
    kept: dict[int, tuple[int, int]] = {}
    for rank, meta in metas.items():
        first = meta.shared_start // CHUNK
        own_chunks = -(-meta.own_size // CHUNK)
        digests = struct.unpack(f"<{len(meta.digests) // 8}Q", meta.digests)
        for i, digest in enumerate(digests[own_chunks:]):
            kept[first + i] = (rank, digest)
    for rank, meta in metas.items():
        for chunk, digest in meta.witness.items():
            keeper = kept.get(chunk)
            if keeper is not None and keeper[1] != digest:
                return f"rank {rank} differs from rank {keeper[0]} in {_tensors_in(meta, chunk)}"
    return ""


def _sharing_otherwise(metas: dict[int, Meta]) -> str:
    """Whether a rank shares out another set of tensors, so that the parts make no whole.

    One that saw a tensor change during a copy keeps that by itself from then on.
    """
    shared = {
        rank: {e.name for e in meta.tensors if e.offset >= -(-meta.own_size // CHUNK) * CHUNK}
        for rank, meta in metas.items()
        if meta.members > 1
    }
    for rank, names in shared.items():
        other = min(shared)
        if odd := sorted(names ^ shared[other]):
            return f"rank {rank} does not share out {odd[0]} as rank {other} does"
    return ""


def _tensors_in(meta: Meta, chunk: int) -> str:
    """Which tensors the chunk has bytes of: one, unless it lies across a border."""
    offset = -(-meta.own_size // CHUNK) * CHUNK + chunk * CHUNK
    names = [
        entry.name
        for entry in meta.tensors
        if entry.offset < offset + CHUNK and entry.offset + entry.nbytes > offset
    ]
    return " or ".join(names) or f"chunk {chunk}"
