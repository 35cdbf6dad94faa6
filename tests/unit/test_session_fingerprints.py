"""What of a program is the same in each of its lives, and what shows that it was changed."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from mnemo.session.fingerprints import (
    group_fingerprints,
    lasting_words,
    optimizer_fingerprint,
    scheduler_fingerprint,
    structure_fingerprint,
)


def warms(step: int, *, over: int) -> float:
    return min(1.0, step / over)


@dataclass
class Settings:
    width: int
    tags: set[str] = field(default_factory=lambda: {"a", "bb", "cc", "dd"})


class Unshowable:
    def __repr__(self) -> str:
        raise RuntimeError("not now")


VALUES: tuple[Any, ...] = (
    warms,
    functools.partial(warms, over=3),
    functools.partial(warms, over=4),
    {"a", "bb", "cc", "dd"},
    {"a": {"x", "yy"}, "b": [frozenset({"x", "zz"})]},
    Settings(3),
    Settings(4),
    object(),
    nn.MSELoss(),
    torch.optim.AdamW,
    lambda x: x,
    Unshowable(),
    (1, 2.5, None, "1"),
)


def test_equal_values_have_the_same_words_in_any_process() -> None:
    words = [lasting_words(value) for value in VALUES]
    assert len(set(words)) == len(words)
    program = (
        "from test_session_fingerprints import VALUES, lasting_words\n"
        "print([lasting_words(value) for value in VALUES])"
    )
    path = os.pathsep.join(sys.path)
    environ = os.environ | {"PYTHONHASHSEED": "77", "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    other = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env=environ,
        check=True,
        cwd=os.path.dirname(__file__),  # noqa: PTH120 - as a string
    )
    assert other.stdout.strip() == repr(words)


def test_what_refers_to_itself_has_words() -> None:
    circle: list[Any] = []
    circle.append(circle)
    assert lasting_words(circle).startswith("list(")


def net(*, p: float = 0.1, act: nn.Module | None = None) -> nn.Module:
    return nn.Sequential(nn.Linear(2, 2), act or nn.ReLU(), nn.Dropout(p))


def test_the_structure_is_layers_and_their_settings() -> None:
    one = net()
    before = structure_fingerprint(one)
    with torch.no_grad():
        one(torch.randn(1, 2))
    one.eval()
    assert structure_fingerprint(one) == structure_fingerprint(net()) == before
    others = [net(p=0.2), net(act=nn.GELU()), nn.Sequential(*net(), nn.ReLU())]
    assert before not in map(structure_fingerprint, others)


def schedulers() -> list[Any]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    lr = lr_scheduler
    parts = [lr.LinearLR(optimizer), lr.CosineAnnealingLR(optimizer, 5)]
    return [
        lr.StepLR(optimizer, 3, 0.9),
        lr.StepLR(optimizer, 3, 0.1),
        lr.MultiStepLR(optimizer, [2, 4]),
        lr.MultiStepLR(optimizer, [2, 5]),
        lr.CosineAnnealingLR(optimizer, 5),
        lr.LambdaLR(optimizer, functools.partial(warms, over=3)),
        lr.LambdaLR(optimizer, functools.partial(warms, over=4)),
        lr.SequentialLR(optimizer, parts, [2]),
        lr.SequentialLR(optimizer, parts[::-1], [2]),
        lr.ReduceLROnPlateau(optimizer, patience=1),
        lr.ReduceLROnPlateau(optimizer, patience=2),
    ]


def test_schedulers_are_known_by_what_they_were_made_with() -> None:
    made = [scheduler_fingerprint([scheduler]) for scheduler in schedulers()]
    assert made == [scheduler_fingerprint([scheduler]) for scheduler in schedulers()]
    assert len(set(made)) == len(made)


@pytest.mark.parametrize("number", [0, 2, 4, 5, 7])
def test_a_scheduler_does_not_change_by_being_stepped(number: int) -> None:
    scheduler = schedulers()[number]
    before = scheduler_fingerprint([scheduler])
    scheduler.optimizer.step()
    scheduler.step()
    assert scheduler_fingerprint([scheduler]) == before


@pytest.mark.parametrize("kind", [torch.optim.LBFGS, torch.optim.SparseAdam, torch.optim.AdamW])
def test_an_optimizer_is_the_same_when_its_state_has_been_restored(kind: Any) -> None:
    """torch adds to the settings of one that does not have all that torch's own have."""
    made = [kind(nn.Linear(2, 2).parameters(), lr=0.5)]
    before = optimizer_fingerprint(made), group_fingerprints(made)
    made[0].load_state_dict(made[0].state_dict())
    assert (optimizer_fingerprint(made), group_fingerprints(made)) == before
    other = [kind(nn.Linear(2, 2).parameters(), lr=0.25)]
    assert optimizer_fingerprint(other) != before[0]
