"""The survival figures: the formula against every outcome counted, the simulation against both."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from benchmarks import survival
from benchmarks.harness import Report


@pytest.mark.parametrize(("k", "m"), [(1, 0), (1, 1), (3, 1), (2, 2)])
@pytest.mark.parametrize("nodes", [4, 8])
def test_formula_is_the_sum_over_all_outcomes(
    k: int, m: int, nodes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(survival, "DAYS", 1)
    monkeypatch.setattr(survival, "RATE", 0.3)
    fails = 1 - math.exp(-0.3)
    lost = 0.0
    for outcome in itertools.product((0, 1), repeat=nodes):
        groups = [outcome[first : first + k + m] for first in range(0, nodes, k + m)]
        if any(sum(group) > m for group in groups):
            lost += fails ** sum(outcome) * (1 - fails) ** (nodes - sum(outcome))
    assert survival.loss(nodes, 1, k, m) == pytest.approx(lost, rel=1e-12)


def test_small_probabilities_keep_their_digits() -> None:
    """To first order: groups times windows times the ways in which m + 1 nodes can fail."""
    p = survival.RATE / 144
    first = 64 / 8 * 54 * 144 * math.comb(8, 3) * p**3
    assert first < 1e-6
    assert survival.loss(64, 144, 6, 2) == pytest.approx(first, rel=1e-3)


def test_rate_is_that_of_llama_3() -> None:
    assert pytest.approx(466) == survival.RATE * 54 * 16_384 / 8


def test_simulation_counts_runs_with_a_lost_group(
    monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    monkeypatch.setattr(survival, "DAYS", 2)
    monkeypatch.setattr(survival, "RATE", 0.2)
    lost = survival.simulate(np.random.default_rng(seed), 16, 3, 20_000)
    assert lost.keys() == set(survival.SHAPES)
    for (k, m), found in lost.items():
        expected = survival.loss(16, 3, k, m)
        deviation = math.sqrt(20_000 * expected * (1 - expected))
        assert abs(found - 20_000 * expected) <= 4 * deviation + 1, (k, m)


def test_report_has_every_window_and_shape_and_a_bar() -> None:
    report = Report("survival")
    survival.run(quick=True, report=report)
    assert len(report.rows) == len(survival.WINDOWS) * len(survival.SHAPES)
    (bar,) = report.bars
    assert (bar.name, bar.bar) == ("survival_sigma", 3)
    assert sum(int(row["points"] or 0) for row in report.rows) >= 12
