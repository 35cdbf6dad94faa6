"""Training loops that are hard to resume: ``session_hard.py KIND OUT``.

The first life is killed by SIGKILL behind step 7 of 12. The second one goes on, and then trains
once more without mnemo, undisturbed; OUT gets the losses of steps 8 to 12 and the weights of both.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

import mnemo

ROWS = int(os.environ.get("ROWS", "24"))
X = torch.arange(ROWS * 4, dtype=torch.float32).reshape(ROWS, 4).sin()
EPOCHS = 2
KILL_BEHIND = int(os.environ.get("KILL_BEHIND", "7"))


class OwnGenerator(Dataset[torch.Tensor]):
    """Augments with a generator of its own."""

    def __init__(self) -> None:
        self.random = np.random.default_rng(3)

    def __len__(self) -> int:
        return len(X)

    def __getitem__(self, index: int) -> torch.Tensor:
        return X[index] + float(self.random.random())


class Shuffled(IterableDataset[torch.Tensor]):
    """Has no sampler, and an order that it draws itself."""

    def __iter__(self) -> Iterator[torch.Tensor]:
        order = list(range(len(X)))
        random.shuffle(order)
        return iter([X[i] for i in order])


class Stateful:
    """Knows where it is."""

    def __init__(self) -> None:
        self.next = 0

    def __iter__(self) -> Iterator[torch.Tensor]:
        while self.next < 6:
            self.next += 1
            yield X[4 * self.next - 4 : 4 * self.next] + torch.rand(())
        self.next = 0

    def state_dict(self) -> dict[str, int]:
        return {"next": self.next}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.next = state["next"]


class Scaled(DataLoader[torch.Tensor]):
    """Makes its iterator only when the first batch is asked for."""

    def __iter__(self) -> Iterator[torch.Tensor]:  # type: ignore[override]
        for batch in super().__iter__():
            yield 0.9 * batch


class Echoing(DataLoader[torch.Tensor]):
    """Gives each batch twice."""

    def __iter__(self) -> Iterator[torch.Tensor]:  # type: ignore[override]
        for batch in super().__iter__():
            yield batch
            yield batch + 0.1


LOADERS: dict[str, type[DataLoader[torch.Tensor]]] = {
    "evaluated": DataLoader,
    "evaluated, wrapped": Scaled,
    "echoing": Echoing,
}


def loader_of(kind: str) -> Iterable[torch.Tensor]:
    if kind in LOADERS:
        own = torch.Generator().manual_seed(2)
        return LOADERS[kind](OwnGenerator(), batch_size=4, shuffle=True, generator=own)
    if kind in ("stateful", "closure", "scaled"):
        return Stateful()
    if kind == "iterable":
        return DataLoader(Shuffled(), batch_size=4)
    return DataLoader(OwnGenerator(), batch_size=4, shuffle=True)


class Beside(nn.Linear):
    """Has state that is in no state dict."""

    mean: torch.Tensor

    def __init__(self, inputs: int, outputs: int, kind: str) -> None:
        super().__init__(inputs, outputs)
        self.kind = kind
        self.register_buffer("mean", torch.zeros(inputs), persistent=False)
        self.random = torch.Generator().manual_seed(6)
        self.others = random.Random(7)
        self.counted = 0
        self.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.kind == "counted":
            self.counted += 1
        self.mean = self.mean.lerp(x.detach().mean(0), 0.1)
        noise = torch.randn(x.shape, generator=self.random) * self.others.random()
        return super().forward((x - self.mean + noise) * (1 + self.counted))


def replace_snapshot_process(run: mnemo.Session) -> None:
    """Kill it, and wait until another one has taken its place without being asked for anything."""
    keeper = run.keeper
    assert keeper is not None
    old = keeper.smp_pid
    os.kill(old, signal.SIGKILL)
    deadline = time.monotonic() + 20
    while keeper.smp_pid == old:
        assert time.monotonic() < deadline, "nobody noticed"
        time.sleep(0.01)


def more(kind: str, model: nn.Sequential, loader: Iterable[torch.Tensor], number: int) -> None:
    """What some bodies do besides."""
    if kind == "unsaved" and number == 4:
        model[2].requires_grad_(True)
        model[1].eval()
    if kind.startswith("evaluated") and number % 2:
        # Through the very loader that is trained with, and at times not to its end.
        for seen, other in enumerate(loader):
            torch.rand(int(model(other).numel()))
            if seen == number % 4:
                break


def train(kind: str, *, protected: bool) -> dict[str, Any]:
    torch.manual_seed(5)
    random.seed(5)
    model = nn.Sequential(nn.Linear(4, 96), nn.Dropout(0.1), nn.Linear(96, 96), nn.Linear(96, 1))
    model.register_buffer("sparse", torch.eye(3).to_sparse())
    if kind in ("unsaved", "counted"):
        model.insert(2, Beside(96, 96, kind))
    average = torch.optim.swa_utils.AveragedModel(model)
    optimizer: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    if kind == "closure":
        optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3, history_size=4)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.9)
    # Grows at every other step, and is too large for float16 at first.
    scaler = torch.amp.GradScaler(
        "cpu", init_scale=2.0**127, growth_interval=2, enabled=kind == "scaled"
    )
    loader = loader_of(kind)
    run = mnemo.Session(
        model=model,
        optimizer=optimizer,
        scheduler=scheduler,
        objects={"average": average, "scaler": scaler},
        snapshot={"every": int(os.environ.get("EVERY", "1"))},
    )
    unprotected = (batch for _ in range(EPOCHS) for batch in loader)
    losses = {}
    for step, x in enumerate(run.batches(loader, EPOCHS) if protected else unprotected):
        number = run.steps_done if protected else step
        if protected and number == KILL_BEHIND and os.environ.get("KILL"):
            assert run.keeper is not None
            run.keeper.settle()
            if os.environ.get("KILL_SMP"):
                replace_snapshot_process(run)
            os.kill(os.getpid(), int(os.environ["KILL"]))

        def closure(x: torch.Tensor = x) -> torch.Tensor:
            optimizer.zero_grad()
            loss: torch.Tensor = model(x).square().mean()
            scaler.scale(loss).backward()
            return loss

        if kind == "closure":
            losses[number + 1] = closure().item()
            run.step(closure=closure)
        else:
            loss = closure()
            losses[number + 1] = loss.item()
            run.step(loss, scaler=scaler if kind == "scaled" else None)
        # What a body does behind the step belongs to the step as well.
        average.update_parameters(model)
        for p in model.parameters():
            p.data.clamp_(-0.2, 0.2)
        torch.rand(3)
        more(kind, model, loader, number)
    if kind == "scaled":
        losses[KILL_BEHIND + 1] += scaler.get_scale()
    weights = [p.double().sum().item() for m in (model, average) for p in m.parameters()]
    return {"losses": {n: x for n, x in losses.items() if n > 7}, "weights": weights}


if __name__ == "__main__":
    torch.set_num_threads(1)
    results = [train(sys.argv[1], protected=True)]
    if os.environ.get("KILL") != str(int(signal.SIGTERM)):
        results.append(train(sys.argv[1], protected=False))
    Path(sys.argv[2]).write_text(json.dumps(results))
