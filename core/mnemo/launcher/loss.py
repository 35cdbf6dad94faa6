"""What is known of one loss, and how it is told once it is over."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mnemo.launcher.restarts import Position
    from mnemo.launcher.worker import Worker
    from mnemo.recovery.classes import Failure
    from mnemo.recovery.control import Back


def _now() -> float:
    return asyncio.get_running_loop().time()


@dataclass
class Loss:
    """From the death of a rank until all ranks are back; who dies meanwhile belongs to it.

    To be made within a running event loop, when it begins.
    """

    position: asyncio.Task[Position | None]
    """Finds out where the run was."""
    dead: list[tuple[Worker, int, float]] = field(default_factory=list)
    """Processes that have died, with exit code and Unix time."""
    by: dict[int, str] = field(default_factory=dict)
    """What came in the place of each rank that died."""
    joining: set[int] = field(default_factory=set)
    """Those of them that are not back yet."""
    back: dict[int, Back] = field(default_factory=dict)
    """What the ranks have said that are back in this membership epoch."""
    ended_in_place: list[Failure] = field(default_factory=list)
    """What ended those that had come in the place of one that had."""
    agent_ms: dict[str, float] = field(default_factory=dict)
    """When the agent had done what, since it began."""
    _began: float = field(default_factory=_now, init=False)

    def took(self, phase: str) -> None:
        """The agent has done that."""
        self.agent_ms[phase] = round((_now() - self._began) * 1e3, 2)

    def where(self) -> Position | None:
        """Where the run was, if that is known by now."""
        task = self.position
        known = task.done() and not task.cancelled() and not task.exception()
        return task.result() if known else None

    def record(self, failures: Sequence[Failure]) -> dict[str, Any]:
        """For the journal, when all are back.

        Args:
            failures: What ended each of the dead.
        """
        return {
            "cause": self._cause(failures),
            "kinds": [failure.kind for failure in failures],
            "noticed": self._noticed,
            "by": self.by,
            "lost_pids": [worker.pid for worker, _, _ in self.dead],
            "sources": self._sources,
            "tick": max(said.tick for said in self.back.values()),
            "seconds": self._seconds,
            "exact": not self._inexact,
            "note": self._inexact,
            "agent_ms": self.agent_ms,
            "phases_ms": {rank: said.phases_ms for rank, said in sorted(self.back.items())},
        }

    def line(self, failures: Sequence[Failure]) -> str:
        """For people, likewise."""
        at = time.strftime("%H:%M:%S", time.localtime(self._noticed))
        by = " and ".join(sorted(set(self.by.values())))
        source = ", ".join(f"state from rank {r}" for r in self._sources) or "state from memory"
        exact = f"not exact ({self._inexact})" if self._inexact else "exact"
        return (
            f"{at} {self._cause(failures)} → {by}, {source}, {self._seconds:.2f} s, "
            f"0 steps lost, {exact}"
        )

    @property
    def _noticed(self) -> float:
        return self.dead[0][2]

    @property
    def _seconds(self) -> float:
        return self.agent_ms["all_back"] / 1e3

    @property
    def _inexact(self) -> str:
        return "; ".join(sorted({said.inexact for said in self.back.values() if said.inexact}))

    @property
    def _sources(self) -> list[int]:
        return sorted({said.source for said in self.back.values() if said.source is not None})

    def _cause(self, failures: Sequence[Failure]) -> str:
        dead = zip(self.dead, failures, strict=True)
        return ", ".join(f"rank {worker.rank} {each.words}" for (worker, _, _), each in dead)
