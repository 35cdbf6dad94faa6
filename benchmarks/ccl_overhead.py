"""What the reconfigurable backend adds to all-reduce and to a step of DDP, over plain gloo.

The order of ranks in sums is kept by the backend and not by gloo. Results are kept for ranks that
are replaced, and a step has its boundary and its barrier before the update. Both run in the same
processes, in turns.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import time
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from benchmarks.harness import Samples, interleaved
from benchmarks.training import Training
from mnemo import comm

if TYPE_CHECKING:
    from collections.abc import Callable

    from benchmarks.harness import Report

BACKENDS = ("gloo", "mnemo")
SIZES = (1 << 10, 32 << 10, 1 << 20, 16 << 20, 64 << 20)
BLOCKS, BATCH = 3, 256
_ticks = itertools.count()
"""Boundaries."""


def run(quick: bool, report: Report) -> None:
    """Measure at 2 and 3 ranks."""
    for ranks in (2, 3):
        found = _with_ranks(ranks, quick)
        for size, taken in found["allreduce"].items():
            samples = {name: Samples(values) for name, values in taken.items()}
            ratio = samples["mnemo"].over(samples["gloo"])
            report.row(
                ranks=ranks,
                what=f"all-reduce of {int(size) >> 10} KiB",
                gloo_ms=1000 * samples["gloo"].median,
                mnemo_ms=1000 * samples["mnemo"].median,
                ratio=ratio.median,
                low=ratio.quartiles[0],
                high=ratio.quartiles[1],
            )
        samples = {name: Samples(values) for name, values in found["step"].items()}
        ratio = samples["mnemo"].over(samples["gloo"])
        report.row(
            ranks=ranks,
            what="DDP step",
            gloo_ms=1000 * samples["gloo"].median,
            mnemo_ms=1000 * samples["mnemo"].median,
            ratio=ratio.median,
            low=ratio.quartiles[0],
            high=ratio.quartiles[1],
        )
        report.bar(f"ddp_step_{ranks}_ranks", ratio.median, 1.02, "lower")


def _with_ranks(ranks: int, quick: bool) -> dict[str, Any]:
    store = dist.TCPStore("127.0.0.1", 0, None, is_master=True, wait_for_workers=False)
    command = [sys.executable, "-m", "benchmarks.ccl_overhead"]
    processes = [
        subprocess.Popen(
            [*command, json.dumps([rank, ranks, store.port, quick])], stdout=subprocess.PIPE
        )
        for rank in range(ranks)
    ]
    said = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        msg = "a rank failed; its words are above"
        raise RuntimeError(msg)
    return json.loads(said[0])


def _rank(rank: int, ranks: int, port: int, quick: bool) -> None:
    torch.set_num_threads(1)
    comm.mode.replaceable = True
    timeout = timedelta(seconds=120)
    store = dist.TCPStore("127.0.0.1", port, None, is_master=False, timeout=timeout)
    dist.init_process_group("mnemo", store=store, rank=rank, world_size=ranks, timeout=timeout)
    comm.mark(next(_ticks))
    groups = {"gloo": dist.new_group(backend="gloo"), "mnemo": dist.group.WORLD}
    found: dict[str, Any] = {"allreduce": {}}
    for size in SIZES[:3] if quick else SIZES:
        x = torch.randn(size // 4)
        rounds = 6 if size > 1 << 20 else 100
        cases = {name: _reduce(x, groups[name]) for name in BACKENDS}
        taken = interleaved(cases, rounds=rounds // (4 if quick else 1), warmup=2)
        found["allreduce"][size] = {name: list(taken[name].values) for name in BACKENDS}
    steps = {name: _step(groups[name]) for name in BACKENDS}
    taken = interleaved(steps, rounds=6 if quick else 20, warmup=2)
    found["step"] = {name: list(taken[name].values) for name in BACKENDS}
    if rank == 0:
        print(json.dumps(found), flush=True)
    dist.barrier()
    dist.destroy_process_group()


def _reduce(x: torch.Tensor, group: Any) -> Callable[[], float]:
    def one() -> float:
        x.fill_(1)
        dist.barrier(group)
        start = time.perf_counter()
        dist.all_reduce(x, group=group)
        taken = time.perf_counter() - start
        comm.mark(next(_ticks))
        return taken

    return one


def _step(group: Any) -> Callable[[], float]:
    training = Training(blocks=BLOCKS, batch=BATCH)
    training.model = DistributedDataParallel(training.model, process_group=group)

    kept = isinstance(group, comm.Group)
    tick = next(_ticks)
    if kept:
        training.optimizer.register_step_pre_hook(lambda *_: comm.pass_update(tick))

    def one() -> float:
        nonlocal tick
        dist.barrier(group)
        start = time.perf_counter()
        training.step()
        if kept:
            tick = next(_ticks)
            comm.mark(tick)
        return time.perf_counter() - start

    return one


if __name__ == "__main__":
    _rank(*json.loads(sys.argv[1]))
