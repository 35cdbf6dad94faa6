"""State of modules and optimizers that is unlike what most have."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from mnemo.snapshot.listing import module_state, optimizer_state, restore_optimizer
from mnemo.snapshot.tree import is_plain, take_apart


class Master(torch.optim.Optimizer):
    """Keeps float32 state of whatever it optimizes."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.01})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                state.setdefault("master", p.float() + 1e-5)
                state["count"] = state.get("count", torch.tensor(0, dtype=torch.int64)) + 1
                p.copy_(state["master"])


def test_state_of_another_type_than_the_parameter_comes_back_in_it() -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 3).bfloat16()
    optimizer = Master(model.parameters())
    optimizer.step()
    saved = optimizer.state_dict()
    other = Master(model.parameters())
    other.load_state_dict(saved)
    assert other.state[model.weight]["master"].dtype == torch.bfloat16, "torch casts"
    restore_optimizer(other, saved)
    for p in model.parameters():
        assert other.state[p]["master"].dtype == torch.float32
        assert torch.equal(other.state[p]["master"], optimizer.state[p]["master"])
        assert other.state[p]["count"].dtype == torch.int64


class Named(nn.Parameter):
    """A user's own kind of parameter."""


def test_a_kind_of_parameter_of_ones_own_is_a_parameter() -> None:
    model = nn.Linear(2, 2)
    model.weight = Named(torch.ones(2, 2))
    assert is_plain(model.weight)
    assert not is_plain(nn.UninitializedParameter())
    taken = take_apart(module_state(model))
    assert {name.rpartition(".")[2] for name, _ in taken.all_tensors()} == {"weight", "bias"}
    model.weight.data = torch.zeros(2, 2)
    (weight,) = [t for name, t in taken.all_tensors() if name.endswith("weight")]
    assert not weight.any(), "found where its memory is now"


def test_numbers_of_parameters_are_those_of_torch() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    groups = [{"params": m.parameters(), "lr": 0.1 * (i + 1)} for i, m in enumerate(model)]
    optimizer = torch.optim.AdamW(groups)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    listed = optimizer_state(optimizer)
    found = [group["params"].build() for group in listed["param_groups"]]
    assert found == [group["params"] for group in optimizer.state_dict()["param_groups"]]
