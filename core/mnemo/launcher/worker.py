"""One rank: its environment, its process, its output."""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
import socket
import subprocess
import threading
from contextlib import ExitStack, suppress
from functools import partial
from typing import TYPE_CHECKING, Final, Protocol

import psutil

from mnemo.config.uncaught import AGENT_VARIABLE, REFUSAL_VARIABLE
from mnemo.errors import LaunchError
from mnemo.launcher.output import RankLog, RankStream
from mnemo.recovery.classes import classify
from mnemo.recovery.dying import await_death, dying_of

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence
    from pathlib import Path

    from mnemo.launcher.options import LaunchOptions
    from mnemo.launcher.output import Terminal
    from mnemo.launcher.seat import Seat
    from mnemo.recovery.classes import Failure

_PR_SET_PDEATHSIG: Final = 1
_libc = ctypes.CDLL(None, use_errno=True)


def hold_port() -> socket.socket:
    """A socket at a TCP port that is given to nobody else as long as it is open.

    It does not listen; who asks for that very port with SO_REUSEADDR, as torch's store does,
    listens there. Rank 0 only does so after seconds of imports, when a port that was merely free
    may be another program's.
    """
    holder = socket.socket()
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    holder.bind(("", 0))
    return holder


def rank_environ(
    options: LaunchOptions, base: Mapping[str, str], seat: Seat, local_rank: int
) -> dict[str, str]:
    """The environment of one rank: torchrun's variables, and mnemo's.

    TORCHELASTIC_USE_AGENT_STORE is left out: rank 0 hosts the store, unless ranks are replaced.

    Args:
        options: The launch.
        base: The agent's environment.
        seat: Where this node's ranks stand.
        local_rank: Which of them it is.
    """
    rank, world = str(seat.first_rank + local_rank), str(seat.world_size)
    environ = {
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
        **({"OMP_NUM_THREADS": "1"} if options.ranks > 1 else {}),
        **base,
        **options.environ,
        "RANK": rank,
        "LOCAL_RANK": str(local_rank),
        "GROUP_RANK": str(seat.node_rank),
        "ROLE_RANK": rank,
        "ROLE_NAME": options.role,
        "WORLD_SIZE": world,
        "LOCAL_WORLD_SIZE": str(options.ranks),
        "GROUP_WORLD_SIZE": str(seat.nodes),
        "ROLE_WORLD_SIZE": world,
        "MASTER_ADDR": seat.master_addr,
        "MASTER_PORT": str(seat.master_port),
        "TORCHELASTIC_RESTART_COUNT": str(seat.restarts),
        "TORCHELASTIC_MAX_RESTARTS": str(options.max_restarts),
        "TORCHELASTIC_RUN_ID": options.torch_run_id or options.run_id,
        "MNEMO_RUN_ID": options.run_id,
        AGENT_VARIABLE: f"{os.getpid()}-{psutil.Process().create_time():.2f}",
    }
    environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)
    return environ


def watch_exit(pid: int, callback: Callable[[], None]) -> Callable[[], None]:
    """Call back, in the running event loop, once a child has ended. It is not reaped.

    Returns:
        What takes the watch back; to be called once, at the latest after the callback.
    """
    loop = asyncio.get_running_loop()
    try:
        fd = os.pidfd_open(pid)
    except (AttributeError, OSError):  # a kernel before 5.3, or a sandbox without it
        thread = threading.Thread(target=_wait, args=(pid, loop, callback), daemon=True)
        thread.start()
        return thread.join

    def ended() -> None:
        loop.remove_reader(fd)
        callback()

    def unwatch() -> None:
        loop.remove_reader(fd)
        os.close(fd)

    loop.add_reader(fd, ended)
    return unwatch


def _wait(pid: int, loop: asyncio.AbstractEventLoop, callback: Callable[[], None]) -> None:
    with suppress(ChildProcessError):  # killed and reaped already
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        loop.call_soon_threadsafe(callback)


class Start(Protocol):
    """How the process of a rank comes to be."""

    def __call__(
        self, command: Sequence[str], environ: Mapping[str, str], stdout: int, stderr: int
    ) -> subprocess.Popen[bytes]:
        """Start ``command``, the leader of a session of its own.

        Raises:
            OSError: It cannot be started.
        """
        ...


def execute(
    command: Sequence[str],
    environ: Mapping[str, str],
    stdout: int,
    stderr: int,
    pass_fds: Collection[int] = (),
) -> subprocess.Popen[bytes]:
    """`Start` a new process, which dies with the agent. It keeps ``pass_fds``."""
    return subprocess.Popen(
        command,
        env=environ,
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=stderr,
        start_new_session=True,
        pass_fds=pass_fds,
        # What runs between fork and exec takes no lock that another thread may hold.
        preexec_fn=partial(_die_with, os.getpid()),  # noqa: PLW1509
    )


