"""A plain loop of ten batches: ``session_starts.py OUT WAY...``; each batch's number goes to OUT.

Ways: ``killed`` in step 7, ``leaves`` by break behind step 4, learns ``faster``, has its only group
``decaying``, has a ``lazy`` layer, or a ``buffer``, or a ``wider`` one, ``adds`` a group of
parameters behind step 2, or has it ``added`` before the loop.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import mnemo


def train(out: Path, ways: set[str]) -> None:
    torch.manual_seed(7)
    first = nn.LazyLinear(1000) if "lazy" in ways else nn.Linear(1, 1000)
    model = nn.Sequential(first, second := nn.Linear(1000, 1))
    if "buffer" in ways:
        model.register_buffer("table", torch.zeros(2 if "wider" in ways else 1))
    parameters = first.parameters() if ways & {"adds", "added"} else model.parameters()
    optimizer = torch.optim.SGD(parameters, lr=1e-3 if "faster" in ways else 1e-4, momentum=0.9)
    if "added" in ways:
        optimizer.add_param_group({"params": second.parameters()})
    if "decaying" in ways:
        optimizer.param_groups[0]["weight_decay"] = 0.1
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    loader = DataLoader(TensorDataset(torch.arange(10.0)[:, None]))
    run = mnemo.Session(
        model=model, optimizer=optimizer, scheduler=scheduler, snapshot={"every": 1}
    )
    for (x,) in run.batches(loader):
        with out.open("a") as file:
            file.write(f"{int(x)}\n")
        if "adds" in ways and run.steps_done == 2 and len(optimizer.param_groups) == 1:
            optimizer.add_param_group({"params": second.parameters()})
        if "killed" in ways and run.steps_done == 6:
            run.keeper.settle()
            os.kill(os.getpid(), signal.SIGKILL)
        model(x).square().mean().backward()
        run.step()
        if "leaves" in ways and run.steps_done == 4:
            break


if __name__ == "__main__":
    torch.set_num_threads(1)
    train(Path(sys.argv[1]), set(sys.argv[2:]))
