"""How often snapshots are taken, with timings made up."""

from __future__ import annotations

import itertools
import random

import pytest

from mnemo.snapshot.frequency import Cadence


def run(cadence: Cadence, steps: int, step_s: float, added_s: float) -> list[int]:
    """Play ``steps`` steps; the steps at which a snapshot was taken."""
    taken, due = [], 1
    for number in range(steps):
        beside = number == due
        if beside:
            taken.append(number)
            due = number + cadence.interval()
        cadence.observe(step_s + added_s * beside, beside=beside)
    return taken


@pytest.mark.parametrize("every", [1, 7, 1000])
def test_fixed(every: int) -> None:
    cadence = Cadence(every, 0.01)
    for number in range(50):
        assert cadence.interval() == every
        cadence.observe(0.001, beside=bool(number % 2))


@pytest.mark.parametrize("added_s", [0.0, 0.0001, 0.003, 0.02, 0.5])
@pytest.mark.parametrize("overhead", [0.01, 0.05])
def test_converges_to_what_nine_tenths_of_the_budget_pay_for(
    added_s: float, overhead: float
) -> None:
    step_s = 0.1
    expected = max(1.0, added_s / (0.9 * overhead * step_s))
    cadence = Cadence(None, overhead)
    taken = run(cadence, int(30 * expected) + 800, step_s, added_s)[20:]
    gaps = [b - a for a, b in itertools.pairwise(taken)]
    assert sum(gaps) / len(gaps) == pytest.approx(expected, rel=0.05), "also between whole steps"
    assert max(gaps) - min(gaps) <= 1


def test_the_first_steps_learn_at_every_other_one() -> None:
    cadence = Cadence(None, 0.01)
    assert cadence.interval() == 2
    assert run(cadence, 12, 0.1, 0.05)[:5] == [1, 3, 5, 7, 9]
    assert cadence.added() == pytest.approx(0.05)


def test_the_first_snapshots_which_allocate_do_not_count() -> None:
    cadence = Cadence(None, 0.01)
    for seconds in (9.0, 5.0, 0.101, 0.101, 0.101, 0.101):
        cadence.observe(0.1, beside=False)
        cadence.observe(seconds, beside=True)
    assert cadence.added() == pytest.approx(0.001)


def test_a_few_odd_steps_change_little(seed: int) -> None:
    rng = random.Random(seed)
    cadence = Cadence(None, 0.01)
    for number in range(200):
        odd = 5.0 if rng.random() < 0.1 else 0.0
        cadence.observe(0.1 + odd, beside=False)
        if number % 5 == 0:
            cadence.observe(0.102 + odd, beside=True)
    assert cadence.interval() == 2


def test_it_follows_steps_that_become_longer() -> None:
    cadence = Cadence(None, 0.01)
    run(cadence, 2000, 0.1, 0.0099)
    assert abs(cadence.interval() - 10) <= 1
    run(cadence, 2000, 1.0, 0.0099)
    assert cadence.interval() == 1


def test_bounds() -> None:
    dear, free = Cadence(None, 0.01), Cadence(None, 0.01)
    for _ in range(10):
        dear.observe(1e-6, beside=False)
        dear.observe(1e3, beside=True)
        free.observe(0.0, beside=False)
        free.observe(0.0, beside=True)
    assert dear.interval() == 10_000
    assert free.interval() >= 1


def test_noise_does_not_make_a_snapshot_free() -> None:
    cadence = Cadence(None, 0.01)
    for _ in range(10):
        cadence.observe(0.102, beside=False)
        cadence.observe(0.1, beside=True)
    assert cadence.added() == 0.0
    assert cadence.added(copy_s=0.08) == pytest.approx(0.005)
    assert cadence.interval(copy_s=0.08) == 5


@pytest.mark.parametrize(("added_s", "copy_s"), [(0.011, 0.085), (0.1, 0.2), (0.03, 0.085)])
def test_the_budget_is_met_in_noise(added_s: float, copy_s: float, seed: int) -> None:
    """Steps of 0.6 s that vary by 4 %, which is more than what a snapshot adds."""
    rng = random.Random(seed)
    cadence = Cadence(None, 0.01)
    taken, due, drift = [], 1, 0.0
    for number in range(600):
        beside = number == due
        if beside:
            taken.append(number)
            due = number + cadence.interval(copy_s)
        drift += rng.gauss(0, 0.002)
        step_s = rng.gauss(0.6 + drift, 0.012)
        cadence.observe(step_s + added_s * beside, beside=beside)
    gaps = [b - a for a, b in itertools.pairwise(taken) if a > 100]
    expected = added_s / (0.01 * 0.6)
    assert 0.5 * expected < sum(gaps) / len(gaps) < 1.5 * expected
