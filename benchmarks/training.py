"""A training of a chosen size on one core, to measure what is done beside its steps."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mnemo.config import load_config
from mnemo.session.attributes import AttributeWatch
from mnemo.session.identity import RunIdentity
from mnemo.session.keeper import End, Keeper
from mnemo.session.modules import ModuleTree
from mnemo.session.place import Place
from mnemo.session.unsaved import Unsaved
from mnemo.smp import lifecycle
from mnemo.smp import messages as m
from mnemo.smp.board import Position
from mnemo.smp.paths import RunPaths
from mnemo.snapshot.listing import module_state, optimizer_state


class Block(nn.Module):
    """A residual pair of linear layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Shape ``(batch, width)`` in and out."""
        out: torch.Tensor = x + self.down(torch.relu(self.up(x)))
        return out


class Training:
    """Model, fused AdamW and one fixed batch; float32, one thread."""

    def __init__(
        self, *, width: int = 1024, blocks: int = 24, batch: int = 64, warm: bool = True
    ) -> None:
        torch.set_num_threads(1)
        torch.manual_seed(0)
        self.model = nn.Sequential(*[Block(width) for _ in range(blocks)])
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=True)
        self._tree = ModuleTree(self.model)
        self._unsaved = Unsaved(self.model)
        self._attributes = AttributeWatch("")
        self._batch = torch.randn(batch, width)
        if warm:
            self.step()  # makes the optimizer's state
        tensors = list(self.model.parameters())
        moments = [t for s in self.optimizer.state.values() for t in s.values()]
        self.parameters = sum(t.numel() for t in tensors)
        self.nbytes = sum(t.numel() * t.element_size() for t in [*tensors, *moments])

    def forward_backward(self) -> None:
        """Compute gradients; parameters and optimizer state do not change."""
        loss = self.model(self._batch).pow(2).mean()
        self.optimizer.zero_grad(set_to_none=False)
        loss.backward()

    def update(self) -> None:
        """Change parameters and optimizer state."""
        self.optimizer.step()

    def step(self) -> None:
        """Forward, backward, update."""
        self.forward_backward()
        self.update()

    def state(self) -> dict[str, Any]:
        """Everything to be saved, by reference, as the peers want it."""
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def listed_state(self) -> dict[str, Any]:
        """The same as `mnemo.Session` gives it to its keeper."""
        modules = self._tree.modules()
        return {
            "model": module_state(self.model),
            "unsaved": self._unsaved.state(modules),
            "attributes": self._attributes.look(modules),
            "optimizer": optimizer_state(self.optimizer),
        }


class Protected:
    """A training with a snapshot process of its own, in a directory of its own."""

    def __init__(self, training: Training, **sections: dict[str, Any]) -> None:
        self.training = training
        self._directory = Path(tempfile.mkdtemp(prefix="mnemo-benchmark-"))
        run = {"dir": str(self._directory), "journal": str(self._directory / "journal")}
        config = load_config(environ={}, run=run, **sections)
        self.identity = RunIdentity(f"benchmark-{os.getpid()}", stable=True, source="benchmark")
        self.keeper = Keeper(config, self.identity, Place())
        self.keeper.find()
        self.keeper.forget()
        self.keeper.begin({})
        self._tick = 0

    def boundary(self) -> float:
        """A step is done; the seconds that training stood still for a snapshot of it."""
        self._tick += 1
        position = Position(2 * self._tick, self._tick, 0, self._tick, time.time())
        begun = time.perf_counter()
        self.keeper.boundary(position, self.training.listed_state, watch=("model",))
        return time.perf_counter() - begun

    def step(self) -> tuple[float, float]:
        """A snapshot of the step before, beside a whole step; its seconds, and those blocked."""
        begun = time.perf_counter()
        stood = self.boundary()
        self.training.forward_backward()
        stood += self.keeper.before_update()
        self.training.update()
        return time.perf_counter() - begun, stood

    def close(self) -> None:
        """Give everything back."""
        self.keeper.close(End.GIVEN_UP)
        shutil.rmtree(self._directory, ignore_errors=True)

    def abandon(self) -> None:
        """Give everything back without waiting for what is being persisted."""
        self.keeper.close(End.INTERRUPTED)
        end_snapshot_process(self.keeper.paths)
        shutil.rmtree(self._directory, ignore_errors=True)


def end_snapshot_process(paths: RunPaths) -> None:
    """Have a snapshot process that a training left give its memory back."""
    client = lifecycle.find(paths)
    if client is not None:
        with client:
            client.tell(m.Shutdown(force=True))
            client.wait_for_end(30)
