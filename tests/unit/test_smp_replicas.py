"""What the snapshot process says of replicas that do not fit together."""

from __future__ import annotations

import struct

from mnemo.smp.replicas import differing_replica
from mnemo.smp.segment import CHUNK, Meta, TensorEntry


def meta(rank: int, *, own: tuple[str, ...] = (), digest: int = 7, members: int = 2) -> Meta:
    """Rank ``rank`` of two, of tensors a and b, a chunk each; ``own`` ones it keeps by itself."""
    names = [*own, *(n for n in ("a", "b") if n not in own)]
    entries = tuple(
        TensorEntry(n, "uint8", (CHUNK,), (1,), CHUNK * i, CHUNK) for i, n in enumerate(names)
    )
    shared = 2 - len(own)
    start, stop = (shared * r // members * CHUNK for r in (rank, rank + 1))
    chunks = len(own) + (stop - start) // CHUNK
    return Meta(
        rank=rank,
        members=members,
        tensors=entries,
        own_size=CHUNK * len(own),
        shared_start=start,
        shared_stop=stop,
        total=2 * CHUNK,
        digests=struct.pack(f"<{chunks}Q", *[digest] * chunks),
        small=b"",
        small_mac=b"",
        identity={},
        position={},
        witness={1 - rank: 7} if shared == 2 else {},
    )


def test_equal_replicas() -> None:
    assert differing_replica({0: meta(0), 1: meta(1)}) == ""


def test_other_content() -> None:
    assert (
        differing_replica({0: meta(0), 1: meta(1, digest=8)}) == "rank 0 differs from rank 1 in b"
    )


def test_a_tensor_that_one_rank_keeps_by_itself_makes_the_parts_no_whole() -> None:
    """No witness need have seen it: such a generation could not be read back."""
    words = differing_replica({0: meta(0), 1: meta(1, own=("a",))})
    assert words == "rank 1 does not share out a as rank 0 does"


def test_ranks_that_keep_everything_may_keep_it_as_they_like() -> None:
    assert differing_replica({0: meta(0, members=1), 1: meta(1, own=("a",), members=1)}) == ""
