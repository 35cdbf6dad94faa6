"""One of two jobs with one run id: ``session_twice.py first|second DIRECTORY`` with two pipes.

The first begins to train when it is told to, says so, and trains on until it is told again. With
``second`` a job lets the first begin, and then begins itself.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch.utils.data import DataLoader

import mnemo


def train(which: str, directory: Path) -> None:
    told, said = directory / "told", directory / "said"
    if which == "first":
        told.read_text()
    else:
        told.write_text("begin")
        said.read_text()
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    run = mnemo.Session(model=model, optimizer=optimizer, snapshot={"every": 1})
    for x in run.batches(DataLoader(torch.ones(4, 1))):
        if run.steps_done == 2:
            run.keeper.settle()
            said.write_text("trains")
            told.read_text()
        model(x).sum().backward()
        run.step()
    print("trained", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    train(sys.argv[1], Path(sys.argv[2]))
