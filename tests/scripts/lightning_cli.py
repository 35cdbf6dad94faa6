"""A LightningCLI whose callback comes from YAML by its class path."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.cli import LightningCLI
from lightning_cases import Net, loader, val
from lightning_lab import digest


class Data(LightningDataModule):
    def train_dataloader(self):
        return loader()

    def val_dataloader(self):
        return val()


if __name__ == "__main__":
    torch.set_num_threads(1)
    cli = LightningCLI(Net, Data, seed_everything_default=7)
    final = {"parameters": digest(cli.model.state_dict()), "step": cli.trainer.global_step}
    Path(os.environ["OUT"], f"final-{cli.trainer.global_rank}.json").write_text(json.dumps(final))
