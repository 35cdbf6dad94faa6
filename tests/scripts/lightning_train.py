"""A training script as users write them, to be started by every launcher there is."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning_cases import Net, loader, val
from lightning_lab import Recorder, digest

from lightning_mnemo import MnemoCallback
from mnemo import faults


class Slowly(Net):
    """Waits at a step until it is told to go on, so that a signal finds it there."""

    def training_step(self, batch, batch_idx):
        faults.reach("step", step=self.global_step)
        return super().training_step(batch, batch_idx)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--strategy", default="auto")
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--settings", type=json.loads, default={})
    args = parser.parse_args()
    out = Path(os.environ["OUT"])
    torch.set_num_threads(1)
    pl.seed_everything(7, verbose=False)
    model = Slowly()
    callbacks: list[pl.Callback] = [LateRecorder(out)]
    if "PLAIN" not in os.environ:
        callbacks.insert(0, MnemoCallback(**{"snapshot": {"every": 1}, **args.settings}))
    trainer = pl.Trainer(
        accelerator="cpu",
        strategy=args.strategy,
        devices=args.devices,
        max_epochs=2,
        val_check_interval=0.5,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks,
    )
    trainer.fit(model, loader(), val())
    final = {"parameters": digest(model.state_dict()), "step": trainer.global_step}
    (out / f"final-{trainer.global_rank}.json").write_text(json.dumps(final))


class LateRecorder(pl.Callback):
    """A `Recorder` made where the rank is known; launchers that fork or spawn send it along."""

    def __init__(self, out: Path) -> None:
        self._out = out
        self._recorder: Recorder | None = None

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if self._recorder is None:
            os.environ["RANK"] = str(trainer.global_rank)
            self._recorder = Recorder(self._out, 0)
        self._recorder.on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_train_end(self, trainer, pl_module):
        assert self._recorder is not None
        self._recorder.final(trainer)
        self._recorder = None


if __name__ == "__main__":
    main()
