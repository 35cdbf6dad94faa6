"""One rank's life in a Lightning case: ``lightning_lab.py REQUEST``.

The request is a JSON object: the case's name, how many ranks, whether with mnemo, its settings.
What the `Recorder` saw goes to ``rows-RANK.jsonl`` in the working directory.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import lightning_cases
import numpy as np
import torch
from torch.utils.data._utils import worker

from lightning_mnemo import MnemoCallback
from mnemo import faults
from mnemo.snapshot.rng import capture_rng


def digest(*things: Any) -> str:
    """Of tensors, arrays and plain values, nested."""
    sha = hashlib.sha256()

    def visit(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            sha.update(str(value.dtype).encode() + value.detach().cpu().numpy().tobytes())
        elif isinstance(value, np.ndarray):
            sha.update(value.tobytes())
        elif isinstance(value, dict):
            for key in sorted(value, key=str):
                sha.update(str(key).encode())
                visit(value[key])
        elif isinstance(value, (list, tuple)):
            for item in value:
                visit(item)
        else:
            sha.update(repr(value).encode())

    for thing in things:
        visit(thing)
    return sha.hexdigest()[:16]


class Recorder(pl.Callback):
    """Writes what happened at every batch, validation and epoch, each with a key of its own."""

    def __init__(self, out: Path, fit: int) -> None:
        self.fit = fit
        self._file = (out / f"rows-{os.environ.get('RANK', '0')}.jsonl").open("a")

    def _write(self, trainer: pl.Trainer, kind: str, **row: Any) -> None:
        key = [self.fit, kind, trainer.current_epoch, trainer.fit_loop.epoch_loop.batch_idx]
        row["metrics"] = {k: repr(v.tolist()) for k, v in sorted(trainer.callback_metrics.items())}
        self._file.write(json.dumps({"key": key, **row}) + "\n")
        self._file.flush()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        self._write(
            trainer,
            "batch",
            batch_idx=batch_idx,
            step=trainer.global_step,
            loss=digest(loss),
            data=digest(batch),
            lr=[g["lr"] for o in trainer.optimizers for g in o.param_groups],
            rng=digest(capture_rng()),
        )

    def on_validation_end(self, trainer, pl_module):
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._write(trainer, "validation")

    def on_train_epoch_end(self, trainer, pl_module):
        self._write(trainer, "epoch")
        faults.reach("epoch_end", step=trainer.global_step)

    def final(self, trainer: pl.Trainer) -> None:
        module = trainer.lightning_module
        self._write(
            trainer,
            "final",
            step=trainer.global_step,
            epoch=trainer.current_epoch,
            parameters=digest(module.state_dict()),
            buffers=digest(dict(module.named_buffers())),
            optimizers=digest([o.state_dict()["state"] for o in trainer.optimizers]),
            rng=digest(capture_rng()),
            extra=lightning_cases.extra(trainer),
        )


class Settled(pl.Callback):
    """Reaches the phase ``settled`` when the step's snapshot is committed for certain.

    Elsewhere it depends on the machine's load whether the copy in the background is done.
    """

    def __init__(self, mnemo: MnemoCallback) -> None:
        self._mnemo = mnemo

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        assert self._mnemo._keeper is not None
        assert self._mnemo._keeper.settle()
        faults.reach("settled", step=trainer.global_step)


def run(request: dict[str, Any]) -> None:
    """Each fit of the case, in this process."""
    torch.set_num_threads(1)
    worker.MP_STATUS_CHECK_INTERVAL = 0.2  # seconds in which a killed life's workers end; else 5
    out = Path.cwd()
    for fit, case in enumerate(lightning_cases.make(request["case"], out)):
        recorder = Recorder(out, fit)
        callbacks = [*case.callbacks]
        if request["mnemo"]:
            callbacks.append(MnemoCallback(**{"snapshot": {"every": 1}, **request["settings"]}))
            if '"settled"' in os.environ.get(faults.ENV, ""):
                callbacks.append(Settled(callbacks[-1]))
        if request["ranks"] > 1:
            case.trainer.setdefault("strategy", "ddp")
        trainer = pl.Trainer(
            **{
                "accelerator": "cpu",
                "devices": request["ranks"],
                "max_epochs": 2,
                "val_check_interval": 0.5,
                "num_sanity_val_steps": 1,
                "logger": False,
                "enable_checkpointing": False,
                "enable_progress_bar": False,
                "enable_model_summary": False,
                "default_root_dir": str(out),
                **case.trainer,
            },
            callbacks=[*callbacks, recorder],
        )
        case.before(trainer)
        trainer.fit(case.model, case.train, case.val, **case.fit)
        recorder.final(trainer)
        faults.reach("last_part", step=trainer.global_step)
        case.after(trainer)


if __name__ == "__main__":
    run(json.loads(sys.argv[1]))
