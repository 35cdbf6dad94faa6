"""What a start says: one line for people, one record for the journal."""

from __future__ import annotations

import os
import time
from dataclasses import asdict, dataclass, replace
from typing import Any

from mnemo.config import ResolvedConfig, Resume
from mnemo.recovery.journal import Journal, history
from mnemo.session import report
from mnemo.session.identity import RunIdentity
from mnemo.session.nodes import Protection
from mnemo.smp.memory import memory_limit, survival_domain
from mnemo.smp.paths import AGENTS_DIRECTORY, RunPaths
from mnemo.snapshot.job import Counters


@dataclass(frozen=True)
class Resumed:
    """Where a run goes on: ``origin`` is ``memory`` or ``storage``."""

    origin: str
    step: int
    steps_lost: int | None
    """None where nobody is left who knows how far the run had come."""
    exact: bool
    note: str


@dataclass(frozen=True)
class Start:
    """One start of a fit, as rank 0 sees it."""

    config: ResolvedConfig
    identity: RunIdentity
    fit: int
    world_size: int

    def fresh(
        self, journal: Journal, *, damaged: int = 0, lost: bool = False, apart: bool = False
    ) -> None:
        """Nothing is resumed, and why.

        Args:
            journal: Asked for the failure that led here; gets the record.
            damaged: Snapshots that were there but could not be used.
            lost: More nodes were lost than their parities make up for.
            apart: All nodes have snapshots, but none of the same step.
        """
        why = "a new id at each launch" if not self.identity.stable else "no earlier snapshot"
        if cause := _cause(journal):
            why = f"{cause}, and no snapshot is left"
        if damaged:
            why = f"{report.count(damaged, 'snapshot')} found, none of which can be used"
        if lost:
            why = "more nodes were lost than the parities make up for"
        if apart:
            why = "the nodes have no snapshot of the same step, and none was protected yet"
        if self.config.run.resume is Resume.never:
            why = "run.resume is never"
        report.say(f"run {self.identity.run_id} · fresh ({why}) · {self._what_it_is()}")
        journal.write("start", resumed=False, why=why, **self._fields())

    def goes_on_from(self, journal: Journal, file: str, step: int, *, whose: str) -> None:
        """No snapshot is resumed, but a checkpoint that is none of mnemo's.

        Args:
            journal: Asked for the failure that led here.
            file: The checkpoint.
            step: Its step.
            whose: Who goes on from it.
        """
        cause = _cause(journal)
        words = f"{whose} goes on from {file} at step {step}"
        report.say(
            f"run {self.identity.run_id} · {f'{cause} → ' if cause else ''}{words} · "
            f"{self._what_it_is()}"
        )
        journal.write("start", resumed=False, why=words, step=step, **self._fields())

    def resumed(self, journal: Journal, resumed: Resumed, *, since: float) -> None:
        """State was found: who failed, from where, what it cost.

        Args:
            journal: Asked for the failure that led here.
            resumed: What was found.
            since: Unix seconds from which to count where no failure was recorded.
        """
        failure = _last_failure(journal)
        # Whoever recorded the failure may have another clock.
        failed = failure.get("noticed", failure["time"]) if failure else since
        took = max(0.0, time.time() - failed)
        cause = _cause(journal) or "an earlier life ended"
        reached = _left_at(journal, self.fit)
        if reached is not None and reached >= resumed.step:
            lost = max(resumed.steps_lost or 0, reached - resumed.step)
            resumed = replace(resumed, steps_lost=lost)
        exactness = "exact" if resumed.exact else "not exact"
        extra = f" ({resumed.note})" if resumed.note else ""
        report.say(
            f"run {self.identity.run_id} · {cause} → resumed from {resumed.origin} at step "
            f"{resumed.step}, {_lost(resumed.steps_lost)} lost, "
            f"{report.seconds(took)}, {exactness}{extra}"
        )
        record = {**asdict(resumed), "seconds": took, **self._fields()}
        rung = "snapshot" if resumed.origin == "memory" else "checkpoint"
        journal.write("start", resumed=True, **record)
        journal.write("recovery", cause=cause, rung=rung, **record)

    def _fields(self) -> dict[str, Any]:
        return {"run": self.identity.run_id, "fit": self.fit, "world_size": self.world_size}

    def _what_it_is(self) -> str:
        return f"{report.count(self.world_size, 'rank')} · {self._frequency()}"

    def _frequency(self) -> str:
        every = self.config.snapshot.every
        if every is not None:
            return f"a snapshot every {'step' if every == 1 else f'{every} steps'}"
        return f"snapshots within {self.config.snapshot.overhead * 100:.3g}% of step time"


