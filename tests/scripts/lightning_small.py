"""A Lightning run with everything that makes an exact resume hard, small enough to be killed often.

BatchNorm, dropout, gradient accumulation, a per-step scheduler, torchmetrics, epoch averages,
validation in mid-epoch, checkpoints. Every batch's loss goes to ``losses-<rank>.jsonl``; the end
state to ``final-<rank>.json``.

Phases that only a script knows: ``buckets`` (some gradients are being reduced, others are not
there yet), ``reduced``, ``updating`` (some parameters are updated), ``scheduler`` and ``saving``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanMetric

from lightning_mnemo import MnemoCallback, MnemoDDPStrategy
from mnemo import faults


class Net(pl.LightningModule):
    def __init__(self, out: Path, width: int) -> None:
        super().__init__()
        self.out = out
        self.net = nn.Sequential(
            nn.Linear(64, width),
            nn.BatchNorm1d(width),
            nn.ReLU(),
            nn.Dropout(0.2),
            nn.Linear(width, 1),
        )
        # Gradients of the last layer are on their way by then, those of the first are not.
        self.net[1].weight.register_hook(lambda grad: self.reach("buckets"))
        self.running = MeanMetric()

    def reach(self, phase):
        if self.reduces:
            faults.reach(phase)

    def training_step(self, batch, batch_idx):
        x, y = batch
        self.reduces = (batch_idx + 1) % self.trainer.accumulate_grad_batches == 0
        loss = ((self.net(x) - y) ** 2).mean()
        self.running.update(loss.detach())
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.log("running", self.running, on_step=False, on_epoch=True)
        row = {
            "epoch": self.current_epoch,
            "batch": batch_idx,
            "step": self.global_step,
            "loss": loss.item().hex(),
            "data": float(x.sum()).hex(),
        }
        with (self.out / f"losses-{self.global_rank}.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        return loss

    def on_after_backward(self):
        self.reach("reduced")

    def lr_scheduler_step(self, scheduler, metric):
        faults.reach("scheduler")
        super().lr_scheduler_step(scheduler, metric)
        faults.reach("scheduled")

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_loss", ((self.net(x) - y) ** 2).mean(), sync_dist=True)

    def on_train_epoch_end(self):
        metrics = {k: v.item().hex() for k, v in sorted(self.trainer.callback_metrics.items())}
        with (self.out / f"epochs-{self.global_rank}.jsonl").open("a") as file:
            file.write(json.dumps({"epoch": self.current_epoch, **metrics}) + "\n")

    def configure_optimizers(self):
        first, *others = self.net.children()
        groups = [{"params": first.parameters()}, {"params": nn.ModuleList(others).parameters()}]
        optimizer = AdamW(groups, lr=1e-3)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 5, 0.8)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


class AdamW(torch.optim.AdamW):
    def _init_group(self, group, *lists):
        if group is self.param_groups[-1]:
            faults.reach("updating")
        return super()._init_group(group, *lists)


class Checkpoints(ModelCheckpoint):
    def _save_checkpoint(self, trainer, filepath):
        if not trainer.is_global_zero:  # it waits for rank 0
            faults.reach("saving")
        super()._save_checkpoint(trainer, filepath)


class Files(TorchCheckpointIO):
    """Of rank 0."""

    def save_checkpoint(self, checkpoint, path, storage_options=None):
        faults.reach("saving")  # whether it is there is asked by others, who have been answered
        super().save_checkpoint(checkpoint, path, storage_options)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--max-steps", type=int, default=-1)
    parser.add_argument("--accumulate", type=int, default=2)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--samples", type=int, default=320)
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--settings", type=json.loads, default={})
    parser.add_argument("--save-every", type=int, default=0, help="steps; 0 for never")
    parser.add_argument("--strategy", default="ddp")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    pl.seed_everything(7, verbose=False)
    g = torch.Generator().manual_seed(5)
    x = torch.randn(args.samples, 64, generator=g)
    data = TensorDataset(x, x[:, :1] * 2 + x[:, 1:2])
    train = DataLoader(data, batch_size=8, shuffle=True, num_workers=args.workers)
    val = DataLoader(TensorDataset(*data[:64]), batch_size=16)
    sections = {"snapshot": {"every": args.every}, **args.settings}
    callbacks: list[pl.Callback] = [MnemoCallback(**sections)]
    if args.save_every:
        every = {"every_n_train_steps": args.save_every, "save_top_k": 1, "save_last": True}
        callbacks.append(Checkpoints(args.out / "checkpoints", **every))
    strategy = args.strategy
    if strategy == "mnemo_ddp":
        strategy = MnemoDDPStrategy(bucket_cap_mb=0.01)  # one bucket each
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=args.ranks,
        strategy=strategy if args.ranks > 1 else "auto",
        plugins=[Files()] if args.save_every else [],
        max_epochs=args.epochs if args.max_steps < 0 else None,
        max_steps=args.max_steps,
        accumulate_grad_batches=args.accumulate,
        val_check_interval=0.5,
        num_sanity_val_steps=1,
        logger=False,
        enable_checkpointing=bool(args.save_every),
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks,
    )
    model = Net(args.out, args.width)
    trainer.fit(model, train, val)
    digest = hashlib.sha256(
        b"".join(t.numpy().tobytes() for t in model.state_dict().values())
    ).hexdigest()
    final = {
        "sha256": digest,
        "step": trainer.global_step,
        "epoch": trainer.current_epoch,
        "lr": trainer.optimizers[0].param_groups[0]["lr"],
        "metrics": {k: v.item().hex() for k, v in sorted(trainer.callback_metrics.items())},
    }
    (args.out / f"final-{os.environ.get('RANK', trainer.global_rank)}.json").write_text(
        json.dumps(final)
    )


if __name__ == "__main__":
    main()
