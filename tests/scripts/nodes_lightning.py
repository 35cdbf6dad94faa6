"""As `nodes_train`, by Lightning under torchrun's environment, on nodes with one rank each."""

from __future__ import annotations

import argparse
import hashlib
import os
from pathlib import Path

import lightning as L
import torch
from torch.utils.data import DataLoader, TensorDataset

from lightning_mnemo import MnemoCallback


class Module(L.LightningModule):
    def __init__(self, losses: Path) -> None:
        super().__init__()
        self._losses = losses
        self.net = torch.nn.Sequential(
            torch.nn.Linear(64, 256), torch.nn.Dropout(0.1), torch.nn.Linear(256, 8)
        )

    def training_step(self, batch: list[torch.Tensor]) -> torch.Tensor:
        loss = self.net(batch[0]).square().mean()
        with self._losses.open("a") as losses:
            losses.write(f"{self.global_step + 1} {loss.item().hex()}\n")
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("steps", type=int)
    words = parser.parse_args()
    torch.set_num_threads(1)
    rank, nodes = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    L.seed_everything(7, verbose=False)
    module = Module(words.out / f"losses-{rank}")
    data = TensorDataset(torch.randn(words.steps * 4 * nodes, 64))
    trainer = L.Trainer(
        accelerator="cpu",
        num_nodes=nodes,
        strategy="ddp",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=words.out,
        callbacks=[MnemoCallback()],
    )
    trainer.fit(module, DataLoader(data, batch_size=4, shuffle=True))
    digest = hashlib.sha256()
    for tensor in module.state_dict().values():
        digest.update(tensor.numpy().tobytes())
    (words.out / f"hash-{rank}").write_text(digest.hexdigest())


if __name__ == "__main__":
    main()
