"""A data-parallel loop under `mnemo.Session` whose ranks are replaced when they die.

Each process appends a line for every forward pass and every step that it makes to
``<out>/<rank>-<pid>.jsonl``; the one that ends writes ``<out>/<rank>.json``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import mnemo
import mnemo.comm
from mnemo import faults

ACCUMULATE = 2


class Net(nn.Module):
    """Something of each kind: buffers that differ by rank, random numbers, several buckets."""

    def __init__(self, step: Any) -> None:
        super().__init__()
        self.first = nn.Linear(16, 256)
        self.norm = nn.BatchNorm1d(256)
        self.drop = nn.Dropout(0.2)
        self.last = nn.Linear(256, 256)
        # Gradients of the last layer are on their way by then, those of the first are not.
        self.norm.weight.register_hook(lambda grad: faults.reach("backward", step=step()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.drop(torch.relu(self.norm(self.first(x)))))


class Optimizer(torch.optim.AdamW):
    """Can be killed when its update is due, and all ranks have come to it, and right behind it."""

    done: list[int]

    def step(self, closure: Any = None) -> Any:
        faults.reach("update", step=self.done[0])
        found = super().step(closure)
        faults.reach("updated", step=self.done[0])
        return found


class Notes:
    """What this process has done."""

    def __init__(self, out: Path, rank: int) -> None:
        self._file = (out / f"{rank}-{os.getpid()}.jsonl").open("a", buffering=1)

    def add(self, **what: Any) -> None:
        self._file.write(json.dumps(what) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--beside", type=int, help="step at which a group of gloo's own is made")
    args = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("mnemo")
    rank = dist.get_rank()
    notes = Notes(args.out, rank)
    torch.manual_seed(7)
    done = [0]
    model = DistributedDataParallel(Net(lambda: done[0]), bucket_cap_mb=0.05)
    optimizer = Optimizer(model.parameters(), lr=1e-2)
    optimizer.done = done
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3)
    data = TensorDataset(torch.randn(240, 16), torch.randn(240, 256))
    loader = DataLoader(data, batch_size=8, sampler=DistributedSampler(data))
    torch.manual_seed(100 + rank)  # another dropout on each rank
    run = mnemo.Session(
        model=model, optimizer=optimizer, scheduler=scheduler, snapshot={"every": args.every}
    )
    beside = None
    losses = []
    for number, (x, y) in enumerate(run.batches(loader, epochs=args.epochs)):
        done[0] = run.steps_done
        if run.steps_done == args.beside and beside is None:
            beside = dist.new_group(backend="gloo")
        if beside is not None:
            dist.all_gather_object([None] * dist.get_world_size(), number, group=beside)
        faults.reach("forward", step=run.steps_done)
        notes.add(forward=run.steps_done)
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        total = loss.detach().clone()
        dist.all_reduce(total)
        losses.append(total.item())
        if (number + 1) % ACCUMULATE == 0:
            faults.reach("between", step=run.steps_done)
            run.step()
            norm = sum(p.detach().norm() for p in model.parameters())
            dist.all_reduce(norm)
            faults.reach("behind", step=run.steps_done - 1)
            notes.add(step=run.steps_done, loss=total.item(), rng=torch.rand(()).item())
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(name.encode() + value.numpy().tobytes())
    every = [None] * dist.get_world_size()
    dist.all_gather_object(every, digest.hexdigest())
    (args.out / f"{rank}.json").write_text(json.dumps({"sha256": every, "steps": run.steps_done}))


if __name__ == "__main__":
    main()
