"""Generators continue where they were."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from mnemo.snapshot import tree
from mnemo.snapshot.rng import capture_rng, restore_rng

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(autouse=True)
def _own_generators() -> Iterator[None]:
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    yield
    random.setstate(before[0])
    np.random.set_state(before[1])
    torch.set_rng_state(before[2])


def draw() -> tuple[Any, ...]:
    return (
        [random.random() for _ in range(5)],
        random.gauss(0, 1),
        np.random.rand(5).tolist(),
        np.random.randn(3).tolist(),
        torch.rand(5).tolist(),
        torch.randn(3).tolist(),
    )


@pytest.mark.parametrize("before", [0, 1, 1000])
def test_what_follows_is_the_same(before: int) -> None:
    random.seed(before)
    np.random.seed(before)
    torch.manual_seed(before)
    for _ in range(before % 7):
        draw()
    random.gauss(0, 1)  # keeps a second value for later
    np.random.randn()
    state = capture_rng()
    expected = [draw() for _ in range(3)]
    draw()
    restore_rng(state)
    assert [draw() for _ in range(3)] == expected


def test_through_a_snapshot() -> None:
    taken = tree.take_apart(capture_rng())
    named = [(name, t.clone()) for name, t in taken.all_tensors()]
    expected = draw()
    restore_rng(tree.unpack(taken.pack(), lambda i: named[i][1], trusted=False))
    assert draw() == expected


def test_capturing_draws_nothing() -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    capture_rng()
    assert torch.equal(torch.rand(2), expected)
