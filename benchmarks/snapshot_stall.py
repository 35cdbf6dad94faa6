"""What a snapshot costs the training, beside a memcpy of the same bytes and other ways to save.

100 M parameters with AdamW (1.2 GB of state), one rank with one thread; ``--quick`` takes 25 M.
All ways are measured in turns within one run. *Blocked*: the training thread stands still. *Added*:
all that a save adds to the steps that it overlaps, the blocked time included.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.harness import Memcpy, Report, Samples, interleaved, seconds
from benchmarks.peers_saving import Saver, all_savers
from benchmarks.training import Protected, Training

BUDGET = 0.01
PEER_BUDGET = 0.03


def run(quick: bool, report: Report) -> None:
    """Fill ``report``; ``quick`` takes a quarter of the size and fewer rounds."""
    blocks = 6 if quick else 24
    training = Training(blocks=blocks)
    memcpy = Memcpy(training.nbytes)
    added_s, step_s = _against_peers(training, memcpy, report, rounds=4 if quick else 16)
    _without_spare_core(blocks, report, rounds=8 if quick else 30)
    _default_budget(training, added_s, step_s, report, blocks=6 if quick else 40)


def _against_peers(
    training: Training, memcpy: Memcpy, report: Report, *, rounds: int
) -> tuple[float, float]:
    """One core free: mnemo and the peers in turns. Seconds added per snapshot, and of a step."""
    protected = Protected(training, snapshot={"every": 1})
    blocked: dict[str, list[float]] = {}
    drained: dict[str, list[float]] = {}
    plain = interleaved({"step": lambda: seconds(training.step)}, rounds=8)["step"].median

    def mnemo() -> float:
        begun = time.perf_counter()
        took, stood = protected.step()
        protected.keeper.settle()
        blocked.setdefault("mnemo", []).append(stood)
        drained.setdefault("mnemo", []).append(time.perf_counter() - begun)
        return took

    def peer(saver: Saver) -> float:
        """Steps until the save is on disk; what they took beyond undisturbed ones."""
        begun = time.perf_counter()
        stood = saver.save(training.state(), 0)
        training.forward_backward()
        stood += saver.before_update()
        training.update()
        steps = 1
        waiter = _Waiter(saver)
        while waiter.running():
            training.step()
            steps += 1
        took = time.perf_counter() - begun
        blocked.setdefault(saver.name, []).append(stood)
        drained.setdefault(saver.name, []).append(took)
        return took - (steps - 1) * plain

    with tempfile.TemporaryDirectory() as directory:
        savers = all_savers(Path(directory))
        cases = {"memcpy": memcpy, "plain": lambda: seconds(training.step), "mnemo": mnemo}
        for _ in range(3):
            mnemo()  # the first snapshots allocate their buffers and are verified
        own = interleaved(cases, rounds=3 * rounds)
        others = interleaved(
            {
                "memcpy": memcpy,
                "plain": lambda: seconds(training.step),
                **{name: (lambda s=saver: peer(s)) for name, saver in savers.items()},
            },
            rounds=max(3, rounds // 5),
        )
        for saver in savers.values():
            saver.close()
    protected.close()
    reference = own["memcpy"].median
    step = own["plain"].median
    best_peer = 0.0
    for name, taken, plain_steps in [
        ("mnemo", own["mnemo"], own["plain"]),
        *((n, others[n], others["plain"]) for n in savers),
    ]:
        base = plain_steps.median
        stood = Samples(blocked[name][-len(taken.values) :])
        beyond = taken.beyond(plain_steps)
        added = max(beyond.median, stood.median)
        drain = Samples(drained[name]).median
        rate = 60 / max(added / PEER_BUDGET, drain)
        low, high = (v / reference for v in stood.quartiles)
        report.row(
            what=name, memcpy_ms=reference * 1e3, step_ms=base * 1e3,
            blocked_over_memcpy=stood.median / reference, blocked_q1=low, blocked_q3=high,
            added_over_memcpy=added / reference, added_q1=beyond.quartiles[0] / reference,
            added_q3=beyond.quartiles[1] / reference, drain_s=drain, saves_per_min_at_3pct=rate,
        )  # fmt: skip
        if name == "mnemo":
            report.bar("stall_ratio", stood.median / reference, 0.02, "lower")
            report.bar("added_over_memcpy_spare_core", added / reference, 0.3, "lower")
            own_added, own_rate = added, rate
        else:
            best_peer = max(best_peer, rate)
    report.bar("saves_at_3pct_over_best_peer", own_rate / best_peer, 2, "higher")
    return own_added, step


class _Waiter:
    """Drains a saver in another thread, so that steps can run meanwhile."""

    def __init__(self, saver: Saver) -> None:
        import threading

        self._thread = threading.Thread(target=saver.drain)
        self._thread.start()

    def running(self) -> bool:
        """Whether the save is still on its way; never busy-waits."""
        return self._thread.is_alive()


def _without_spare_core(blocks: int, report: Report, *, rounds: int) -> None:
    """Two ranks, each bound to one of two cores with all its threads: no core is free."""
    cores = sorted(os.sched_getaffinity(0))[:2]
    command = [sys.executable, "-m", "benchmarks.snapshot_stall", str(blocks), str(rounds)]
    ranks = [
        subprocess.Popen([*command, str(core)], stdout=subprocess.PIPE, text=True) for core in cores
    ]
    found = [json.loads(rank.communicate()[0].splitlines()[-1]) for rank in ranks]
    for core, figures in zip(cores, found, strict=True):
        report.row(what=f"mnemo, no core free (core {core})", **figures)
    worst = max(f["added_over_memcpy"] for f in found)
    report.bar("added_over_memcpy_no_spare", worst, 1.3, "lower")


def _bound_rank(blocks: int, rounds: int, core: int) -> None:
    """One of two ranks that keep both cores busy; prints its figures."""
    os.sched_setaffinity(0, {core})
    training = Training(blocks=blocks)
    memcpy = Memcpy(training.nbytes)
    protected = Protected(training, snapshot={"every": 1})
    blocked = []

    def mnemo() -> float:
        took, stood = protected.step()
        protected.keeper.settle()
        blocked.append(stood)
        return took

    for _ in range(3):
        mnemo()
    taken = interleaved(
        {"memcpy": memcpy, "plain": lambda: seconds(training.step), "mnemo": mnemo}, rounds=rounds
    )
    protected.close()
    reference = taken["memcpy"].median
    figures = {
        "memcpy_ms": reference * 1e3,
        "step_ms": taken["plain"].median * 1e3,
        "blocked_over_memcpy": Samples(blocked).median / reference,
        "added_over_memcpy": taken["mnemo"].beyond(taken["plain"]).median / reference,
    }
    print(json.dumps(figures))


def _default_budget(
    training: Training, added_s: float, step_s: float, report: Report, *, blocks: int
) -> None:
    """The default configuration: steps in turns with and without, and how often it saved."""
    protected = Protected(training, snapshot={"overhead": BUDGET})
    with_s: list[float] = []
    plain_s: list[float] = []
    length = 5  # short: the machine drifts from block to block

    def protected_steps() -> None:
        for _ in range(length):
            training.forward_backward()
            protected.keeper.before_update()
            training.update()
            protected.boundary()

    for _ in range(min(blocks, 20)):
        protected_steps()  # until the frequency has been found
    captured = protected.keeper.counters.captured
    for _ in range(blocks):
        with_s.append(seconds(protected_steps))
        protected.keeper.pause()
        plain_s.append(seconds(lambda: [training.step() for _ in range(length)]))
    saved = protected.keeper.counters.captured - captured
    protected.close()
    overhead = Samples(with_s).over(Samples(plain_s)).median
    every = length * blocks / max(saved, 1)
    predicted = max(1.0, added_s / (BUDGET * step_s))
    report.row(
        what="mnemo, default budget",
        step_ms=step_s * 1e3,
        steps_per_snapshot=every,
        predicted=predicted,
    )
    report.bar("step_overhead_default_budget", overhead, 1.01, "lower")
    report.bar("saves_over_predicted", predicted / every, 0.8, "higher")


if __name__ == "__main__":
    _bound_rank(*(int(a) for a in sys.argv[1:4]))