class Worker:
    """A running rank.

    Args:
        rank: Global rank.
        options: The launch.
        local_rank: Which of this node's it is.
        environ: See `rank_environ`.
        shows_rank: Its lines are shown with the rank in front.
        log_dir: Where its file goes, ``rank-<rank>.log``.
        terminal: Where its output goes.
        on_exit: Called with the worker and its exit code (negative for a signal) once it has
            ended by itself; not after `kill`.
        start: How its process comes to be.

    Raises:
        LaunchError: The program cannot be started.
    """

    def __init__(
        self,
        rank: int,
        options: LaunchOptions,
        *,
        local_rank: int,
        environ: Mapping[str, str],
        shows_rank: bool,
        log_dir: Path,
        terminal: Terminal,
        on_exit: Callable[[Worker, int], None],
        start: Start = execute,
    ) -> None:
        self.rank = rank
        self.local_rank = local_rank
        self._on_exit = on_exit
        self._told = False
        self._hang = ""
        pipes = {"stdout": os.pipe(), "stderr": os.pipe()}
        self._refusal = log_dir / f"rank-{rank}.refusal"
        files = {
            "TORCHELASTIC_ERROR_FILE": str(log_dir / f"rank-{rank}.error.json"),
            REFUSAL_VARIABLE: str(self._refusal),
        }
        try:
            self.log = RankLog(log_dir / f"rank-{rank}.log", terminal)
            self._process = start(
                options.command, {**environ, **files}, pipes["stdout"][1], pipes["stderr"][1]
            )
        except OSError as error:
            for read_end, _ in pipes.values():
                os.close(read_end)
            msg = f"cannot start rank {rank}: {error}"
            raise LaunchError(msg) from error
        finally:
            for _, write_end in pipes.values():
                os.close(write_end)
        streams = [
            RankStream(
                read_end,
                stream,
                log=self.log,
                terminal=None if (local_rank, stream) in options.hidden else terminal,
                rank=rank if shows_rank else None,
            )
            for stream, (read_end, _) in pipes.items()
        ]
        self._output = ExitStack()
        self._output.callback(self.log.close)
        for stream in streams:
            self._output.callback(stream.close)
        self._watch = ExitStack()
        self._watch.callback(watch_exit(self.pid, self._ended))

    @property
    def pid(self) -> int:
        """Its process and process group."""
        return self._process.pid

    def refusal(self) -> str:
        """The wrong setting that its script ended with, in words; empty if it is not that."""
        try:
            return self._refusal.read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return ""

    def failure(self, code: int, *, out_of_memory: bool = False) -> Failure:
        """What has ended it; its output has been taken (`close`).

        Args:
            code: Its exit code; negative for a signal.
            out_of_memory: The kernel has just killed for want of memory.
        """
        return classify(
            code,
            tuple(self.log.tail),
            out_of_memory=out_of_memory,
            refusal=self.refusal(),
            hang=self._hang if code == -signal.SIGKILL else "",
        )

    def send(self, number: int) -> None:
        """Send a signal to the rank alone: its loader workers are its own business."""
        # Not by Popen, which would reap a rank that has just ended, unseen by `_ended`.
        if self._process.returncode is None:
            os.kill(self.pid, number)

    def _ended(self) -> None:
        if self._process.returncode is not None:
            return
        status = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
        if status and (status.si_code, status.si_status) != (os.CLD_EXITED, 0):
            # It failed: what it started goes with it. Not reaped yet, its number is still its own.
            self._kill_group()
        code = self._process.wait()
        self._watch.close()
        self._tell(code)

    def watch(self, fd: int) -> None:
        """Notice at once if it is killed; ``fd`` is what `mnemo.recovery.dying.hold` gave it."""
        loop = asyncio.get_running_loop()

        def soon() -> None:
            with suppress(RuntimeError):  # the agent is ending
                loop.call_soon_threadsafe(self._dies)

        with suppress(OSError):
            await_death(self.pid, fd, soon)

    def _dies(self) -> None:
        if self._process.returncode is None and (number := dying_of(self.pid)):
            self._kill_group()
            self._tell(-number)

    def _tell(self, code: int) -> None:
        if not self._told:
            self._told = True
            self._on_exit(self, code)

    def condemn(self, why: str) -> None:
        """Kill it, since it hangs; its end is noticed as any other, with ``why`` in words."""
        if self._process.returncode is None:
            self._hang = why
            self._kill_group()

    def kill(self) -> None:
        """Kill its whole process group, unless it has ended by itself."""
        self._told = True
        if self._process.returncode is None:
            self._kill_group()
            self._process.wait()
        self._watch.close()

    def _kill_group(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    def close(self) -> None:
        """Take the last of its output, after it has ended; once is enough."""
        self._output.close()


def _die_with(parent: int) -> None:
    """Have the kernel kill this process when the agent dies: nothing is orphaned."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it died before the call
        os.kill(os.getpid(), signal.SIGKILL)
