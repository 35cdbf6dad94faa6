"""Which bytes belong to which fragment, and what other nodes cannot make of it."""

from __future__ import annotations

import random

import msgspec
import pytest

from mnemo.errors import ProtectionError
from mnemo.protect.messages import Generation, Piece
from mnemo.protect.plan import MOST_CHUNK, MOST_DIGEST_BYTES, Plan, page_up, shard_size


def generation(shards: list[list[int]], parities: int, *, chunk: int = 8192) -> Generation:
    nodes = tuple(f"n{i}" for i in range(len(shards)))
    pieces = tuple(
        tuple(Piece(rank, size, size) for rank, size in enumerate(shard)) for shard in shards
    )
    return Generation(1, 2, 3, nodes, parities, chunk, pieces)


def random_generation(seed: int) -> Generation:
    chance = random.Random(seed)
    n = chance.randint(2, 9)
    shards = [[chance.randint(1, 100_000) for _ in range(chance.randint(1, 4))] for _ in range(n)]
    return generation(shards, chance.randint(1, n - 1), chunk=4096 * chance.randint(1, 9))


@pytest.mark.parametrize("case", range(50))
def test_every_byte_of_every_shard_is_in_one_chunk(case: int, seed: int) -> None:
    plan = Plan(random_generation(seed + case))
    k, n = plan.group.code.k, plan.group.code.n
    for position, size in enumerate(plan.sizes):
        covered = []
        for stripe in range(n):
            index = plan.index_of(position, stripe)
            assert plan.position_of(stripe, index) == position
            lengths = [plan.length(stripe, index, c) for c in range(plan.chunks(stripe))]
            assert sum(lengths) == plan.size(stripe, index)
            assert lengths == sorted(lengths, reverse=True)
            assert all(length <= plan.stripe_length(stripe, c) for c, length in enumerate(lengths))
            if index < k:
                start = plan.shard_offset(position, stripe)
                covered.append((start, start + plan.size(stripe, index)))
        reached = 0
        for start, stop in sorted(covered):
            if stop > start:
                assert start == reached
                reached = stop
        assert reached == size
        parities = sorted(
            (plan.parity_offset(position, p.stripe), plan.stripe_size(p.stripe))
            for p in plan.group.parities_of(position)
        )
        ends = [offset + length for offset, length in parities]
        assert [offset for offset, _ in parities] == [0, *ends[:-1]]
        assert ends[-1] == plan.parity_size(position)


def test_equal_shards_cost_what_the_formula_says() -> None:
    """Each of n nodes sends (n - 1) / (n - m) of its shard, and keeps m / (n - m) of parities."""
    plan = Plan(generation([[6 << 20]] * 8, 2, chunk=1 << 20))
    assert {plan.sent_by(position) for position in range(8)} == {7 << 20}
    assert {plan.parity_size(position) for position in range(8)} == {2 << 20}


def test_what_a_short_shard_lacks_is_not_sent() -> None:
    plan = Plan(generation([[12 * 4096]] * 3 + [[4096]], 1))
    assert plan.block == 4 * 4096
    assert plan.sent_by(3) == 4096
    assert plan.sent_by(0) == 12 * 4096


def test_a_shard_is_its_segments_in_whole_pages() -> None:
    assert [page_up(size) for size in (0, 1, 4096, 4097)] == [0, 4096, 4096, 8192]
    assert shard_size((Piece(0, 1, 1), Piece(1, 4097, 1))) == 3 * 4096


def test_chunks_grow_with_the_shards() -> None:
    """Otherwise the digests of large shards would be too many for one message."""
    tebibyte = generation([[1 << 40]] * 8, 2, chunk=1 << 20)
    with pytest.raises(ProtectionError, match="larger chunks are needed"):
        Plan(tebibyte)
    plan = Plan.of(tebibyte)
    assert plan.generation.chunk > 1 << 20
    assert plan.all_digest_bytes <= MOST_DIGEST_BYTES
    with pytest.raises(ProtectionError, match="larger chunks are needed"):
        Plan.of(generation([[1 << 49]] * 8, 2))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"parities": 0}, "0 parities for 3 nodes"),
        ({"parities": 3}, "3 parities for 3 nodes"),
        ({"nodes": ("n0", "n0", "n2")}, "named twice"),
        ({"nodes": ("n0", "n1")}, "3 shards for 2 nodes"),
        ({"nodes": tuple(f"n{i}" for i in range(257))}, "257 nodes"),
        ({"chunk": 4095}, "chunks of 4095 bytes"),
        ({"chunk": 2 * MOST_CHUNK}, "chunks of"),
        ({"shards": ((Piece(0, 1, 1),), (), (Piece(0, 1, 1),))}, "node n1 says it holds ranks"),
        ({"shards": ((Piece(0, 1, 1), Piece(0, 1, 1)),) * 3}, r"ranks \[0, 0\]"),
    ],
)
def test_what_cannot_be_is_refused(change: dict[str, object], why: str) -> None:
    with pytest.raises(ProtectionError, match=why):
        Plan(msgspec.structs.replace(generation([[5000]] * 3, 1), **change))
