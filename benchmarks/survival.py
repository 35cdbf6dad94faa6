"""How likely a cluster loses a group: simulated node by node, against the closed formula.

Each of N nodes fails within a repair window of length w independently of the others, with
probability ``p = 1 - exp(-λw)``. Nodes are in groups of n = k + m, and a group is lost when more
than m of its nodes fail in one window; a window later everything is protected again. So in W
windows

    loss = 1 - (1 - g)^(W N / n)    with    g = ∑ C(n, i) p^i (1 - p)^(n - i)  over i > m

which is the survival of sharding groups in REFT (Wang et al., "Reliable and Efficient In-Memory
Fault Tolerance of Large Language Model Pretraining", arXiv:2310.12670), for any m. Failures on both
sides of a window's end do not add up here: with windows that start at a failure, small losses are
up to m + 1 times as likely.

λ is that of Llama 3: 466 interruptions in 54 days on 16,384 GPUs, here 8 a node ("The Llama 3 Herd
of Models", arXiv:2407.21783, section 3.3.4). As if each took a node's memory with it; a GPU that
fails, the most frequent cause, leaves it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

if TYPE_CHECKING:
    from benchmarks.harness import Report

DAYS: Final = 54
RATE: Final = 466 / (DAYS * 16_384 / 8)
"""Failures a node and day."""

NODES: Final = (64, 256, 1024, 4096, 16_384)
WINDOWS: Final = {"10 min": 144, "1 h": 24, "1 day": 1}
"""How many repair windows a day has."""
SHAPES: Final = ((1, 0), (1, 1), (7, 1), (3, 1), (2, 2), (6, 2))
"""k and m; without parity, and with one copy, as they compare."""

ENOUGH: Final = 25
"""Runs with and without a loss that must be expected for a comparison to mean anything."""
PLOT: Final = Path(__file__).parent / "results" / "survival.svg"


def run(quick: bool, report: Report) -> None:
    """Fill ``report``; draw `PLOT` unless ``quick``."""
    random = np.random.default_rng(0)
    points: list[Point] = []
    for window, per_day in WINDOWS.items():
        runs = {nodes: round((2e5 if quick else 1e6) / (RATE * DAYS * nodes)) for nodes in NODES}
        lost = {nodes: simulate(random, nodes, per_day, runs[nodes]) for nodes in NODES}
        for k, m in SHAPES:
            formula = {nodes: loss(nodes, per_day, k, m) for nodes in NODES}
            compared = [
                Point(window, (k, m), nodes, formula[nodes], runs[nodes], lost[nodes][k, m])
                for nodes in NODES
                if runs[nodes] * min(formula[nodes], 1 - formula[nodes]) >= ENOUGH
            ]
            sigma = max((point.sigma for point in compared), default=None)
            shown = {str(nodes): float(f"{p:.3g}") for nodes, p in formula.items()}
            report.row(within=window, code=f"{k}+{m}", **shown, points=len(compared), sigma=sigma)
            points += compared
    report.bar("survival_sigma", max(point.sigma for point in points), 3, "lower")
    if not quick:
        draw(points)


@dataclass(frozen=True)
class Point:
    """Simulated runs in which a group was lost, of so many, beside the formula's probability."""

    window: str
    shape: tuple[int, int]
    nodes: int
    probability: float
    runs: int
    lost: int

    @property
    def deviation(self) -> float:
        """Standard deviation of the share of runs."""
        return math.sqrt(self.probability * (1 - self.probability) / self.runs)

    @property
    def sigma(self) -> float:
        """How many of them the share is off."""
        return abs(self.lost / self.runs - self.probability) / self.deviation


def loss(nodes: int, per_day: int, k: int, m: int) -> float:
    """Return the probability that any group is lost in 54 days, by the formula above."""
    n = k + m
    fails = -math.expm1(-RATE / per_day)
    group = math.fsum(
        math.comb(n, i) * fails**i * (1 - fails) ** (n - i) for i in range(m + 1, n + 1)
    )
    return -math.expm1(DAYS * per_day * nodes / n * math.log1p(-group))


def simulate(
    random: np.random.Generator, nodes: int, per_day: int, runs: int
) -> dict[tuple[int, int], int]:
    """Return for each shape how many of the runs of 54 days lost a group.

    A cell is one node in one window of one run. Failures fall into cells evenly, and their number
    is Poisson's, so each cell is hit independently of all others.
    """
    cells = runs * DAYS * per_day * nodes
    hit = np.unique(random.integers(0, cells, random.poisson(RATE / per_day * cells)))
    lost = {}
    for k, m in SHAPES:
        groups, failed = np.unique(hit // (k + m), return_counts=True)
        in_run = groups[failed > m] // (cells // runs // (k + m))
        lost[k, m] = np.unique(in_run).size
    return lost


def draw(simulated: list[Point]) -> None:
    """Draw losses over nodes: the formula as lines, simulations as points with 3 σ."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context({"svg.hashsalt": "survival", "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=(10.5, 4.2), layout="constrained")
        panels = figure.subplots(1, len(WINDOWS), sharey=True)
        sizes = [NODES[0] * 2**i for i in range(int(math.log2(NODES[-1] / NODES[0])) + 1)]
        for axes, (window, per_day) in zip(panels, WINDOWS.items(), strict=True):
            for number, (k, m) in enumerate(SHAPES):
                line = [loss(nodes, per_day, k, m) for nodes in sizes]
                axes.plot(sizes, line, color=f"C{number}", label=_label(k, m), lw=1.3)
                points = [p for p in simulated if (p.window, p.shape) == (window, (k, m))]
                axes.errorbar(
                    [p.nodes for p in points], [p.lost / p.runs for p in points],
                    [3 * p.deviation for p in points], fmt="o", ms=3.5, color=f"C{number}",
                    capsize=2, lw=0.8,
                )  # fmt: skip
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.set_ylim(1e-9, 2)
            axes.set_xticks(NODES, [f"{nodes:,}" for nodes in NODES])
            axes.set_title(f"protected again within {window}", fontsize=9)
            axes.set_xlabel("nodes")
            axes.grid(alpha=0.3)
        panels[0].set_ylabel("probability of losing state in 54 days")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=6)
        figure.suptitle(
            "Loss at Llama 3's failure rate, each failure taking a node: "
            "formula (lines), simulation with 3 σ (points)",
            fontsize=10,
        )
        figure.savefig(PLOT, metadata={"Date": None})


def _label(k: int, m: int) -> str:
    return {(1, 0): "no parity", (1, 1): "1+1, a copy"}.get((k, m), f"{k}+{m}")
