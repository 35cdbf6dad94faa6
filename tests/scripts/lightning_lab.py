"""Runs Lightning cases, each life in a process forked from one that has imported everything.

Reads requests from standard input, one JSON object a line: the case's name, where to write, the
environment, how many ranks. Each rank is a process of its own that can be killed; the answer has
their exit codes, as ``subprocess`` gives them. What a rank prints goes to ``rank-N.err``.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import os
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import lightning_cases
import numpy as np
import torch

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


def run(request: dict[str, Any]) -> None:
    """One life of a case, in this process."""
    torch.set_num_threads(1)
    out = Path(request["out"])
    os.chdir(out)
    settings = request.get("settings", {})
    for fit, case in enumerate(lightning_cases.make(request["case"], out)):
        recorder = Recorder(out, fit)
        callbacks = [*case.callbacks]
        if request.get("mnemo", True):
            callbacks.append(MnemoCallback(**{"snapshot": {"every": 1}, **settings}))
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
        case.after(trainer)


def child(request: dict[str, Any], rank: int) -> int:
    """What a forked process does; its exit code."""
    os.environ.clear()
    os.environ.update(request["env"])
    if request["ranks"] > 1:
        os.environ.update({"RANK": str(rank), "LOCAL_RANK": str(rank)})
    for number, name in ((1, "out"), (2, "err")):
        path = Path(request["out"]) / f"rank-{rank}.{name}"
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(fd, number)
        os.close(fd)
    tempfile.tempdir = None
    faults.arm(os.environ)
    code = 0
    try:
        run(request)
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else 1
    except BaseException:  # noqa: BLE001 - as the interpreter's own end
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def serve() -> None:
    """Until standard input ends."""
    for line in sys.stdin:
        request = json.loads(line)
        pids = {}
        for rank in range(request["ranks"]):
            pid = os.fork()
            if pid == 0:
                os._exit(child(request, rank))
            pids[pid] = rank
        print(json.dumps({"pids": list(pids)}), flush=True)
        codes: dict[int, int] = {}
        while len(codes) < len(pids):
            pid, status = os.wait()
            if pid not in pids:
                continue
            code = os.waitstatus_to_exitcode(status)
            codes[pids[pid]] = code
            if code:
                for other, rank in pids.items():
                    if rank not in codes and code < 0:
                        os.kill(other, 9)
        print(json.dumps({"codes": [codes[rank] for rank in sorted(codes)]}), flush=True)


if __name__ == "__main__":
    print(json.dumps({"ready": True}), flush=True)
    serve()
