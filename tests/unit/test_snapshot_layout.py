"""Places of tensors, and who copies what."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mnemo.smp.segment import CHUNK, PAGE
from mnemo.snapshot.layout import Share, byte_view, is_dense, make_layout, rebuild


@given(
    sizes=st.lists(st.tuples(st.integers(0, 300_000), st.booleans()), max_size=12),
)
@settings(max_examples=100, deadline=None)
def test_no_two_tensors_overlap_and_all_are_aligned(sizes: list[tuple[int, bool]]) -> None:
    named = [(str(i), torch.empty(n, dtype=torch.uint8)) for i, (n, _) in enumerate(sizes)]
    own = [mine for _, mine in sizes]
    layout = make_layout(named, own)
    assert [e.name for e in layout.entries] == [name for name, _ in named]
    places = sorted((e.offset, e.offset + e.nbytes) for e in layout.entries)
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(places))
    for entry, is_own in zip(layout.entries, own, strict=True):
        assert entry.offset % (PAGE if entry.nbytes >= PAGE else 64) == 0
        if is_own:
            assert entry.offset + entry.nbytes <= layout.own_size
        else:
            assert layout.own_padded <= entry.offset
        assert entry.offset + entry.nbytes <= layout.total
    assert layout.own_padded % CHUNK == 0
    assert layout.shared_size == layout.total - layout.own_padded >= 0


def test_the_same_tensors_have_the_same_places() -> None:
    """Replicas share out by place, so it may depend on nothing else."""
    tensors = [("a", torch.empty(5)), ("b", torch.empty(30_000)), ("c", torch.empty(7))]
    one, other = (make_layout(tensors, [True, False, True]) for _ in range(2))
    assert one == other


@given(shared=st.integers(0, 40 * CHUNK), replicas=st.integers(1, 9))
def test_shares_cover_all_bytes_once_in_whole_chunks(shared: int, replicas: int) -> None:
    bounds = [Share(i, replicas).bounds(shared) for i in range(replicas)]
    assert bounds[0][0] == 0
    assert bounds[-1][1] == shared
    assert all(a[1] == b[0] for a, b in itertools.pairwise(bounds))
    assert all(start % CHUNK == 0 or start == shared for start, _ in bounds)
    chunks = [-(-(stop - start) // CHUNK) for start, stop in bounds]
    assert max(chunks) - min(chunks) <= 1


@pytest.mark.parametrize(
    ("tensor", "dense"),
    [
        (torch.empty(3, 4), True),
        (torch.empty(()), True),
        (torch.empty(0, 3), True),
        (torch.empty(3, 4).t(), True),
        (torch.empty(2, 3, 4, 5).contiguous(memory_format=torch.channels_last), True),
        (torch.empty(2, 3, 4, 5).permute(3, 0, 2, 1), True),
        (torch.empty(10)[2:7], True),
        (torch.empty(10)[::2], False),
        (torch.empty(4, 4)[:, :2], False),
        (torch.empty(3, 1).expand(3, 5), False),
        (torch.empty(1).expand(7), False),
    ],
)
def test_dense(tensor: torch.Tensor, dense: bool) -> None:
    assert is_dense(tensor) is dense


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(6, 4).t(),
        torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
        torch.randn(30)[7:19],
        torch.tensor(True),
        torch.tensor(1 + 2j),
        torch.randn(5).bfloat16(),
        torch.empty(0, 3),
        torch.nn.Parameter(torch.randn(3)),
    ],
)
def test_bytes_of_a_dense_tensor_make_it_again(tensor: torch.Tensor) -> None:
    view = byte_view(tensor)
    if tensor.numel():
        assert view.data_ptr() == tensor.data_ptr(), "it was copied"
    entry = make_layout([("x", tensor)], [True]).entries[0]
    made = rebuild(entry, torch.from_numpy(view.numpy().copy()))
    assert (made.dtype, made.shape) == (tensor.dtype, tensor.shape)
    assert torch.equal(made, tensor)
    if tensor.numel():
        assert made.stride() == tensor.stride()
