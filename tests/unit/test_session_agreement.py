from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from torch import nn

from mnemo.errors import ConfigError
from mnemo.session.agreement import require_same_models
from mnemo.session.place import Place


def compare(*models: nn.Module) -> list[str]:
    """What it says on each rank, which trains one of these each; empty for nothing."""
    ranks = len(models)
    told: list[bytes] = [b""] * ranks
    all_are_there = threading.Barrier(ranks)

    def on(rank: int) -> str:
        def gather(mine: bytes) -> list[bytes]:
            told[rank] = mine
            all_are_there.wait()
            found = list(told)
            all_are_there.wait()
            return found

        try:
            require_same_models(Place(rank, ranks, gather=gather), models[rank])
        except ConfigError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(ranks) as threads:
        return list(threads.map(on, range(ranks)))


def test_the_same_model_on_all_ranks() -> None:
    assert compare(*(nn.BatchNorm1d(3) for _ in range(3))) == ["", "", ""]


BEFORE = "rank 1 has another model than rank 0: it "


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (
            nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 1)),
            "has 2.weight: float32[1, 4], 2.bias: float32[1] and lacks 1.weight: ",
        ),
        (
            nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 1), nn.BatchNorm1d(1)),
            "has 2.weight: float32[1], 2.bias: float32[1], 2.running_mean: float32[1] and 2 more. ",
        ),
        (nn.Sequential(nn.Linear(2, 4)), "lacks 1.weight: float32[1, 4], 1.bias: float32[1]. "),
    ],
)
def test_another_one_is_named_on_all_ranks(model: nn.Module, words: str) -> None:
    first = nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 1))
    one, other = compare(first, model)
    assert one == other
    assert one.startswith(BEFORE + words)
