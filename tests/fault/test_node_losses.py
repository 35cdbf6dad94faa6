"""Trainings over several nodes, of which some are lost with their memory at a random instant."""

from __future__ import annotations

import contextlib
import random
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
from nodes_lab import Cluster, until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from warm import Zygote

SETTINGS = {"MNEMO_SNAPSHOT__EVERY": "1"}


@dataclass(frozen=True)
class Shape:
    """Groups of ``data`` + ``parities`` nodes, with ``ranks`` ranks each."""

    data: int
    parities: int
    ranks: int

    def __str__(self) -> str:
        return f"{self.data}+{self.parities} with {self.ranks} a node"


@contextlib.contextmanager
def cluster(
    zygote: Zygote, directory: Path, shape: Shape, steps: int, **settings: str
) -> Iterator[Cluster]:
    code = f"{shape.data}+{shape.parities}"
    made = Cluster(
        zygote,
        directory,
        shape.data + shape.parities,
        shape.ranks,
        steps,
        {**SETTINGS, "MNEMO_PROTECT__NODES": code, **settings},
    )
    with contextlib.closing(made):
        yield made


def campaign(zygote: Zygote, directory: Path, shape: Shape, kills: int, seed: int) -> list[str]:
    """Lose any ``parities`` nodes, ``kills`` times in one training; what each loss cost, in words.

    Everything has to come out as in the undisturbed training.
    """
    chance = random.Random(seed)
    steps = 60 + 40 * kills
    with cluster(zygote, directory / "undisturbed", shape, steps) as undisturbed:
        undisturbed.run()
        expected = undisturbed.outcome()
    costs = []
    with cluster(zygote, directory / "disturbed", shape, steps) as disturbed:
        for number in range(kills):
            with disturbed.life() as ranks:
                until("a protected step", lambda: disturbed.protected_step() >= 0)
                goal = disturbed.steps_done() + chance.randint(1, 15)
                until(f"step {goal}", lambda goal=goal: disturbed.steps_done() >= goal)
                time.sleep(chance.random() * 0.02)  # somewhere within a step
                nodes = chance.sample(range(disturbed.nodes), shape.parities)
                disturbed.lose(ranks, nodes)
            costs.append(f"loss {number} of {nodes} at step {disturbed.steps_done()}")
        disturbed.run()
        assert disturbed.outcome() == expected, costs
        for number, words in enumerate(disturbed.said[1:]):
            line = next(line for line in words.splitlines() if "resumed from memory" in line)
            costs[number] += f": {line}"
    return costs


@pytest.mark.parametrize(
    "shape",
    [Shape(3, 1, 1), pytest.param(Shape(2, 2, 1), marks=pytest.mark.campaign)],
    ids=str,
)
def test_any_nodes_are_lost_and_nothing_else(
    zygote: Zygote, tmp_path: Path, shape: Shape, seed: int
) -> None:
    campaign(zygote, tmp_path, shape, 2, seed)


@pytest.mark.campaign
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("shape", [Shape(3, 1, 1), Shape(2, 2, 2), Shape(6, 2, 1)], ids=str)
def test_thirty_losses(zygote: Zygote, tmp_path: Path, shape: Shape, seed: int) -> None:
    print(*campaign(zygote, tmp_path, shape, 30, seed), sep="\n")
