"""Snapshots of CUDA tensors. Marked ``gpu``: not part of the default run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mnemo.config import load_config
from mnemo.session.identity import RunIdentity
from mnemo.session.keeper import End, Keeper
from mnemo.session.place import Place
from mnemo.smp.board import Position
from mnemo.snapshot.listing import MODULE_PARTS, join_module_state, module_state, optimizer_state
from mnemo.snapshot.rng import restore_rng

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_a_step_on_the_device_is_repeated_from_its_snapshot(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(512, 2048), torch.nn.BatchNorm1d(2048), torch.nn.Dropout(0.1),
        torch.nn.Linear(2048, 512),
    ).cuda()  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    config = load_config(
        run={"dir": str(tmp_path / "run"), "journal": str(tmp_path)}, snapshot={"every": 1}
    )
    keeper = Keeper(config, RunIdentity("gpu", stable=True, source="test"), Place())
    keeper.forget()
    keeper.begin({})
    x = torch.randn(64, 512, device="cuda")

    def step(number: int, *, snapshot: bool) -> torch.Tensor:
        loss = (model(x) - x).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        keeper.before_update()
        optimizer.step()
        if snapshot:
            keeper.boundary(
                Position(2 * number, number, 0, number, 1.0),
                lambda: {"model": module_state(model), "optimizer": optimizer_state(optimizer)},
                volatile=lambda: {b.data_ptr() for b in model.buffers()},
                watch=("model",),
            )
        return loss.detach()

    for number in range(1, 5):
        step(number, snapshot=True)
    keeper.settle()
    expected = [step(5, snapshot=False), step(6, snapshot=False)]
    after = [p.detach().clone() for p in model.parameters()]

    restored = keeper.find()
    assert restored is not None
    assert restored.step == 4
    keeper.accept(restored, model.state_dict(), [f"model.{part}." for part in MODULE_PARTS])
    model.load_state_dict(join_module_state(restored.state["model"]))
    optimizer.load_state_dict(restored.state["optimizer"])
    restore_rng(restored.rng)
    assert [step(5, snapshot=False), step(6, snapshot=False)] == expected
    assert all(torch.equal(a, b) for a, b in zip(after, model.parameters(), strict=True))
    keeper.close(End.GIVEN_UP)
