"""The peers that benchmarks compare with save what they were given, and let go of everything."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.distributed.checkpoint.state_dict_loader import load

from benchmarks.peers_saving import Saver, all_savers

if TYPE_CHECKING:
    from pathlib import Path

NAMES = ["torch.save", "Lightning AsyncCheckpointIO", "DCP async_save"]


def _state() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = torch.nn.Linear(256, 256)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(2, 256)).sum().backward()
    optimizer.step()
    return model, optimizer


def _load(saver: Saver) -> tuple[torch.Tensor, int]:
    if saver.path.is_dir():
        wanted: dict[str, Any] = {"model": {"weight": torch.zeros(256, 256)}, "step": -1}
        load(wanted, checkpoint_id=saver.path, no_dist=True)
    else:
        wanted = torch.load(saver.path, weights_only=True)
    return wanted["model"]["weight"], wanted["step"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore")
def test_saved_state_is_that_of_the_step(name: str, tmp_path: Path) -> None:
    saver = all_savers(tmp_path)[name]
    model, optimizer = _state()
    try:
        for step in (1, 2):
            kept = model.weight.detach().clone()  # type: ignore[union-attr]
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            assert saver.save(state, step) > 0
            assert saver.before_update() >= 0
            optimizer.step()  # from here on the state is another one
            saver.drain()
            weight, saved_step = _load(saver)
            assert saved_step == step
            assert torch.equal(weight, kept)
            assert not torch.equal(weight, model.weight)  # type: ignore[arg-type]
    finally:
        saver.close()
    assert list(tmp_path.iterdir()) == []


def test_every_peer_is_tested(tmp_path: Path) -> None:
    savers = all_savers(tmp_path)
    assert list(savers) == NAMES
    for saver in savers.values():
        saver.close()
