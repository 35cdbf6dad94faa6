"""Ten steps of ranks that set their places in the program: ``session_elsewhere.py RUNS``.

RUNS is a JSON list: the section ``run`` of each rank. The last rank kills itself in step 7 of the
first life.
"""

from __future__ import annotations

import json
import os
import signal
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import mnemo


def train(runs: list[dict[str, str]]) -> None:
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo")
    torch.manual_seed(7)
    model = nn.parallel.DistributedDataParallel(nn.Linear(1, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    loader = DataLoader(TensorDataset(torch.arange(10.0)[:, None]))
    session = mnemo.Session(model=model, optimizer=optimizer, snapshot={"every": 1}, run=runs[rank])
    first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    for (x,) in session.batches(loader):
        if first and session.steps_done == 6:
            session.keeper.settle()
            dist.barrier()
            if rank == len(runs) - 1:
                os.kill(os.getpid(), signal.SIGKILL)
        model(x).square().mean().backward()
        session.step()


if __name__ == "__main__":
    torch.set_num_threads(1)
    train(json.loads(sys.argv[1]))
