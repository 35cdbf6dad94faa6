"""The node agent: starts the ranks, notices that one dies, restarts it or them all.

A *life* is one set of ranks from start to end. All ranks of a life end together, unless one that
dies can be replaced (`mnemo.launcher.replacing`): training can go on only with all of them, from
the state that the snapshot process keeps in memory.
"""

from __future__ import annotations

import asyncio
import os
import signal
from typing import TYPE_CHECKING, Any, Final, TypeVar

from mnemo.clock import Clock, SystemClock
from mnemo.config import format_duration
from mnemo.errors import CrashLoopError, LaunchError, RunInUseError
from mnemo.launcher import silence
from mnemo.launcher.c10d import StoreHost
from mnemo.launcher.failures import Failures
from mnemo.launcher.family import adopt_orphans, end_descendants, reap_orphans
from mnemo.launcher.hooks import Hooks
from mnemo.launcher.life import Life
from mnemo.launcher.output import count
from mnemo.launcher.replacing import Replacing
from mnemo.launcher.restarts import Ended, Failed, RestartPolicy, judge
from mnemo.launcher.seat import Seat
from mnemo.launcher.team import Alone, Team
from mnemo.types import EXIT_OK, EXIT_STATE_LOST, EXIT_STATE_SAVED

if TYPE_CHECKING:
    from collections.abc import Coroutine, Mapping

    from mnemo.launcher.options import LaunchOptions
    from mnemo.launcher.output import Terminal
    from mnemo.launcher.worker import Worker
    from mnemo.recovery.journal import Journal

_T = TypeVar("_T")

_ASKED_TO_END: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)

_LAST_WORDS: Final[Mapping[int, str]] = {
    EXIT_STATE_SAVED: "the state is saved; queue the job again to go on",
    EXIT_STATE_LOST: "the job cannot go on, and its newest state is lost",
}


