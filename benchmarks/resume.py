"""From the start of a process to its first repeated step, and restoring against a checkpoint file.

100 M parameters with AdamW (1.2 GB of state), one rank; ``--quick`` takes 25 M. A process trains
two steps and is killed; others resume from memory and are killed in turn, every other one without
reading ahead. `restore` is the time that the program stands still for its state: from asking for
it until model and optimizer hold it. Restoring is compared with loading the same state from a
``.ckpt`` whose pages were dropped from the cache before.

With *reading ahead*, the snapshot is read in the background from before the model and the optimizer
are made, as it is where `MnemoCallback` is made before the model. What that costs them shows in
`setup`, and what it comes to in `total`. *Not read ahead* is what any program gets that no launcher
has given a rank, and about what a `mnemo.Session` gets, which is made behind the model.

Before either is timed, memory is touched and freed until that goes at a steady rate. On a virtual
machine the first touch of a page costs the host's fault, which is seconds for a state of this size
and hits whoever comes first; where a training has just died, that memory has been in use.
"""

from __future__ import annotations

import json
import mmap
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.harness import Report, Samples

_BYTES_PER_BLOCK = 12 * 4 * 2**20
"""Of state, about: parameters and both moments of two matrices of 1024 x 2048."""


def run(quick: bool, report: Report) -> None:
    """Fill ``report``."""
    blocks, lives = (6, 2) if quick else (24, 6)
    directory = Path(tempfile.mkdtemp(prefix="mnemo-benchmark-"))
    try:
        _train(directory, blocks, "first", ahead=False)
        found: dict[bool, list[dict[str, float]]] = {True: [], False: []}
        for turn in range(lives):
            for ahead in (True, False) if turn % 2 else (False, True):
                found[ahead].append(_train(directory, blocks, "later", ahead=ahead))
    finally:
        _clean(directory)
    for name in ("imports", "setup", "restore", "first_step", "total"):
        _row(report, name, [f[name] for f in found[True]])
        _row(report, f"{name}, not read ahead", [f[name] for f in found[False]])
    disk = [f["disk"] for f in found[True]]
    _row(report, "same state from a cold .ckpt", disk)
    ratio = Samples(disk).over(Samples([f["restore"] for f in found[True]]))
    report.bar("restore_over_disk", ratio.median, 5, "higher")


def _row(report: Report, phase: str, seconds: list[float]) -> None:
    samples = Samples(seconds)
    low, high = samples.quartiles
    report.row(phase=phase, seconds=samples.median, q1=low, q3=high)


def _train(directory: Path, blocks: int, life: str, *, ahead: bool) -> dict[str, float]:
    """One life; killed by itself at its end, as a crash would."""
    command = [sys.executable, "-m", "benchmarks.resume", str(directory), str(blocks), life]
    # Only of a process that a launcher has given a rank is the state known this early.
    environ = {
        **{k: v for k, v in os.environ.items() if k != "RANK"},
        **({"RANK": "0"} if ahead else {}),
    }
    begun = time.time()
    done = subprocess.run(command, env=environ, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != -signal.SIGKILL:
        msg = f"the {life} life ended with {done.returncode} instead of by SIGKILL"
        raise RuntimeError(msg)
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    figures["imports"] = figures.pop("imported") - begun
    figures["total"] = figures.pop("stepped") - begun
    return figures


def _settle_memory(size: int) -> None:
    """Touch and free ``size`` bytes until the host backs them, which shows in a steady rate."""
    fastest = float("inf")
    for _ in range(10):
        begun = time.perf_counter()
        with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
            memory.madvise(mmap.MADV_HUGEPAGE)
            np.frombuffer(memory, dtype=np.uint8)[:: mmap.PAGESIZE] = 1
        took = time.perf_counter() - begun
        if took > 0.7 * fastest and took < 1.4 * fastest:
            return
        fastest = min(fastest, took)


def _live(directory: Path, blocks: int, life: str) -> None:
    import torch

    from benchmarks.training import Training
    from mnemo.config import load_config
    from mnemo.session import prefetch
    from mnemo.session.identity import RunIdentity
    from mnemo.session.keeper import Keeper
    from mnemo.session.place import Place
    from mnemo.smp.board import Position
    from mnemo.snapshot.listing import MODULE_PARTS, join_module_state

    imported = time.time()
    _settle_memory(2 * blocks * _BYTES_PER_BLOCK)
    settled = time.time() - imported
    run = {"id": "resume", "dir": str(directory), "journal": str(directory / "journal")}
    config = load_config(environ={}, run=run, snapshot={"every": 1})
    prefetch.begin(config)
    training = Training(blocks=blocks, warm=life == "first")
    keeper = Keeper(config, RunIdentity("resume", stable=True, source="benchmark"), Place())
    begun = time.time()
    restored = keeper.find()
    if restored is None:
        keeper.forget()
    else:
        prefixes = [f"model.{part}." for part in MODULE_PARTS]
        keeper.accept(restored, training.model.state_dict(), prefixes)
        training.model.load_state_dict(join_module_state(restored.state["model"]))
        training.optimizer.load_state_dict(restored.state["optimizer"])
    loaded = time.time()
    keeper.begin({})
    step = 0 if restored is None else restored.step
    after_begin = time.time()
    training.step()
    stepped = time.time()
    for number in (step + 1, step + 2):
        position = Position(2 * number, number, 0, number, time.time())
        keeper.boundary(position, training.listed_state, watch=("model",))
        keeper.settle()
        training.step()
    disk = 0.0
    if life == "later":
        path = directory / "state.ckpt"
        torch.save(training.state(), path)
        disk = _cold_load(path, training)
    figures = {
        "imported": imported, "setup": begun - imported - settled, "restore": loaded - begun,
        "first_step": stepped - after_begin, "stepped": stepped - settled, "disk": disk,
    }  # fmt: skip
    print(json.dumps(figures), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)


def _cold_load(path: Path, training: object) -> float:
    """Seconds to load a checkpoint file, none of which is in the page cache, into the training."""
    import torch

    from benchmarks.training import Training

    assert isinstance(training, Training)
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)
    _settle_memory(2 * 12 * training.parameters)
    begun = time.perf_counter()
    state = torch.load(path, weights_only=True)
    training.model.load_state_dict(state["model"])
    training.optimizer.load_state_dict(state["optimizer"])
    took = time.perf_counter() - begun
    path.unlink()
    return took


def _clean(directory: Path) -> None:
    """End the snapshot process that the killed trainings left, and remove its directory."""
    from benchmarks.training import end_snapshot_process
    from mnemo.smp.paths import RunPaths

    end_snapshot_process(RunPaths.of("resume", directory))
    shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    _live(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
