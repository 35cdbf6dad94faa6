"""A plain data-parallel training under `mnemo.Session`, on as many nodes as there are directories.

Each rank appends ``STEP LOSS`` to ``losses-RANK`` at each step, and at the end writes the hash of
all its parameters to ``hash-RANK``. With SKEW in the environment its clock is so many
seconds off, with WIDTH the model has so many hidden units, with LR the optimizer that rate.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

import mnemo


def train(out: Path, steps: int) -> None:
    rank = dist.get_rank()
    torch.manual_seed(7)
    width = int(os.environ.get("WIDTH", "256"))
    net = nn.Sequential(nn.Linear(64, width), nn.Dropout(0.1), nn.Tanh(), nn.Linear(width, 8))
    # Its buckets have the same order in the first step of a life as later: exact on many ranks.
    model = DistributedDataParallel(net, find_unused_parameters=True)
    torch.manual_seed(rank)
    optimizer = torch.optim.AdamW(model.parameters(), lr=float(os.environ.get("LR", "1e-3")))
    data = TensorDataset(torch.randn(steps * 4 * dist.get_world_size(), 64))
    loader = DataLoader(data, batch_size=4, sampler=DistributedSampler(data))
    run = mnemo.Session(model=model, optimizer=optimizer)
    with (out / f"losses-{rank}").open("a", buffering=1) as losses:
        for (x,) in run.batches(loader):
            loss = model(x).square().mean()
            loss.backward()
            run.step(loss)
            losses.write(f"{run.steps_done} {loss.item().hex()}\n")
    digest = hashlib.sha256()
    for tensor in model.state_dict().values():
        digest.update(tensor.numpy().tobytes())
    (out / f"hash-{rank}").write_text(digest.hexdigest())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("steps", type=int)
    words = parser.parse_args()
    torch.set_num_threads(1)
    if skew := float(os.environ.get("SKEW", "0")):
        true = time.time
        time.time = lambda: true() + skew
    dist.init_process_group("gloo")
    train(words.out, words.steps)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
