"""What becomes of the job when a life ends that should not have: counted, told, said."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Final

from mnemo.config.uncaught import EXIT_USAGE
from mnemo.errors import CrashLoopError
from mnemo.launcher.oom import OomWatch
from mnemo.launcher.output import count
from mnemo.launcher.team import Report
from mnemo.recovery import Rung
from mnemo.recovery.classes import Kind, classify

if TYPE_CHECKING:
    from collections.abc import Callable

    from mnemo.clock import Clock
    from mnemo.launcher.hooks import Hooks
    from mnemo.launcher.life import Life
    from mnemo.launcher.options import LaunchOptions
    from mnemo.launcher.output import Terminal
    from mnemo.launcher.restarts import Failed, Position, RestartPolicy
    from mnemo.launcher.seat import Seat
    from mnemo.launcher.team import Team
    from mnemo.launcher.worker import Worker
    from mnemo.recovery.classes import Failure
    from mnemo.recovery.journal import Journal

_LEAVES: Final = "that node leaves, and the others wait for another one"


class Failures:
    """Of one launch, on this node.

    Args:
        options: The launch.
        policy: Says how many are too many.
        team: The other nodes' agents.
        hooks: Know where the run was.
        journal: Told of each.
        terminal: Where they are said.
        clock: The time.
        stopping: Whether the job has been asked to end.
    """

    def __init__(
        self,
        options: LaunchOptions,
        policy: RestartPolicy,
        team: Team,
        hooks: Hooks,
        *,
        journal: Journal,
        terminal: Terminal,
        clock: Clock,
        stopping: Callable[[], bool],
    ) -> None:
        self.struck = OomWatch().struck
        """Whether the kernel has killed for want of memory since this was last asked."""
        self._options = options
        self._policy = policy
        self._team = team
        self._hooks = hooks
        self._journal = journal
        self._terminal = terminal
        self._clock = clock
        self._stopping = stopping
        self._ranks = options.ranks
        self._moved: float | None = None
        """Unix seconds at which it was noticed that other nodes do not go on."""

    def begin(self, life: Life, seat: Seat) -> None:
        """A life begins; take note of nodes that were lost since the last."""
        self._ranks = seat.world_size
        if seat.cause:
            self._terminal.say(seat.cause)
            noticed = self._moved or self._clock.time()
            self._journal.write("failure", life=life.number, cause=seat.cause, noticed=noticed)
        self._moved = None

    async def here(self, life: Life, failed: Failed, not_replaced: str) -> int | None:
        """Report a failure of this node's, and end the job if it has failed too often.

        Args:
            life: What failed.
            failed: Which rank, and how.
            not_replaced: Why all ranks have to restart; empty if that goes without saying.

        Returns:
            The exit code of the job; None if there is to be another life.

        Raises:
            CrashLoopError: It failed again and again at the same batch.
        """
        worker = life.replaced.get(failed.rank, life.workers[failed.rank])
        if await self._team.is_elsewhere(failed.code, worker.log.tail):
            return await self.elsewhere(not_replaced)
        position = await asyncio.to_thread(self._hooks.position)
        refusal = next((text for each in life.workers.values() if (text := each.refusal())), "")
        failure = worker.failure(failed.code, out_of_memory=self.struck())
        if refusal:
            failure = classify(failed.code, (), refusal=refusal)
        decision = self._decide(position, failure)
        cause = _cause(failed, failure)
        code = failed.code if failed.code > 0 else 128 - failed.code if failed.code else 1
        if refusal:
            code = EXIT_USAGE
        if not await asyncio.to_thread(self._hooks.taken):
            self._journal.write(
                "failure",
                life=life.number,
                rank=failed.rank,
                local_rank=worker.local_rank,
                worker_pid=worker.pid,
                exit_code=failed.code if failed.code >= 0 else None,
                signal=-failed.code if failed.code < 0 else None,
                cause=cause,
                kind=failure.kind,
                noticed=life.noticed[failed.rank],
                position=position,
                decision=decision,
                not_replaced=not_replaced,
            )
        told = f"rank {failed.rank} {cause}"
        report = Report(
            cause=told,
            position=position,
            code=code if decision != "restart" or self._stopping() else None,
            refused=decision == "refused",
            leaves=decision == "leaves",
        )
        ended = await self._team.report(report)
        if ended is not None and refusal:
            self._terminal.say(refusal)
            return ended
        if ended is not None:
            then = self._ends_with(ended, decision, worker)
        elif decision == "refused":
            self._policy.forgive()
            then = _LEAVES
        else:
            then = self._restarting(not_replaced)
        at = time.strftime("%H:%M:%S", time.localtime(life.noticed[failed.rank]))
        self._terminal.say(f"{at} {told} → {then}")
        if ended is not None and decision == "crash loop":
            here = self._policy.here
            first = next(f for f in here if f and f.error == failure.error)
            last = "\n".join(f"  {line}" for line in first.last_words)
            msg = (
                f"{len(here)} failures in a row at {position}: the batch itself seems to be the "
                f"cause. Rank {failed.rank} {cause}; its last lines the first time:\n{last}"
            )
            raise CrashLoopError(msg, ended)
        return ended

    async def elsewhere(self, not_replaced: str) -> int | None:
        """As `here`, where another node knows why all ranks restart."""
        self._moved = self._clock.time()
        news = await self._team.why()
        exhausted = not news.leaves and self._policy.after_failure(news.position) == "exhausted"
        code = 1 if exhausted and news.code is None else news.code
        if code != news.code:
            code = await self._team.report(Report(cause=news.cause, code=code))
        if code is not None:
            then = f"ending with exit code {code}"
        else:
            then = _LEAVES if news.leaves else self._restarting(not_replaced)
        if exhausted and news.code is None:
            then += ", since the restarts are used up (--max-restarts)"
        cause = news.cause or news.silent
        if news.cause:
            self._journal.write("failure", cause=cause, noticed=self._moved, decision=then)
        self._terminal.say(f"{time.strftime('%H:%M:%S')} {cause} → {then}")
        return code

    def _decide(self, position: Position | None, failure: Failure) -> str:
        decision: str = self._policy.after_failure(position, failure)
        if decision == "crash loop":
            return decision
        if failure.rung is Rung.STOP:
            return "refused"
        fails_itself = failure.kind is not Kind.LINK_LOST
        if position is None and fails_itself and self._team.is_newcomer:
            return "leaves"
        return decision

    def _ends_with(self, code: int, decision: str, worker: Worker) -> str:
        if self._stopping():
            return "ending"
        if decision == "refused":
            return f"a restart would end the same way: exit code {code}"
        if decision == "leaves":
            return (
                f"this node, which came in a lost one's place, leaves before it has trained: exit "
                f"code {code}; its log is {worker.log.path}"
            )
        return f"giving up with exit code {code}; its log is {worker.log.path}"

    def _restarting(self, not_replaced: str) -> str:
        many = f"all {self._ranks} ranks restart" if self._ranks > 1 else "it restarts"
        spent = f"{self._policy.recent} of {count(self._options.max_restarts, 'restart')}"
        return f"{many} ({spent})" + (f", since {not_replaced}" if not_replaced else "")


def _cause(failed: Failed, failure: Failure) -> str:
    if failed.early:
        return f"{failure.words} while others were still training"
    cause = failure.words
    if failed.left_before:
        ranks = ", ".join(map(str, failed.left_before))
        cause += f" after rank {ranks} had exited with code 0"
    return cause
