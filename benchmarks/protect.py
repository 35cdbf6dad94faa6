"""What protecting a generation over a group costs: bytes sent, seconds, memory, training.

Nodes are processes on loopback, each with one shard. Bytes are those that the loopback interface
counts, headers and pings included, over (n - 1) / (n - m) of a shard. Memory is what a node's
process has for itself beyond what it had before, its parities and one shard, over one shard and two
sets of m / (n - m).

Rows with a share ``unchanged`` are of generations of which so much is as in the one before (1: all
parameters are frozen), sent as differences whatever `mnemo.protect.member.WORTH` is: they are worth
it from the share on from which ``cpu_over_whole`` stays below 1. ``sent_over_shard`` is what leaves
a node.

``training_slowdown`` is that of two busy processes, one a core, that multiply matrices, while four
nodes protect at a quarter of the default rate each: together they do what one node does that has
the machine to itself. Each round measures with and without, one after the other.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import subprocess
import sys
import time
from typing import TYPE_CHECKING, NamedTuple

import psutil

from benchmarks.group import everybody, group_of
from benchmarks.harness import Report, Samples
from mnemo.protect.neighbours import default_rate

if TYPE_CHECKING:
    from collections.abc import Iterator

    from benchmarks.group import Node

SHAPES = ((4, 1), (4, 2), (8, 2))
NODES = 4
"""Of the groups for which `UNCHANGED` is measured."""
UNCHANGED = (0.1, 0.2, 0.3, 0.5, 1.0)
WINDOW_S = 3.0
STEPS = """
import mmap, os, sys
import numpy as np
counter = np.frombuffer(mmap.mmap(int(sys.argv[1]), 4096), np.uint64)[int(sys.argv[2]):]
a = np.random.default_rng(0).random((384, 384))
while os.getppid() == int(sys.argv[3]):
    a @ a
    counter[0] += 1
"""


def run(quick: bool, report: Report) -> None:
    """Fill ``report``."""
    size = (32 if quick else 384) << 20
    shares = UNCHANGED[-1:] if quick else UNCHANGED
    worst_bytes = worst_memory = 0.0
    for n, m in SHAPES:
        found = _protect(n, m, size, rounds=2 if quick else 5)
        report.row(what=f"{n - m}+{m}", shard_mib=size / 2**20, **found)
        worst_bytes = max(worst_bytes, found["bytes_over_formula"])
        worst_memory = max(worst_memory, found["memory_over_formula"])
        for share in shares if n == NODES else ():
            differences = _send_differences(n, m, size, share, rounds=1 if quick else 5)
            cpu = differences["cpu_s_per_gb_and_node"] / found["cpu_s_per_gb_and_node"]
            row = {"unchanged": share, **differences, "cpu_over_whole": cpu}
            report.row(what=f"{n - m}+{m}", shard_mib=size / 2**20, **row)
    slowdown, seconds, shard = _slowdown(rounds=2 if quick else 9)
    low, high = slowdown.quartiles
    report.row(
        what="beside training",
        shard_mib=shard / 2**20,
        seconds=seconds,
        rate_mb_per_s=default_rate() / 1e6,
        slowdown=slowdown.median,
        q1=low,
        q3=high,
    )
    report.bar("bytes_over_hub_formula", worst_bytes, 1.02, "lower")
    report.bar("memory_over_formula", worst_memory, 1.05, "lower")
    report.bar("training_slowdown", slowdown.median, 1.03, "lower")


def _protect(n: int, m: int, size: int, *, rounds: int) -> dict[str, float]:
    """Protect generation after generation as fast as it goes."""
    with group_of(n, m, rate=float("inf")) as nodes:
        before = [node.private for node in nodes]
        rows = [_one(nodes, tick, size, 0) for tick in range(1, rounds + 1)]
        shard = max(everybody(nodes, "shard", rounds))
        parities = [status["memory"] for status in everybody(nodes, "status")]
        own = [node.private - other for node, other in zip(nodes, before, strict=True)]
        taken = max(a + b for a, b in zip(parities, own, strict=True))
    return {
        **_summary(rows),
        "bytes_over_formula": min(row.sent_over_shard for row in rows) / ((n - 1) / (n - m)),
        "memory_over_formula": (shard + taken) / (shard * (1 + 2 * m / (n - m))),
    }


def _send_differences(n: int, m: int, size: int, share: float, *, rounds: int) -> dict[str, float]:
    """Protect generations that are as the one before in a ``share`` of each shard."""
    with group_of(n, m, rate=float("inf"), worth=0) as nodes:
        rows = [_one(nodes, tick, size, share) for tick in range(1, rounds + 2)]
    return {
        **_summary(rows[1:]),
        "sent_over_shard": min(row.sent_over_shard for row in rows[1:]),
    }


class _Row(NamedTuple):
    """One generation, protected by each node of a group."""

    seconds: float
    used: float
    """CPU seconds of a node for each GB of its shard."""
    sent_over_shard: float


def _one(nodes: list[Node], tick: int, size: int, unchanged: float) -> _Row:
    everybody(nodes, "commit", tick, size, unchanged)
    shards = sum(everybody(nodes, "shard", tick))
    cpu, wire = sum(node.used for node in nodes), _on_loopback()
    seconds = max(everybody(nodes, "protect", tick))
    sent, used = _on_loopback() - wire, sum(node.used for node in nodes) - cpu
    return _Row(seconds, used / (shards / 1e9), sent / shards)


def _summary(rows: list[_Row]) -> dict[str, float]:
    """Of what others disturb less or more: medians."""
    return {
        "seconds": Samples([row.seconds for row in rows]).median,
        "cpu_s_per_gb_and_node": Samples([row.used for row in rows]).median,
    }


def _on_loopback() -> int:
    """Bytes so far, of all that is here: of several rounds the least disturbed counts."""
    return int(psutil.net_io_counters(pernic=True)["lo"].bytes_sent)


def _slowdown(*, rounds: int) -> tuple[Samples, float, int]:
    """Steps done without over those done with; seconds to protect; bytes of a shard."""
    rate = default_rate() / 4
    size = int(rate * WINDOW_S * 1.3)
    ratios, seconds = [], []
    with group_of(4, 1, rate=rate) as nodes, _training() as steps:
        for tick in range(1, rounds + 2):
            everybody(nodes, "commit", tick, size)
            alone = _rate_of(steps)
            for node in nodes:
                node.tell("protect", tick)
            together = _rate_of(steps)
            seconds.append(max(node.answer() for node in nodes))
            ratios.append(alone / together)
    return Samples(ratios[1:]), Samples(seconds).median, size


@contextlib.contextmanager
def _training() -> Iterator[memoryview]:
    """Two busy processes and where they count their steps."""
    counters = os.memfd_create("bench-steps")
    os.truncate(counters, mmap.PAGESIZE)
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", STEPS, str(counters), str(i), str(os.getpid())],
            pass_fds=[counters],
            env=environment,
        )
        for i in range(2)
    ]
    view = memoryview(mmap.mmap(counters, mmap.PAGESIZE)).cast("Q")
    try:
        while not all(view[i] for i in range(2)):
            time.sleep(0.05)
        yield view
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
        os.close(counters)


def _rate_of(steps: memoryview) -> float:
    """Steps a second over `WINDOW_S`."""
    before, start = sum(steps[:2]), time.perf_counter()
    time.sleep(WINDOW_S)
    return (sum(steps[:2]) - before) / (time.perf_counter() - start)
