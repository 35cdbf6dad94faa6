"""Finds a rank that hangs while others wait for it, and kills it, so that it is replaced.

The ranks are asked what they do every few seconds (`mnemo.recovery.control.Ask`); who hangs is
decided by `mnemo.recovery.hangs`. Before one is killed, the stacks of all ranks are written to the
log directory, and whoever got moving meanwhile is left alone.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

import psutil

from mnemo.config import format_duration
from mnemo.recovery.control import Ask
from mnemo.recovery.hangs import Vigil

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping

    from mnemo.launcher.worker import Worker
    from mnemo.recovery.control import Channel, Doing
    from mnemo.recovery.hangs import Hang
    from mnemo.recovery.journal import Journal

_STACKS_S: Final = 1.0
"""How long the ranks may take to write theirs."""
_WORKING: Final = 0.05
"""Share of a processor that a process uses which works."""
_MOVING: Final = 1 << 20
"""So many bytes read or written between two looks are work, too."""
_STOPPED: Final = frozenset({psutil.STATUS_STOPPED})


class Guard:
    """Of one life.

    Args:
        limit_s: See `mnemo.recovery.hangs.Vigil`.
        log_dir: Gets the stacks.
        watched: Gives the channels of all ranks, by rank, as long as one of them can be replaced.
        worker: Gives a rank's process.
        journal: Told of what hangs without being one rank's fault.
        say: Tells people.
    """

    def __init__(
        self,
        limit_s: float | None,
        log_dir: Path,
        *,
        watched: Callable[[], Mapping[int, Channel]],
        worker: Callable[[int], Worker],
        journal: Journal,
        say: Callable[[str], None],
    ) -> None:
        self._vigil = Vigil(limit_s)
        self._log_dir = log_dir.absolute()
        self._watched = watched
        self._worker = worker
        self._journal = journal
        self._say = say
        self._number = 0
        self._answers: dict[int, Doing] = {}
        self._efforts: dict[int, _Effort] = {}
        self._hangs = 0
        self._said_stuck = False
        self._heard = asyncio.Event()
        self._task = None if limit_s == float("inf") else asyncio.create_task(self._watch())

    async def end(self) -> None:
        """Nobody is watched any more."""
        if self._task:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def hear(self, rank: int, said: Doing) -> None:
        """A rank has answered."""
        self._answers[rank] = said
        self._vigil.hear(rank, said, self._now())
        self._heard.set()

    @staticmethod
    def _now() -> float:
        return asyncio.get_running_loop().time()

    async def _watch(self) -> None:
        watched: dict[int, int] = {}
        while True:
            began = self._now()
            await asyncio.sleep(self._vigil.period_s)
            late_s = self._now() - began - self._vigil.period_s
            channels = self._watched()
            pids = self._pids(channels)
            if pids != watched:
                watched = pids
                self._vigil.begin(channels, self._now())
                self._efforts.clear()
                self._answers.clear()
            elif late_s > self._vigil.period_s:  # this process was stopped, or the whole machine
                self._vigil.slept(late_s)
            if channels:
                await self._look(channels)

    def _pids(self, ranks: Iterable[int]) -> dict[int, int]:
        return {rank: self._worker(rank).pid for rank in ranks}

    async def _look(self, channels: Mapping[int, Channel]) -> None:
        self._ask(channels)
        suspects = self._vigil.suspects(self._now())
        for rank in suspects:
            self._examine(rank)
        if not suspects:
            self._efforts.clear()
            self._said_stuck = False
        hang = self._vigil.find(self._now())
        if hang and (hang.ranks or not self._said_stuck):
            await self._act(channels)

    def _ask(self, channels: Mapping[int, Channel], stacks: Path | None = None) -> None:
        self._number += 1
        for rank, channel in channels.items():
            channel.tell(Ask(self._number, str(stacks / f"rank-{rank}.txt") if stacks else ""))

    def _examine(self, rank: int) -> None:
        """Whether it works, or is looked at by somebody."""
        said = self._answers.get(rank)
        before, now = self._efforts.get(rank), _Effort(self._worker(rank).pid, self._now())
        self._efforts[rank] = now
        if now.traced or (said and said.debugged):
            self._vigil.excuse(rank, self._now())
        elif before is not None and now.is_work_since(before):
            self._vigil.works(rank, self._now())

    async def _act(self, channels: Mapping[int, Channel]) -> None:
        """Keep all stacks; kill who hangs, if it still does."""
        stacks = self._log_dir / f"hang-{self._hangs}"
        try:
            stacks.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            self._say(f"the stacks of a hang cannot be written to {stacks}: {error.strerror}")
        pids = self._pids(channels)
        self._ask(channels, stacks)
        with suppress(asyncio.TimeoutError):
            some = channels.keys() - self._vigil.silent(self._now())
            await asyncio.wait_for(self._have_answered(some), _STACKS_S)
        hang = self._vigil.find(self._now())
        if hang is None or self._pids(self._watched()) != pids:
            return
        self._hangs += 1
        for rank in channels:
            if not self._is_answered(rank):
                _write_states(self._worker(rank).pid, stacks / f"rank-{rank}.txt")
        for rank in hang.ranks:
            self._vigil.condemn(rank)
            self._worker(rank).condemn(f"{self._where(rank)}: {_times(hang)}; stacks in {stacks})")
        if not hang.ranks:
            self._tell_stuck(hang, stacks)

    def _tell_stuck(self, hang: Hang, stacks: Path) -> None:
        self._said_stuck = True
        self._say(
            f"{_times(hang)}), and it is not one rank that the others wait for: nothing is done; "
            f"the stacks of all ranks are in {stacks}"
        )
        self._journal.write("stuck", still_s=round(hang.still_s, 1), stacks=str(stacks))

    async def _have_answered(self, ranks: Collection[int]) -> None:
        while not all(map(self._is_answered, ranks)):
            self._heard.clear()
            await self._heard.wait()

    def _is_answered(self, rank: int) -> bool:
        said = self._answers.get(rank)
        return said is not None and said.number == self._number

    def _where(self, rank: int) -> str:
        if self._is_answered(rank):
            return f"hangs in {self._answers[rank].place}"
        with suppress(psutil.Error):
            process = psutil.Process(self._worker(rank).pid)
            if process.status() in _STOPPED:
                return "is stopped"
            return f"does not answer ({process.status()})"
        return "does not answer"


def _times(hang: Hang) -> str:
    return f"no progress for {hang.still_s:.0f} s (limit {format_duration(round(hang.limit_s, 1))}"


class _Effort:
    """What a rank's process and its children have used until now.

    Args:
        pid: The process.
        now: Seconds.
    """

    def __init__(self, pid: int, now: float) -> None:
        self._now = now
        self._cpu_s, self._bytes = 0.0, 0
        self.traced = False
        """A debugger is attached."""
        with suppress(psutil.Error):
            process = psutil.Process(pid)
            self.traced = _is_traced(pid)
            for each in (process, *process.children(recursive=True)):
                self._add(each)

    def _add(self, process: psutil.Process) -> None:
        with suppress(psutil.Error, NotImplementedError):  # a kernel without such counters
            times, moved = process.cpu_times(), process.io_counters()
            self._cpu_s += times.user + times.system
            self._bytes += moved.read_chars + moved.write_chars

    def is_work_since(self, before: _Effort) -> bool:
        """Whether that was enough to be work."""
        share = (self._cpu_s - before._cpu_s) / max(self._now - before._now, 0.01)
        return share > _WORKING or self._bytes - before._bytes > _MOVING


def _is_traced(pid: int) -> bool:
    with suppress(OSError, StopIteration, ValueError):
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("TracerPid:"))[10:]) != 0
    return False


def _write_states(pid: int, path: Path) -> None:
    """What the kernel says of the threads of a process that does not answer."""
    text = ""
    with suppress(OSError):
        for task in sorted(Path(f"/proc/{pid}/task").iterdir(), key=lambda p: int(p.name)):
            text += f"thread {task.name}\n"
            for name in ("comm", "wchan", "stack", "status"):
                with suppress(OSError):  # some are for root only
                    text += f"{name}: {(task / name).read_text().rstrip()}\n"
    with suppress(OSError):
        path.write_text(text)
