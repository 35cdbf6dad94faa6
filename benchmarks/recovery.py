"""A rank is killed: how long until all ranks have done the step that this interrupted.

The GPT of the Lightning example (10 million parameters) trains on CPU, a thread for each rank. A
rank is killed by SIGKILL at some instant of its forward or backward pass; what is measured ends
when all ranks have done that step, less a usual step of the same run.

- *mnemo*: ``mnemo run``, strategy ``mnemo_ddp``, a snapshot every step, a warm standby. *detect*
  (until the agent has noticed), *told* (the other ranks), *started* (the standby is past the
  script's imports), *set-up* (until it asks for state), *state* (which it is handed), *restore*
  (until it could join), *groups* (new communicators), *redo* (the step goes on; what is left of it
  may be less than a whole one).
- *torchrun*: strategy ``ddp``, Lightning's checkpoint as often as 3 % of step time pays for, as
  measured at the beginning. Kills divide that interval evenly. *again* are steps done again.
- *NVRx*: in-process restart with its defaults and a rank in reserve. The same model and batches in
  a plain loop. It brings no state of its own; a rank that is left sends it.
- *torchft*: each rank is a replica group; the killed one is started again at once. The interrupted
  step is done without its batch after *stall*; the total runs until all take part again.

NVRx and torchft are installed by pip, each in an environment of its own, which sees the packages
of this one; they are left out where that fails. ``--quick``: two ranks, one kill each, no peers.
"""

from __future__ import annotations

import random
import statistics
import tempfile
import time
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Final

from benchmarks.harness import Report, Samples
from benchmarks.recovery_jobs import Loss, MnemoJob, TorchrunJob
from benchmarks.recovery_peers import (
    NVRX,
    TORCHFT,
    CannotInstallError,
    NvrxJob,
    TorchftJob,
    environment,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from benchmarks.recovery_jobs import Job

    Make = Callable[[Path], Job]

_KILLS: Final = 5
_RANKS: Final = (2, 3, 4)


def run(quick: bool, report: Report) -> None:
    """Fill ``report``."""
    seed = time.time_ns() % 10**6
    chance = random.Random(seed)
    report.row(case="seed of the kills", seed=seed)
    kills, sizes = (1, _RANKS[:1]) if quick else (_KILLS, _RANKS)
    found: dict[int, tuple[list[Loss], list[Loss]]] = {}
    for ranks in sizes:
        ours = _measure(lambda to, n=ranks: MnemoJob(to, n, chance), kills)
        _row(report, "mnemo", ranks, ours)
        theirs = _measure(lambda to, n=ranks: TorchrunJob(to, n, chance), kills)
        _row(report, "torchrun", ranks, theirs)
        found[ranks] = ours, theirs
    if not quick:
        _peers(report, chance)
    ours, theirs = found[_RANKS[0]]
    report.bar("kill_to_step_s", _median(ours), 1.0, "lower")
    shares = [_median(ours) / _median(theirs) for ours, theirs in found.values()]
    report.bar("speedup_over_torchrun", 1 / max(shares), 5, "higher")
    report.bar("recovery_overhead_reduction", 1 - max(shares), 0.588, "higher")
    again = max(loss.again for ours, _ in found.values() for loss in ours)
    report.bar("survivor_recomputed_passes", again, 0, "lower")


def _peers(report: Report, chance: random.Random) -> None:
    """With as many ranks as the bar is about."""
    ranks = _RANKS[0]
    with tempfile.TemporaryDirectory(prefix="mnemo-benchmark-") as name:
        try:
            programs = environment(Path(name) / "nvrx", NVRX)
        except CannotInstallError as error:
            report.row(case=f"{NVRX} not measured", why=str(error))
        else:
            make: Make = lambda to: NvrxJob(to, ranks, chance, programs)  # noqa: E731
            losses = [loss for _ in range(_KILLS) for loss in _measure(make, 1)]
            _row(report, "NVRx", ranks, losses)
        try:
            programs = environment(Path(name) / "torchft", TORCHFT)
        except CannotInstallError as error:
            report.row(case=f"{TORCHFT} not measured", why=str(error))
        else:
            losses = _measure(lambda to: TorchftJob(to, ranks, chance, programs), _KILLS)
            _row(report, "torchft", ranks, losses)


def _measure(make: Make, kills: int) -> list[Loss]:
    """In one job."""
    with (
        tempfile.TemporaryDirectory(prefix="mnemo-benchmark-") as name,
        closing(make(Path(name))) as job,
    ):
        losses = []
        for number in range(kills):
            job.settle((number + 0.5) / kills)
            losses.append(job.measure())
        return losses


def _median(losses: Sequence[Loss]) -> float:
    return statistics.median(loss.total_s for loss in losses)


def _row(report: Report, case: str, ranks: int, losses: Sequence[Loss]) -> None:
    total = Samples([loss.total_s for loss in losses])
    low, high = total.quartiles
    names = dict.fromkeys(name for loss in losses for name in loss.phases)
    report.row(
        case=f"{case}, {ranks} ranks",
        kills=len(losses),
        total_s=total.median,
        q1=low,
        q3=high,
        longest_s=max(total.values),
        usual_step_s=statistics.median(loss.usual_s for loss in losses),
        **{
            name: statistics.median(loss.phases[name] for loss in losses if name in loss.phases)
            for name in names
        },
        steps_again=statistics.median(loss.steps_again for loss in losses),
        survivors_passes_again=max(loss.again for loss in losses),
        by=", ".join(sorted({loss.by for loss in losses})),
    )