class Agent:
    """Runs one launch on this node.

    Args:
        options: What to run.
        journal: Told of every start, failure and end.
        terminal: Where the ranks' output and the agent's own lines go.
        hooks: The rest of mnemo.
        team: The other nodes' agents.
        clock: The time.
    """

    def __init__(
        self,
        options: LaunchOptions,
        *,
        journal: Journal,
        terminal: Terminal,
        hooks: Hooks | None = None,
        team: Team | None = None,
        clock: Clock | None = None,
    ) -> None:
        self.exit_code: int | None = None
        """What the job ended with; set once `run` has returned or raised `CrashLoopError`."""
        self._options = options
        self._journal = journal
        self._terminal = terminal
        self._hooks = hooks or Hooks()
        self._team: Team = team or Alone(options)
        self._clock = clock or SystemClock()
        self._policy = RestartPolicy(options.max_restarts, options.restart_window_s, self._clock)
        self._life: Life | None = None
        self._replacing: Replacing | None = None
        self._host = StoreHost() if options.in_process and options.ranks > 1 else None
        self._changed = asyncio.Event()
        self._stopped_by: int | None = None
        self._hurry = False
        self._starts_smp = False
        self._words = ""
        """What the exit code means, where others have ended the job."""
        self._failures = Failures(
            options,
            self._policy,
            self._team,
            self._hooks,
            journal=journal,
            terminal=terminal,
            clock=self._clock,
            stopping=lambda: self._stopped_by is not None,
        )

    def run(self) -> int:
        """Run the job to its end; call it from the main thread, once.

        Returns:
            The exit code of the command: 0, 75, 76, 128 plus a signal, or the failed rank's own.

        Raises:
            LaunchError: The ranks cannot be started.
            CrashLoopError: The job died again and again at the same batch.
        """
        adopt_orphans()
        return asyncio.run(self._run())

    async def _run(self) -> int:
        loop = asyncio.get_running_loop()
        handled = [n for n in _ASKED_TO_END if signal.getsignal(n) is not signal.SIG_IGN]  # nohup
        for number in handled:
            loop.add_signal_handler(number, self._asked_to_end, number)
        loop.add_signal_handler(signal.SIGCHLD, self._reap_orphans)
        self._announce()
        self._team.watch(self._changed.set)
        well = False
        try:
            code = await self._lives()
            well = code == EXIT_OK
        except RunInUseError:
            raise  # the journal is another job's
        except BaseException as error:
            if isinstance(error, CrashLoopError):
                self.exit_code = error.code
            self._journal.write("end", code=self.exit_code, error=str(error))
            raise
        finally:
            for number in (*handled, signal.SIGCHLD):
                loop.remove_signal_handler(number)
            await self._team.close()
            if self._host:
                await self._host.end()
            taken = self._hooks.taken()
            if kept := self._hooks.ended(well):
                self._terminal.say(kept)
        self.exit_code = code
        if not taken:
            self._journal.write("end", code=code)
        if words := self._words or _LAST_WORDS.get(code):
            self._terminal.say(f"{words} (exit code {code})")
        return code

    def _announce(self) -> None:
        options = self._options
        window = format_duration(options.restart_window_s)
        self._terminal.say(
            f"run {options.run_id} · {count(options.ranks, 'rank')}{self._team} · "
            f"at most {count(options.max_restarts, 'restart')} in {window} · "
            f"logs in {options.log_dir}"
        )
        if options.ranks > 1 and "OMP_NUM_THREADS" not in os.environ:
            self._terminal.say("OMP_NUM_THREADS=1 for each rank; set it to use more threads")

    async def _lives(self) -> int:
        while True:
            code = await self._live()
            if code is not None:
                return code
            if self._stopped_by is not None:
                return 128 + self._stopped_by

    async def _live(self) -> int | None:
        """One life; the exit code of the job, or None if there is to be another life."""
        await self._ensure_smp()
        life = self._life = Life(self._options.log_dir)
        patience_s = 0.0
        listening: asyncio.Task[None] | None = None
        try:
            seat = await self._unless_stopped(self._team.take_seat(life.port))
            if isinstance(seat, Ended):
                self._words = seat.words
                return seat.code
            if seat is None:
                return None
            self._failures.begin(life, seat)
            self._start(life, seat)
            listening = asyncio.create_task(silence.watch(self._hooks.silent, self._terminal.say))
            verdict = await self._supervise(life)
            if verdict == Ended(0):
                patience_s = self._options.grace_s
        finally:
            life.kill()
            if listening:
                listening.cancel()
            if self._replacing:
                await self._replacing.end()
            immortal = await end_descendants(patience_s, lambda: self._hurry)
            life.close()
            self._life = None
        if immortal:
            msg = f"processes {', '.join(immortal)} of the ranks cannot be killed; see ps"
            raise LaunchError(msg)
        if isinstance(verdict, Failed):
            return await self._failures.here(life, verdict, self._not_replaced())
        if isinstance(verdict, Ended):
            everywhere = await self._unless_stopped(
                self._team.all_ended(verdict.code), patience_s=self._options.grace_s
            )
            if everywhere is not None or self._stopped_by is not None:
                return verdict.code if everywhere is None else everywhere
        return await self._failures.elsewhere(self._not_replaced())

    async def _ensure_smp(self) -> None:
        """In a thread: one that hangs is waited for, and this node's agent is heard meanwhile."""
        self._starts_smp = True  # and reaps what it starts for that
        try:
            await asyncio.to_thread(self._hooks.ensure_smp)
        finally:
            self._starts_smp = False
            self._reap_orphans()

    async def _unless_stopped(
        self, waiting: Coroutine[Any, Any, _T], patience_s: float = 0.0
    ) -> _T | None:
        """What ``waiting`` gives; None if the job is asked to end, and it takes longer then."""
        task = asyncio.ensure_future(waiting)
        task.add_done_callback(lambda _: self._changed.set())
        try:
            while not task.done() and self._stopped_by is None:
                self._changed.clear()
                await self._changed.wait()
            await asyncio.wait({task}, timeout=patience_s)
            return task.result() if task.done() else None
        finally:
            task.cancel()

    def _start(self, life: Life, seat: Seat) -> None:
        options = self._options
        replacing = self._replacing = Replacing(
            life,
            seat,
            options,
            host=self._host,
            policy=self._policy,
            position=self._hooks.position,
            journal=self._journal,
            say=self._terminal.say,
            struck=self._failures.struck,
            changed=self._changed.set,
        )
        life.start(
            options, seat, terminal=self._terminal, on_exit=self._exited, start=replacing.start
        )
        self._journal.write(
            "launch",
            run_id=options.run_id,
            life=life.number,
            restarts=seat.restarts,
            node_rank=seat.node_rank,
            nodes=seat.nodes,
            worker_pids=[worker.pid for worker in life.workers.values()],
            log_dir=str(life.log_dir.absolute()),
        )

    async def _supervise(self, life: Life) -> Ended | Failed | None:
        """Wait until the exits of the ranks mean something; None if those of other nodes do."""
        loop = asyncio.get_running_loop()
        deadline = float("inf")
        asked = False
        while True:
            self._changed.clear()
            now = loop.time()
            if self._stopped_by is not None and not asked:
                deadline, asked = now + self._options.grace_s, True
            elif life.exits:
                deadline = min(deadline, now + self._options.grace_s)
            if now >= deadline and await self._is_only_slow(life):
                deadline = now + self._options.grace_s
            if self._replacing:
                self._replacing.check()
            verdict = judge(
                life.exits,
                ranks=self._options.ranks,
                stopped_by=self._stopped_by,
                overdue=self._hurry or now >= deadline,
            )
            if verdict is not None:
                return verdict
            if self._team.is_over:
                return None
            waits = deadline < float("inf")
            timer = loop.call_later(deadline - now, self._changed.set) if waits else None
            await self._changed.wait()
            if timer:
                timer.cancel()

    async def _is_only_slow(self, life: Life) -> bool:
        """Some ranks have ended well, and nothing says that the others train without them."""
        done = self._stopped_by is None and all(code == EXIT_OK for code in life.exits.values())
        if not done or self._hurry:
            return False
        # Who is asked may hang: whatever happens meanwhile counts first, as that ranks are to end.
        self._changed.clear()
        asking = asyncio.ensure_future(asyncio.to_thread(self._hooks.training))
        asking.add_done_callback(lambda _: self._changed.set())
        if not self._team.is_over:
            await self._changed.wait()
        return not (asking.done() and asking.result())

    def _exited(self, worker: Worker, code: int) -> None:
        life = self._life
        assert life is not None
        life.noticed[worker.rank] = self._clock.time()
        replaces = self._stopped_by is None and self._replacing
        if not (replaces and replaces.lost(worker, code)):
            life.exits[worker.rank] = code
            self._changed.set()

    def _asked_to_end(self, number: int) -> None:
        """Goes on as SIGTERM, at which ranks save their state and end; a second SIGINT kills."""
        if number == signal.SIGINT and self._stopped_by == signal.SIGINT:
            self._hurry = True
        elif self._stopped_by is None:
            self._stopped_by = number
            name = signal.Signals(number).name
            grace = f"{self._options.grace_s:g} s"
            self._terminal.say(f"{name}: the ranks have {grace} to save their state and end")
            self._journal.write("stop", signal=name)
            for worker in self._life.workers.values() if self._life else ():
                worker.send(signal.SIGTERM)
        self._changed.set()

    def _reap_orphans(self) -> None:
        if self._starts_smp:
            return
        own = self._life.pids if self._life else set()
        reap_orphans(own | (self._replacing.pids if self._replacing else set()))

    def _not_replaced(self) -> str:
        return self._replacing.why_not if self._replacing else ""
