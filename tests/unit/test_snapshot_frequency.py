"""How often snapshots are taken, with timings made up."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from mnemo.snapshot.frequency import Cadence


def run(cadence: Cadence, steps: int, step_s: float, added_s: float, copy_s: float) -> list[int]:
    """Play ``steps`` steps; the steps at which a snapshot was taken."""
    taken, due = [], 1
    for number in range(steps):
        beside = number == due
        if beside:
            taken.append(number)
            due = number + cadence.interval(copy_s)
        cadence.observe(step_s + added_s * beside, beside=beside)
    return taken


@pytest.mark.parametrize("every", [1, 7, 1000])
def test_fixed(every: int) -> None:
    cadence = Cadence(every, 0.01)
    for number in range(50):
        assert cadence.interval(copy_s=number * 10.0) == every
        cadence.observe(0.001, beside=bool(number % 2))


@pytest.mark.parametrize("added_s", [0.0, 0.0001, 0.003, 0.02, 0.5])
@pytest.mark.parametrize("overhead", [0.01, 0.05])
def test_converges_to_what_the_budget_pays_for(added_s: float, overhead: float) -> None:
    step_s = 0.1
    expected = max(1, math.ceil(added_s / (overhead * step_s) - 1e-9))
    cadence = Cadence(None, overhead)
    taken = run(cadence, 12 * expected + 800, step_s, added_s, copy_s=0.05)
    gaps = [b - a for a, b in itertools.pairwise(taken)]
    assert abs(gaps[-1] - expected) <= 1


def test_before_enough_is_known_the_copy_stands_in_for_the_cost() -> None:
    cadence = Cadence(None, 0.01)
    assert cadence.interval(0.0) == 5, "the first steps tell what one takes without a snapshot"
    for _ in range(4):
        cadence.observe(0.1, beside=False)
    assert cadence.added(0.05) == 0.05
    assert cadence.interval(0.05) == 50


def test_the_first_snapshots_which_allocate_do_not_count() -> None:
    cadence = Cadence(None, 0.01)
    for _ in range(10):
        cadence.observe(0.1, beside=False)
    for seconds in (9.0, 5.0, 0.101, 0.101, 0.101, 0.101):
        cadence.observe(seconds, beside=True)
    assert cadence.added(1.0) == pytest.approx(0.001)


def test_a_few_odd_steps_change_little(seed: int) -> None:
    rng = random.Random(seed)
    cadence = Cadence(None, 0.01)
    for number in range(200):
        odd = 5.0 if rng.random() < 0.1 else 0.0
        cadence.observe(0.1 + odd, beside=False)
        if number % 5 == 0:
            cadence.observe(0.102 + odd, beside=True)
    assert cadence.interval(1.0) == 2


def test_it_follows_steps_that_become_longer() -> None:
    cadence = Cadence(None, 0.01)
    run(cadence, 2000, 0.1, 0.0099, 0.05)
    assert abs(cadence.interval(0.05) - 10) <= 1
    run(cadence, 2000, 1.0, 0.0099, 0.05)
    assert cadence.interval(0.05) == 1


def test_bounds() -> None:
    dear = Cadence(None, 0.001)
    free = Cadence(None, 0.01)
    for _ in range(10):
        dear.observe(1e-6, beside=False)
        free.observe(0.0, beside=False)
    assert dear.interval(1e3) == 10_000
    assert free.interval(1.0) == 1
