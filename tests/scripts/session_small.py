"""A plain training loop under `mnemo.Session`, with tied weights.

At step ``--hold-at`` it prints ``holding STEP`` and waits to be killed. Of several such steps, each
is for a training of its own (a fit), one after the other; 0 is never reached.
"""

from __future__ import annotations

import argparse
import signal

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import mnemo


class Tied(nn.Module):
    """Two tensors under three names; one of them large enough to be copied in the background."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(64, 512, bias=False)
        self.encode = nn.Linear(512, 512, bias=False)
        self.decode = nn.Linear(512, 512, bias=False)
        self.decode.weight = self.encode.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.decode(torch.relu(self.encode(self.wide(x))))


def train(hold_at: int) -> None:
    torch.manual_seed(7)
    model = Tied()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loader = DataLoader(TensorDataset(torch.randn(160, 64)), batch_size=8, shuffle=True)
    run = mnemo.Session(model=model, optimizer=optimizer, snapshot={"every": 1})
    for (x,) in run.batches(loader, epochs=2):
        if 0 < hold_at == run.steps_done:
            run.keeper.settle()
            print(f"holding {hold_at}", flush=True)
            signal.pause()
        model(x).square().mean().backward()
        run.step()
    print("finished", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--hold-at", type=int, nargs="+", default=[0])
    args = parser.parse_args()
    torch.set_num_threads(1)
    for hold_at in args.hold_at:
        train(hold_at)


if __name__ == "__main__":
    main()
