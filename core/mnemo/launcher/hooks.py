"""What the agent asks of the rest of mnemo; by default nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from mnemo.launcher.restarts import Position


def _nothing() -> None:
    return None


def _keeps_nothing(well: bool) -> None:
    del well


def _unknown() -> bool:
    return False


def _nobody() -> int:
    return 0


@dataclass(frozen=True, slots=True)
class Hooks:
    """One function for each question, any of which may take seconds: ask it in a thread.

    Attributes:
        ensure_smp: Called before the ranks of each life start.
        position: Where the run was when it failed; None if that is not known.
        training: Whether a training is known to be under way, for which all ranks are needed.
        taken: Whether another job has the run, whose journal it is then. Asked while no rank of
            this one lives.
        ended: Called when the job is over, with whether all ranks ended well; says what state is
            kept, or nothing.
        silent: The snapshot process, by its number, where there is one and it gives no answer
            within seconds; 0 otherwise.
    """

    ensure_smp: Callable[[], None] = _nothing
    position: Callable[[], Position | None] = _nothing
    training: Callable[[], bool] = _unknown
    taken: Callable[[], bool] = _unknown
    ended: Callable[[bool], str | None] = _keeps_nothing
    silent: Callable[[], int] = _nobody
