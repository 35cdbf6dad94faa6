"""The node agent: starts the ranks, notices that one dies, restarts them all.

A *life* is one set of ranks from start to end. All ranks of a life end together: training can
go on only with all of them, from the state that the snapshot process keeps in memory.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from mnemo.clock import Clock, SystemClock
from mnemo.config import format_duration
from mnemo.config.uncaught import EXIT_USAGE
from mnemo.errors import CrashLoopError, LaunchError
from mnemo.launcher.cause import OomWatch, describe, is_refusal
from mnemo.launcher.family import adopt_orphans, end_descendants, reap_orphans
from mnemo.launcher.restarts import CRASH_LOOP, Ended, Failed, Position, RestartPolicy, judge
from mnemo.launcher.worker import Worker, hold_port, rank_environ
from mnemo.types import EXIT_OK, EXIT_STATE_LOST, EXIT_STATE_SAVED

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from mnemo.launcher.options import LaunchOptions
    from mnemo.launcher.output import Terminal
    from mnemo.recovery.journal import Journal

_ASKED_TO_END: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)

_LAST_WORDS: Final = {
    EXIT_STATE_SAVED: "the state is saved; queue the job again to go on",
    EXIT_STATE_LOST: "the job cannot go on, and its newest state is lost",
}


def _nothing() -> None:
    return None


def _keeps_nothing(well: bool) -> None:
    del well


def _unknown() -> bool:
    return False


@dataclass(frozen=True, slots=True)
class Hooks:
    """What the agent asks of the rest of mnemo.

    Attributes:
        ensure_smp: Called before the ranks of each life start.
        position: Where the run was when it failed; None if that is not known.
        training: Whether a training is known to be under way, for which all ranks are needed.
        ended: Called when the job is over, with whether all ranks ended well; says what state is
            kept, or nothing.
    """

    ensure_smp: Callable[[], None] = _nothing
    position: Callable[[], Position | None] = _nothing
    training: Callable[[], bool] = _unknown
    ended: Callable[[bool], str | None] = _keeps_nothing


class _Life:
    """One set of ranks."""

    def __init__(self, number: int, log_dir: Path) -> None:
        self.number = number
        self.log_dir = log_dir
        self.workers: list[Worker] = []
        self._port = hold_port()
        self.exits: dict[int, int] = {}
        """Exit code by rank, in the order noticed."""
        self.noticed: dict[int, float] = {}
        """Seconds since the Unix epoch at which each exit was noticed."""

    @property
    def port(self) -> int:
        """Where rank 0 can listen; nobody else can until `close`."""
        number: int = self._port.getsockname()[1]
        return number

    def kill(self) -> None:
        """Kill the ranks that still run."""
        for worker in self.workers:
            worker.kill()

    def close(self) -> None:
        """Take the last of the output; nobody writes any more."""
        for worker in self.workers:
            worker.close()
        self._port.close()


class Agent:
    """Runs one launch on this node.

    Args:
        options: What to run.
        journal: Told of every start, failure and end.
        terminal: Where the ranks' output and the agent's own lines go.
        hooks: The rest of mnemo.
        clock: The time.
    """

    def __init__(
        self,
        options: LaunchOptions,
        *,
        journal: Journal,
        terminal: Terminal,
        hooks: Hooks | None = None,
        clock: Clock | None = None,
    ) -> None:
        self.exit_code: int | None = None
        """What the job ended with; set once `run` has returned or raised `CrashLoopError`."""
        self._options = options
        self._journal = journal
        self._terminal = terminal
        self._hooks = hooks or Hooks()
        self._clock = clock or SystemClock()
        self._policy = RestartPolicy(options.max_restarts, options.restart_window_s, self._clock)
        self._oom = OomWatch()
        self._restarts = 0
        self._life: _Life | None = None
        self._changed = asyncio.Event()
        self._stopped_by: int | None = None
        self._hurry = False

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
        well = False
        try:
            code = await self._lives()
            well = code == EXIT_OK
        except BaseException as error:
            self._journal.write("end", code=self.exit_code, error=str(error))
            raise
        finally:
            for number in (*handled, signal.SIGCHLD):
                loop.remove_signal_handler(number)
            if kept := self._hooks.ended(well):
                self._terminal.say(kept)
        self.exit_code = code
        self._journal.write("end", code=code)
        if code in _LAST_WORDS:
            self._terminal.say(f"{_LAST_WORDS[code]} (exit code {code})")
        return code

    def _announce(self) -> None:
        options = self._options
        window = format_duration(options.restart_window_s)
        self._terminal.say(
            f"run {options.run_id} · {_count(options.ranks, 'rank')} · "
            f"at most {_count(options.max_restarts, 'restart')} in {window} · "
            f"logs in {options.log_dir}"
        )
        if options.ranks > 1 and "OMP_NUM_THREADS" not in os.environ:
            self._terminal.say("OMP_NUM_THREADS=1 for each rank; set it to use more threads")

    async def _lives(self) -> int:
        while True:
            verdict = await self._live()
            if isinstance(verdict, Ended):
                return verdict.code
            if self._stopped_by is not None:
                return 128 + self._stopped_by
            self._restarts += 1

    async def _live(self) -> Ended | Failed:
        """One life; `Failed` means that there is to be another."""
        self._hooks.ensure_smp()
        life = self._life = self._next_life()
        patience_s = 0.0
        try:
            self._start(life)
            verdict = await self._supervise(life)
            if verdict == Ended(0):
                patience_s = self._options.grace_s
        finally:
            life.kill()
            immortal = await end_descendants(patience_s, lambda: self._hurry)
            life.close()
            self._life = None
        if immortal:
            msg = f"processes {', '.join(immortal)} of the ranks cannot be killed; see ps"
            raise LaunchError(msg)
        return self._after_failure(life, verdict) if isinstance(verdict, Failed) else verdict

    def _next_life(self) -> _Life:
        """A life with a log directory of its own, also where an earlier launch left some."""
        parent = self._options.log_dir
        try:
            parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            numbers = [path.name.removeprefix("life-") for path in parent.glob("life-*")]
            number = 1 + max((int(n) for n in numbers if n.isdigit()), default=-1)
            log_dir = parent / f"life-{number}"
            log_dir.mkdir()
        except OSError as error:
            msg = f"cannot write logs to {parent} ({error.strerror}); set --log-dir or run.journal"
            raise LaunchError(msg) from error
        return _Life(number, log_dir)

    def _start(self, life: _Life) -> None:
        options = self._options
        port = options.master_port or life.port
        for rank in range(options.ranks):
            environ = rank_environ(
                options, os.environ, rank=rank, restarts=self._restarts, port=port
            )
            worker = Worker(
                rank,
                options,
                environ=environ,
                log_dir=life.log_dir,
                terminal=self._terminal,
                on_exit=self._exited,
            )
            life.workers.append(worker)
        self._journal.write(
            "launch",
            run_id=options.run_id,
            life=life.number,
            restarts=self._restarts,
            worker_pids=[worker.pid for worker in life.workers],
            log_dir=str(life.log_dir.absolute()),
        )

    async def _supervise(self, life: _Life) -> Ended | Failed:
        """Wait until the exits of the ranks mean something."""
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
            if now >= deadline and self._is_only_slow(life):
                deadline = now + self._options.grace_s
            verdict = judge(
                life.exits,
                ranks=self._options.ranks,
                stopped_by=self._stopped_by,
                overdue=self._hurry or now >= deadline,
            )
            if verdict is not None:
                return verdict
            waits = deadline < float("inf")
            timer = loop.call_later(deadline - now, self._changed.set) if waits else None
            await self._changed.wait()
            if timer:
                timer.cancel()

    def _is_only_slow(self, life: _Life) -> bool:
        """Some ranks have ended well, and nothing says that the others train without them."""
        done = self._stopped_by is None and all(code == EXIT_OK for code in life.exits.values())
        return done and not self._hurry and not self._hooks.training()

    def _exited(self, worker: Worker, code: int) -> None:
        life = self._life
        assert life is not None
        life.exits[worker.rank] = code
        life.noticed[worker.rank] = self._clock.time()
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
            for worker in self._life.workers if self._life else ():
                worker.send(signal.SIGTERM)
        self._changed.set()

    def _reap_orphans(self) -> None:
        reap_orphans({worker.pid for worker in self._life.workers} if self._life else ())

    def _after_failure(self, life: _Life, failed: Failed) -> Ended | Failed:
        """Report a failure, and end the job if it has failed too often."""
        worker = life.workers[failed.rank]
        position = self._hooks.position()
        decision: str = self._policy.after_failure(position)
        refusal = next((text for each in life.workers if (text := each.refusal())), "")
        if decision == "restart" and (refusal or is_refusal(failed.code, worker.log.tail)):
            decision = "refused"
        out_of_memory = self._oom.struck()
        cause = _cause(failed, worker, out_of_memory=out_of_memory)
        if refusal:
            cause = f"found a wrong setting ({refusal})"
        code = failed.code if failed.code > 0 else 128 - failed.code if failed.code else 1
        self._journal.write(
            "failure",
            life=life.number,
            rank=failed.rank,
            local_rank=failed.rank,
            worker_pid=worker.pid,
            exit_code=failed.code if failed.code >= 0 else None,
            signal=-failed.code if failed.code < 0 else None,
            cause=cause,
            out_of_memory=out_of_memory,
            noticed=life.noticed[failed.rank],
            position=position,
            decision=decision,
        )
        if refusal:
            self._terminal.say(refusal)
            return Ended(EXIT_USAGE)
        options = self._options
        many = f"all {options.ranks} ranks restart" if options.ranks > 1 else "it restarts"
        limit = _count(options.max_restarts, "restart")
        then = f"{many} ({self._policy.recent} of {limit})"
        if self._stopped_by is not None:
            then = "ending"
        elif decision == "refused":
            then = f"a restart would end the same way: exit code {code}"
        elif decision != "restart":
            then = f"giving up with exit code {code}; its log is {worker.log.path}"
        at = time.strftime("%H:%M:%S", time.localtime(life.noticed[failed.rank]))
        self._terminal.say(f"{at} rank {failed.rank} {cause} → {then}")
        if decision == "restart":
            return failed
        if decision == "crash loop":
            self.exit_code = code
            last = "\n".join(f"  {line}" for line in worker.log.tail)
            msg = (
                f"{CRASH_LOOP} failures in a row at {position}: the batch itself seems to be the "
                f"cause. Rank {failed.rank} {cause}; its last lines:\n{last}"
            )
            raise CrashLoopError(msg)
        return Ended(code)


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


def _cause(failed: Failed, worker: Worker, *, out_of_memory: bool) -> str:
    if failed.early:
        return "exited with code 0 while others were still training"
    last_line = next((line for line in reversed(worker.log.tail) if line.strip()), "")
    cause = describe(failed.code, out_of_memory=out_of_memory, last_line=last_line)
    if failed.left_before:
        ranks = ", ".join(map(str, failed.left_before))
        cause += f" after rank {ranks} had exited with code 0"
    return cause
