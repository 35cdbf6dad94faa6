"""The training of `benchmarks.recovery`: the example's GPT, with Lightning, on any number of ranks.

Under ``mnemo run`` with strategy ``mnemo_ddp``; elsewhere with ``ddp``, and a checkpoint of
Lightning's as often as `SHARE` pays for, from the newest of which it goes on.
"""

from __future__ import annotations

import math
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from data import StandardLibrary
from model import GPT
from torch import Tensor

from benchmarks.recovery_marks import mark

if "MNEMO_AGENT" in os.environ:
    import lightning_mnemo

SHARE = 0.03
"""Of step time that checkpoints may cost."""
_MEASURED = range(8, 14)
"""Steps of a fresh run after each of which a checkpoint is made, to know what one costs."""
_CONTEXT, _BATCH, _STEPS = 64, 8, 10**6
_EXAMPLE = Path(__file__).parents[1] / "examples" / "lightning_gpt"


class Marked(GPT):
    """Says what it does."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """One forward pass."""
        mark("forward", step=self.trainer.global_step + 1)
        return super().training_step(batch, batch_idx)

    def on_after_backward(self) -> None:
        """Gradients are reduced."""
        mark("backward", step=self.trainer.global_step + 1)


class Steps(L.Callback):
    """Says which are done."""

    def on_train_batch_end(self, trainer: L.Trainer, *_: object) -> None:
        """One is."""
        mark("step", step=trainer.global_step)


class Checkpoints(L.Callback):
    """Saves with Lightning, as often as a measurement at the beginning says."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._every = 0
        self._saves: list[float] = []
        self._begun: list[float] = []

    def state_dict(self) -> dict[str, int]:
        """Is not measured again."""
        return {"every": self._every}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """See `state_dict`."""
        self._every = state["every"]

    def on_train_batch_start(self, *_: object) -> None:
        """Takes the time until the end."""
        self._begun.append(time.perf_counter())

    def on_train_batch_end(self, trainer: L.Trainer, *_: object) -> None:
        """Saves where it is time."""
        step = trainer.global_step
        self._begun[-1] = time.perf_counter() - self._begun[-1]
        if not self._every and step in _MEASURED:
            self._save(trainer)
        elif not self._every and step > _MEASURED[-1]:
            cost, usual = statistics.median(self._saves), statistics.median(self._begun[4:])
            every = math.ceil(cost / (SHARE * usual))
            self._every = int(trainer.strategy.broadcast(every))
            mark("interval", every=self._every, save_s=cost, step_s=usual)
        if self._every and step % self._every == 0:
            self._save(trainer)
            mark("saved", step=step)

    def _save(self, trainer: L.Trainer) -> None:
        begun = time.perf_counter()
        new = self._path.with_suffix(".new")
        trainer.save_checkpoint(new)
        if trainer.is_global_zero:
            new.replace(self._path)
        trainer.strategy.barrier()
        self._saves.append(time.perf_counter() - begun)


def main() -> None:
    """Of a rank; the arguments: the number of ranks, where a checkpoint lies."""
    ranks, checkpoint = int(sys.argv[1]), Path(sys.argv[2])
    mark("imported")
    torch.set_num_threads(1)
    L.seed_everything(1, verbose=False)
    with_mnemo = "MNEMO_AGENT" in os.environ
    own: Any = (
        lightning_mnemo.MnemoCallback(_EXAMPLE / "mnemo.yaml")
        if with_mnemo
        else Checkpoints(checkpoint)
    )
    trainer = L.Trainer(
        accelerator="cpu",
        strategy="mnemo_ddp" if with_mnemo else "ddp",
        devices=ranks,
        max_steps=_STEPS,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Steps(), own],
    )
    model = Marked(context=_CONTEXT, steps=_STEPS)
    mark("built")
    found = checkpoint if not with_mnemo and checkpoint.exists() else None
    trainer.fit(model, StandardLibrary(_CONTEXT, _BATCH), ckpt_path=found)


if __name__ == "__main__":
    main()
