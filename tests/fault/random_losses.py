"""Random faults of a training whose ranks are replaced: how they are drawn, and what must follow.

A `Way` is one thing to survive. Where two processes have to die for it, it is two faults.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import campaign

from mnemo.faults import Declaration, Fault, Fired, Hook
from mnemo.recovery import journal
from mnemo.types import EXIT_STATE_SAVED

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

RANDOM_PHASES = ("forward", "backward", "reduced", "updating", "loading")
EPOCH_STEPS = 10
"""Of 20 batches for each rank, accumulated over 2."""
SPACING = 5
"""Steps from one fault to the next: validation and checkpoints come as often."""
APART = 40
"""Further steps behind the loss of a snapshot process: what is lost with it is lost."""
_STOPPED_S = 1.5
"""How long a rank is stopped that goes on by itself."""


def _one(phase: str, kind: Any = "sigkill", rank: int | None = None) -> Callable[..., list[Fault]]:
    def draw(rng: random.Random, ranks: int, step: int) -> list[Fault]:
        victim = rng.randrange(ranks) if rank is None else rank
        return [Fault(kind, victim, Hook(phase or rng.choice(RANDOM_PHASES), step))]

    return draw


def _two_at_once(rng: random.Random, ranks: int, step: int) -> list[Fault]:
    phase = rng.choice(("forward", "backward", "reduced"))
    return [Fault("sigkill", rank, Hook(phase, step)) for rank in rng.sample(range(ranks), 2)]


def _during_recovery(rng: random.Random, ranks: int, step: int) -> list[Fault]:
    """Another one dies when it hears of the first loss, or the new process in its turn."""
    first, other = rng.sample(range(ranks), 2)
    loss = Fault("sigkill", first, Hook(rng.choice(("forward", "backward", "between")), step))
    if ranks > 2 and rng.random() < 0.5:  # of two nobody would be left
        return [loss, Fault("sigkill", other, Hook("replacing", step))]
    return [loss, Fault("sigkill", first, Hook("joining", step - SPACING))]


def _standby(rng: random.Random, ranks: int, step: int) -> list[Fault]:
    del rng, ranks, step
    return [Fault("sigkill", 0, Hook("standby"))]  # before it is anybody it counts as rank 0


WAYS = {
    "forward": _one("forward"),
    "backward": _one("buckets"),
    "between reduction and update": _one("reduced"),
    "inside the update": _one("updating"),
    "scheduler": _one("scheduler"),
    "loading": _one("loading"),
    "validation": _one("validation"),
    "saving": _one("saving"),
    "during another recovery": _during_recovery,
    "two ranks at once": _two_at_once,
    "rank 0": _one("", rank=0),
    "stopped": _one("", "sigstop"),
    "stopped and continued": _one("", "sigstop"),
    "exception": _one("", "exception"),
    "standby": _standby,
    "snapshot process": _one("", "smp_kill"),
    "asked to end": _one("", "stop"),
}
"""What the campaign has to survive, in words."""


@dataclass
class Plan:
    """The faults of one run."""

    ranks: int
    epochs: int
    """More than the faults need."""
    ways: list[str] = field(default_factory=list)
    """Of each fault."""
    faults: list[Fault] = field(default_factory=list)

    @property
    def flags(self) -> tuple[str, ...]:
        """Of the script; the same in the undisturbed run."""
        return (
            "--strategy=mnemo_ddp",
            f"--save-every={SPACING}",
            f"--samples={160 * self.ranks}",
            f"--epochs={self.epochs}",
        )


def draw(seed: int, ranks: int, ways: Sequence[str]) -> Plan:
    """One fault or two of each way, in random order."""
    rng = random.Random(seed)
    order = list(ways)
    rng.shuffle(order)
    plan = Plan(ranks, 2 + (SPACING * (len(order) + 1) + APART) // EPOCH_STEPS)
    begins = 0
    for way in order:
        begins += SPACING
        drawn = WAYS[way](rng, ranks, begins + rng.randrange(SPACING - 1))
        begins += APART if way == "snapshot process" else 0
        plan.ways += [way] * len(drawn)
        plan.faults += drawn
    return plan


def strike(plan: Plan, out: Path) -> Outcome:
    """A run that all of them happen to; started again as often as it was asked to end."""
    declared = Declaration(tuple(plan.faults), record=str(out.with_suffix(".fired")))
    said = ""
    for _ in range(1 + plan.ways.count("asked to end")):
        code, more = _launch(out, declared, plan)
        said += more
        if code != EXIT_STATE_SAVED:
            break
    assert code == 0, f"exit code {code}:\n{said[-6000:]}"
    declared.assert_fired()
    return Outcome(plan, declared.fired(), journal.read(_journal(out)), said)


def undisturbed(out: Path, plan: Plan) -> None:
    """What the others are compared with."""
    campaign.train(out, None, *plan.flags, ranks=plan.ranks)


def _journal(out: Path) -> Path:
    return Path(os.environ["MNEMO_RUN__JOURNAL"]) / f"{out.name}.jsonl"


def _launch(out: Path, declared: Declaration, plan: Plan) -> tuple[int, str]:
    words = [f"--nproc-per-node={plan.ranks}", "--max-restarts=1000", "recover.hang=5s"]
    command = [sys.executable, "-c", "from mnemo.cli import main; main()", "run", *words]
    command += [str(campaign.SCRIPT), f"--ranks={plan.ranks}", f"--out={out}", *campaign.FLAGS]
    environ = {"OMP_NUM_THREADS": "1", "MNEMO_RUN_ID": out.name, **declared.environ()}
    log = out.with_suffix(".log")
    begins = log.stat().st_size if log.exists() else 0
    with log.open("ab") as sink:
        process = subprocess.Popen(
            [*command, *plan.flags], env={**os.environ, **environ}, stdout=sink, stderr=sink
        )
        over = threading.Event()
        waking = threading.Thread(target=_wake, args=(declared, plan, over))
        waking.start()
        try:
            code = process.wait(campaign.RUN_LIMIT_S)
        except BaseException:
            process.terminate()
            process.wait(60)
            raise
        finally:
            over.set()
            waking.join()
    return code, log.read_bytes()[begins:].decode()


def _wake(declared: Declaration, plan: Plan, over: threading.Event) -> None:
    """Let those go on that are only stopped for a while."""
    waits = {n for n, way in enumerate(plan.ways) if way == "stopped and continued"}
    while waits and not over.wait(0.1):
        for fired in declared.fired():
            if fired.fault in waits and time.time() - fired.time >= _STOPPED_S:
                waits.remove(fired.fault)
                os.kill(fired.pid, signal.SIGCONT)


@dataclass
class Outcome:
    """What a run left."""

    plan: Plan
    fired: list[Fired]
    records: list[dict[str, Any]]
    said: str

    def ways(self) -> Counter[str]:
        """How many faults of each way."""
        return Counter(self.plan.ways[fired.fault] for fired in self.fired)

    def rungs(self) -> Counter[str]:
        """How often what was done."""
        replaced = sum(1 for r in self.records if r["event"] == "replaced")
        restarts = [r for r in self.records if r["event"] == "failure"]
        ended = sum(1 for r in self.records if r["event"] == "stop")
        found = Counter({"replaced in the running job": replaced, "ended, and launched": ended})
        for record in restarts:
            found[f"all restarted: {_short(record)}"] += 1
        return +found

    def missing(self) -> list[str]:
        """Faults that the journal does not tell of."""
        return [
            f"{self.plan.ways[fired.fault]}: {fired}"
            for fired in self.fired
            if not self._is_told(fired)
        ]

    def _is_told(self, fired: Fired) -> bool:
        way = self.plan.ways[fired.fault]
        kinds = self._kinds_of(fired.pid)
        if way == "stopped and continued":
            stopped = {f.pid for f in self.fired if self.plan.ways[f.fault] == "stopped"}
            return "hang" not in kinds or fired.pid in stopped
        if way == "snapshot process":
            return any(
                r["kind"] == "smp replaced" and fired.time <= r["time"] < fired.time + 60
                for r in self._all("degraded")
            )
        if way == "standby":
            return any(r["standby_pid"] == fired.pid for r in self._all("standby"))
        return bool(kinds) or self._next(fired) == ("stop" if way == "asked to end" else "failure")

    def _kinds_of(self, pid: int) -> set[str]:
        """As what the loss of a process was told, where it was replaced."""
        records = self._all("replaced")
        ended = (each for r in records for each in zip(r["lost_pids"], r["kinds"], strict=True))
        return {kind for lost, kind in ended if lost == pid}

    def _all(self, event: str) -> list[dict[str, Any]]:
        return [record for record in self.records if record["event"] == event]

    def _next(self, fired: Fired) -> str:
        """What ended the life that it happened in."""
        ends = ("failure", "stop", "launch")
        later = (r for r in self.records if r["event"] in ends and r["time"] > fired.time)
        return str(next(later)["event"])

    def check(self, calm: Path, out: Path) -> None:
        """Nothing differs, and nothing is missing in the journal."""
        campaign.assert_same(calm, out, self.plan.ranks)
        assert self.missing() == []
        inexact = [r for r in self.records if r["event"] == "recovery" and not r["exact"]]
        assert inexact == []


def _short(record: dict[str, Any]) -> str:
    return str(record.get("not_replaced") or record["cause"])
