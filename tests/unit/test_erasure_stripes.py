"""Who holds what: every fragment has one place, every shard is covered, domains are parted."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mnemo.erasure.stripes import BLOCK_ALIGN, Group, make_groups
from mnemo.errors import CodeError


def names(count: int) -> tuple[str, ...]:
    return tuple(f"node-{i:03d}" for i in range(count))


SHAPES = [(n, m) for n in range(2, 10) for m in range(1, n)]


@pytest.mark.parametrize(("n", "m"), SHAPES)
def test_every_fragment_lies_with_one_node_and_no_node_has_two_of_a_stripe(n: int, m: int) -> None:
    group = Group(names(n), m)
    held = Counter(
        (place.stripe, place.index)
        for i in range(n)
        for place in (*group.blocks(i), *group.parities_of(i))
    )
    assert set(held.values()) == {1}
    assert set(held) == {(s, f) for s in range(n) for f in range(n)}
    for i in range(n):
        stripes = [p.stripe for p in (*group.blocks(i), *group.parities_of(i))]
        assert sorted(stripes) == list(range(n))


@pytest.mark.parametrize(("n", "m"), SHAPES)
def test_work_and_memory_are_the_same_for_all(n: int, m: int) -> None:
    group = Group(names(n), m)
    assert {len(group.blocks(i)) for i in range(n)} == {n - m}
    assert {len(group.parities_of(i)) for i in range(n)} == {m}
    assert sorted(stripe.hub for stripe in group.stripes) == list(range(n))


def test_what_is_sent() -> None:
    assert Group(names(8), 2).sent_over_shard() == pytest.approx(7 / 6)
    assert Group(names(4), 1).sent_over_shard() == pytest.approx(1.0)


@given(
    sizes=st.lists(st.integers(0, 10**7), min_size=2, max_size=9),
    data=st.data(),
)
def test_blocks_cover_every_shard(sizes: list[int], data: st.DataObject) -> None:
    m = data.draw(st.integers(1, len(sizes) - 1))
    group = Group(names(len(sizes)), m)
    block = group.block_size(sizes)
    assert block % BLOCK_ALIGN == 0
    assert block * group.code.k >= max(sizes)
    assert block * group.code.k < max(sizes) + group.code.k * BLOCK_ALIGN + group.code.k


@pytest.mark.parametrize(("nodes", "size"), [(8, 8), (10, 8), (16, 8), (20, 8), (23, 8), (5, 4)])
def test_groups_are_not_smaller_than_asked_for(nodes: int, size: int) -> None:
    grouping = make_groups(dict.fromkeys(names(nodes), ""), size=size, parities=2)
    assert sorted(n for g in grouping.groups for n in g.nodes) == list(names(nodes))
    lengths = [len(g.nodes) for g in grouping.groups]
    assert min(lengths) >= size
    assert max(lengths) < 2 * size
    assert max(lengths) - min(lengths) <= 1
    assert grouping.degraded == ()


def test_domains_are_parted() -> None:
    domains = {node: f"rack-{i // 4}" for i, node in enumerate(names(16))}
    grouping = make_groups(domains, size=4, parities=1)
    for group in grouping.groups:
        assert len({domains[node] for node in group.nodes}) == 4
    assert grouping.degraded == ()


def test_a_domain_that_is_too_large_is_named() -> None:
    domains = {node: "rack-0" if i < 3 else "" for i, node in enumerate(names(4))}
    (words,) = make_groups(domains, size=4, parities=2).degraded
    assert words == "domain rack-0 has 3 nodes of group 0, which survives the loss of 2"


@pytest.mark.parametrize(("nodes", "kept"), [(7, 2), (3, 2), (2, 1)])
def test_fewer_nodes_than_asked_for_is_a_degradation(nodes: int, kept: int) -> None:
    grouping = make_groups(dict.fromkeys(names(nodes), ""), size=8, parities=2)
    (group,) = grouping.groups
    assert (len(group.nodes), group.parities) == (nodes, kept)
    assert grouping.degraded[0].endswith(f"survives the loss of {kept}")


def test_one_node_has_nobody() -> None:
    grouping = make_groups({"a": ""}, size=8, parities=2)
    assert grouping.of("a") is None
    assert "nothing protects it" in grouping.degraded[0]


@pytest.mark.parametrize(("size", "parities"), [(2, 2), (4, 0), (1, 1), (4, -1)])
def test_impossible_groups(size: int, parities: int) -> None:
    with pytest.raises(CodeError, match=f"groups of {size} nodes with {parities} parities"):
        make_groups({"a": "", "b": ""}, size=size, parities=parities)
    with pytest.raises(CodeError):
        Group(("a", "a"), 1)
