"""As `nodes_train`, by Lightning under torchrun's environment, on nodes with one rank each.

It validates every ten steps. With STOP_AT in the environment each rank asks itself to stop in the
middle of the validation after that step, once.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import signal
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

    def validation_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        self.log("loss", self.net(batch[0]).square().mean(), sync_dist=True)
        stopped = self._losses.with_name(f"stopped-{self.global_rank}")
        if str(self.global_step) == os.environ.get("STOP_AT") and batch_idx == 2:
            try:
                stopped.touch(exist_ok=False)
            except FileExistsError:
                return
            os.kill(os.getpid(), signal.SIGTERM)

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
        val_check_interval=10,
        num_sanity_val_steps=0,
        callbacks=[MnemoCallback()],
    )
    validation = DataLoader(TensorDataset(torch.randn(5 * 4 * nodes, 64)), batch_size=4)
    trainer.fit(module, DataLoader(data, batch_size=4, shuffle=True), validation)
    digest = hashlib.sha256()
    for tensor in module.state_dict().values():
        digest.update(tensor.numpy().tobytes())
    (words.out / f"hash-{rank}").write_text(digest.hexdigest())


if __name__ == "__main__":
    main()
