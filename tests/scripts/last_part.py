"""A plain loop under `mnemo.Session`, and a last part behind it that may die: ``last_part.py OUT``.

The environment says how: ``DIE`` is ``exception``, ``kill``, ``exit``, once (``OUT/died`` is there
then), in rank ``DIE_RANK``; ``FITS`` trainings one after the other; ``CHILD`` is how
`multiprocessing` makes the process that trains, if another one does, and ``DIE_BEHIND_CHILD`` is
``DIE`` for the one that made it. What the last part saw goes to
``OUT/final-RANK.json``, and the memory kept behind each training to ``OUT/memory.json``.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

import mnemo
from mnemo.smp import lifecycle
from mnemo.smp.paths import RunPaths

RANK = int(os.environ.get("RANK", "0"))
EVERY = int(os.environ.get("EVERY", "1"))


def train(fit: int) -> dict[str, Any]:
    """One training; what a last save would hold of it, and how many batches this life did."""
    torch.manual_seed(7 + fit)
    model: nn.Module = nn.Sequential(nn.Linear(64, 256), nn.Dropout(0.1), nn.Linear(256, 64))
    if dist.is_initialized():
        model = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    loader = DataLoader(TensorDataset(torch.randn(48, 64)), batch_size=8, shuffle=True)
    run = mnemo.Session(model=model, optimizer=optimizer, snapshot={"every": EVERY})
    batches = 0
    for (x,) in run.batches(loader, epochs=2):
        batches += 1
        model(x).square().mean().backward()
        run.step()
    sha = hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.parameters()))
    saved = {"weights": sha.hexdigest(), "steps": run.steps_done, "drawn": torch.rand(3).tolist()}
    return {"batches": batches, "saved": saved}


def memory() -> dict[str, int]:
    """Bytes of snapshots that this process and the snapshot process hold, and one buffer's."""
    sys.path.append(str(Path(__file__).parents[1]))
    from smp_lab import memory_of

    client = lifecycle.find(RunPaths.of(os.environ["MNEMO_RUN_ID"], os.environ["MNEMO_RUN__DIR"]))
    assert client is not None
    with client:
        fits = client.status()["fits"]
        buffers = [s["bytes"] for fit in fits for s in fit["segments"]]
        return {
            "here": memory_of(os.getpid()),
            "there": memory_of(client.pid),
            "buffers": len(buffers),
            "bytes": sum(buffers),
        }


def die(how: str, marker: Path) -> None:
    """As the last part may, but in the first life only."""
    if not how or marker.exists() or int(os.environ.get("DIE_RANK", "0")) != RANK:
        return
    marker.touch()
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "exit":
        sys.exit(1)
    raise OSError(28, "No space left on device")


def main(out: Path) -> None:
    torch.set_num_threads(1)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        dist.init_process_group("gloo")
    kept = []
    for fit in range(int(os.environ.get("FITS", "1"))):
        final = train(fit)
        if "FITS" in os.environ:
            kept.append(memory())
    (out / "memory.json").write_text(json.dumps(kept))
    if dist.is_initialized():
        dist.barrier()
    die(os.environ.get("DIE", ""), out / "died")
    (out / f"final-{RANK}.json").write_text(json.dumps(final))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    place = Path(sys.argv[1])
    if "CHILD" in os.environ:
        child = multiprocessing.get_context(os.environ["CHILD"]).Process(target=main, args=(place,))
        child.start()
        child.join()
        die(os.environ.get("DIE_BEHIND_CHILD", ""), place / "died")
        sys.exit(0 if child.exitcode == 0 else 3)
    main(place)