def room(size: int, protection: Protection | None, beyond: str) -> None:
    """What snapshots take of the node's memory, and what they survive.

    Args:
        size: Bytes on this node.
        protection: Over several nodes, where it works.
        beyond: Of what survives the loss of more, to complete the line.
    """
    survived = [what for what, survives in survival_domain().items() if survives]
    more = "the node"
    if protection is not None:
        survived.append(f"the loss of {protection}")
        more = f"{protection.group.parities + 1} of them"
        beyond += " · snapshots are skipped while one is being protected and a newer one is kept"
    limit = memory_limit()
    report.say(
        f"{report.size(size)} of {report.size(limit.total)} {limit.bound} memory for snapshots · "
        f"survives {', '.join(survived)} · not the loss of {more}{beyond}"
    )


def unattended(paths: RunPaths) -> None:
    """Say so where `mnemo run` was not told what the program was, and looks elsewhere."""
    agents = os.environ.get(AGENTS_DIRECTORY)
    if agents and not paths.is_at(agents):
        report.say(
            f"the program keeps its state in {paths.directory}, and mnemo run looks in {agents}, "
            "so it cannot say what is kept: set run.dir and run.id where both read them, as in "
            "mnemo run run.dir=…"
        )


def _lost(steps: int | None) -> str:
    return "an unknown number of steps" if steps is None else report.count(steps, "step")


def note_interrupted(journal: Journal, *, run: str, fit: int, rank: int, step: int) -> None:
    """A training that has said its start is left early: the next start counts from here.

    Args:
        journal: The run's.
        run: Its id.
        fit: Which training of the process.
        rank: Whose record it is.
        step: Optimizer steps done, also those that no boundary has followed.
    """
    journal.write("interrupted", run=run, fit=fit, rank=rank, step=step)


def note_ended(
    journal: Journal, *, run: str, fit: int, rank: int, finished: bool, counters: Counters
) -> None:
    """A training is over.

    Args:
        journal: The run's.
        run: Its id.
        fit: Which training of the process.
        rank: Whose record it is.
        finished: Nobody is to resume it.
        counters: Of its snapshots; times in seconds.
    """
    rounded = {name: round(value, 6) for name, value in vars(counters).items()}
    journal.write("end", run=run, fit=fit, rank=rank, finished=finished, counters=rounded)


def _left_at(journal: Journal, fit: int) -> int | None:
    """Steps that had been done when the last life of a fit left it early; None if unknown."""
    reached = None
    for record in reversed(history(journal)):
        if record.get("fit") != fit:
            continue
        if record.get("event") == "start":
            break
        if record.get("event") == "interrupted":
            reached = max(reached or 0, int(record.get("step") or 0))
    return reached


def _cause(journal: Journal) -> str:
    """Who failed how, and led to this start; empty if nobody has recorded that."""
    failure = _last_failure(journal)
    if failure is None:
        return ""
    who = f"rank {failure['rank']} " if "rank" in failure else ""  # else a node, or on another one
    return f"{who}{failure.get('cause')}"


def _last_failure(journal: Journal) -> dict[str, Any] | None:
    """The newest failure in the journal that no start has followed."""
    for record in reversed(history(journal)):
        if record.get("event") == "failure":
            return dict(record)
        # Ranks that survived it may have written their end behind it.
        if record.get("event") in ("start", "recovery"):
            return None
    return None
