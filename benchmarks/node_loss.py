"""From the loss of a node to the next new step, over a relaunch from a checkpoint.

Four nodes, each a network namespace with one rank, train a small GPT on CPU. A node is lost, and
the time runs until all that was done is done again and one step more: *detect* (until one of the
others has noticed, and ended its rank), *agree* (until rank 0 is started), *imports*, *group*,
*model* (it is made), *state* (it comes back and is loaded), *again* (steps that had been done),
*step* (the new one).

- *spare*: ``mnemo run --nnodes=4:5``, 3+1, c10d, all else as by default. All processes of a node
  are killed, and its memory is gone. With *Store's host* it is that node.
- *spare, silent*: the node's link is cut instead, and nobody is told.
- *newcomer*: ``--nnodes=4``; a new ``mnemo run`` is started right after the loss.
- *torchrun*: ``--nnodes=4 --rdzv-backend=c10d`` with its own defaults; a new one is started right
  after the loss. Rank 0 saves with ``torch.save``, and all go on from that file. The Store's host
  is not lost: it does not survive that. The others' ranks fail at once; their agents then meet
  again before the lost node's counts as dead (15 s), so that they wait for it until a time-out of
  60 s ends all of them. Whoever has ended is started again at once, as a scheduler would.
- *all anew*: the same training; all torchruns are killed and started at once, as if the loss were
  known the moment that it happens.

A checkpoint is made as often as 3 % of step time pays for, measured at the beginning. Young's
interval is longer for all rates of failure met in practice, and so the steps done again would be
more; ``without_again_s`` is free of that choice. torchrun's losses divide its interval evenly,
mnemo's come at random. ``--quick`` takes five minutes.
"""

from __future__ import annotations

import statistics
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.harness import Report, Samples
from benchmarks.node_loss_jobs import LIMIT_S, NODES, Job, Loss, MnemoJob, TorchrunJob, lose
from tests.cluster import netns

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from tests.cluster.netns import Host, Network

Cases = dict[str, list[Loss]]


def run(quick: bool, report: Report) -> None:
    """Fill ``report``."""
    if why := netns.missing():
        report.row(case="not measured", why=why)
        return
    spare, newcomer = _spare(quick), _newcomer()
    relaunch = _relaunch(1 if quick else 3, report)
    ours = {**spare, **newcomer}
    for name, losses in {**ours, **relaunch}.items():
        _row(report, name, losses)
    slowest = max(_median(losses) for losses in ours.values())
    again = max(_without_again(losses) for losses in ours.values())
    torchrun, anew = relaunch["torchrun"], relaunch["all anew"]
    report.row(
        case="slowest of mnemo's medians",
        over_torchrun=slowest / _median(torchrun),
        over_torchrun_without_again=again / _without_again(torchrun),
        over_all_anew=slowest / _median(anew),
        over_all_anew_without_again=again / _without_again(anew),
    )
    detect = [loss.phases.get("detect_s", LIMIT_S) for losses in ours.values() for loss in losses]
    report.bar("node_recovery_over_relaunch", slowest / _median(torchrun), 0.5, "lower")
    report.bar("node_loss_s", max(detect), 5, "lower")


def _median(losses: Sequence[Loss]) -> float:
    return statistics.median(loss.total_s for loss in losses)


def _without_again(losses: Sequence[Loss]) -> float:
    return statistics.median(loss.total_s - loss.phases.get("again_s", 0.0) for loss in losses)


def _row(report: Report, case: str, losses: Sequence[Loss]) -> None:
    total = Samples([loss.total_s for loss in losses])
    low, high = total.quartiles
    names = dict.fromkeys(name for loss in losses for name in loss.phases)
    phases = {
        name: statistics.median(loss.phases[name] for loss in losses if name in loss.phases)
        for name in names
    }
    report.row(
        case=case,
        losses=len(losses),
        total_s=total.median,
        q1=low,
        q3=high,
        longest_s=max(total.values),
        **phases,
        steps_again=statistics.median(loss.steps_again for loss in losses),
        without_again_s=_without_again(losses),
    )


@contextmanager
def _network(hosts: int) -> Iterator[tuple[Network, Path]]:
    """So many nodes, and a directory that all of them see; both are removed."""
    with tempfile.TemporaryDirectory(prefix="mnemo-benchmark-") as name:
        directory = Path(name)
        with netns.network(directory, hosts) as network:
            yield network, directory / "job"


def _spare(quick: bool) -> Cases:
    """A fifth node takes the place of the lost one, which then comes back as the spare."""
    usual, host, silent = "spare", "spare, Store's host", "spare, silent"
    kinds = [host, silent] if quick else [host, usual, silent, usual, host, silent, usual]
    found: Cases = {kind: [] for kind in (usual, host, silent) if kind in kinds}
    with _network(NODES + 1) as (network, directory):
        job = MnemoJob(network, directory, f"{NODES}:{NODES + 1}")
        job.start(*job.members)
        job.train(10)
        job.start(network.hosts[NODES])
        for kind in kinds:
            job.settle()
            victim = job.victim(store="host" in kind)
            others = [member for member in job.members if member is not victim]
            cut = "silent" in kind
            found[kind].append(job.measure(victim.cut if cut else victim.lose, others))
            job.members = [host for host in network.hosts if host is not victim]
            victim.lose()
            victim.mend()
            job.start(victim)
    return found


def _newcomer() -> Cases:
    """One that is started right after the loss takes its place."""
    found: Cases = {"newcomer": [], "newcomer, Store's host": []}
    with _network(NODES) as (network, directory):
        job = MnemoJob(network, directory, f"{NODES}")
        job.start(*job.members)
        job.train(10)
        for kind in found:
            job.settle()
            victim = job.victim(store="host" in kind)
            others = [member for member in job.members if member is not victim]
            found[kind].append(job.measure(lambda host=victim: _replace(job, host), others))
    return found


def _relaunch(rounds: int, report: Report) -> Cases:
    """What is done without mnemo."""
    found: Cases = {"torchrun": [], "all anew": []}
    with _network(NODES) as (network, directory):
        job = TorchrunJob(network, directory)
        job.start(*network.hosts)
        interval = job.interval()
        report.row(
            case="checkpoint",
            every_steps=interval["every"],
            save_s=interval["save_s"],
            usual_step_s=interval["step_s"],
        )
        for number in range(rounds):
            job.settle((number + 0.5) / rounds)
            victim = network.hosts[1 + number % (NODES - 1)]
            found["torchrun"].append(job.measure(lambda host=victim: _replace(job, host), ()))
        for number in range(rounds):
            job.settle((number + 0.5) / rounds)
            found["all anew"].append(job.measure(lambda: _replace(job, *network.hosts), ()))
    return found


def _replace(job: Job, *hosts: Host) -> None:
    lose(hosts)
    job.start(*hosts)
