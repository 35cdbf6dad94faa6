"""The agent's side of warm standbys: how many there are, and what becomes of them."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

from mnemo.launcher.imports import unguarded
from mnemo.launcher.standby import RANKS_OWN, Become, Reads, Warm, decoder
from mnemo.launcher.worker import execute, watch_exit
from mnemo.recovery.classes import in_words
from mnemo.recovery.control import CONTROL_VARIABLE

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from mnemo.launcher.options import LaunchOptions
    from mnemo.recovery.journal import Journal

_MOST_DEATHS: Final = 3
"""So many of a life's standbys may end by themselves."""
_MOST_BYTES: Final = 1 << 16
_BOOT: Final = (
    "import sys; place = sys.argv.pop(1); getattr(sys.flags, 'safe_path', 0) or "
    "sys.path.__setitem__(0, place); from mnemo.launcher.standby import main; main()"
)
"""The path begins as the script's does: whatever is imported comes from where it would there."""


class Standby:
    """One process.

    Args:
        command: As of a rank.
        environ: As of a rank, without what tells ranks apart.
        until: The line of the script from which on its imports are left to it; None for no such.
        log: A file for what it writes until it is a rank.
        on_news: Called with the standby and what it says; None at its end.
    """

    def __init__(
        self,
        command: tuple[str, ...],
        environ: Mapping[str, str],
        *,
        until: int | None,
        log: Path,
        on_news: Callable[[Standby, Warm | Reads | None], None],
    ) -> None:
        self.is_warm = False
        self.code: int | None = None
        """Its exit code, once it has ended."""
        self._on_news = on_news
        self._agent, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._agent.setblocking(False)
        python, unbuffered, *words = command
        boot = (python, unbuffered, "-c", _BOOT, _script_place(words), str(until or 0), *words)
        fd = theirs.fileno()
        self._environ = {**environ, "MNEMO_ROLE": "standby", CONTROL_VARIABLE: str(fd)}
        with theirs, log.open("ab") as file:
            out = file.fileno()
            self._process = execute(boot, self._environ, out, out, pass_fds=(fd,))
        self._watching = ExitStack()
        loop = asyncio.get_running_loop()
        loop.add_reader(self._agent, self._read)
        self._watching.callback(loop.remove_reader, self._agent)
        self._watching.callback(watch_exit(self.pid, self._ended))

    @property
    def pid(self) -> int:
        """Its process."""
        return self._process.pid

    def become(
        self, environ: Mapping[str, str], stdout: int, stderr: int
    ) -> tuple[subprocess.Popen[bytes], socket.socket]:
        """Make it a rank, which this object has nothing more to do with.

        Returns:
            Its process, and the agent's end of its control channel.

        Raises:
            OSError: It has just ended.
        """
        changed = {k: v for k, v in environ.items() if self._environ.get(k) != v}
        changed.pop(CONTROL_VARIABLE, None)
        without = [k for k in self._environ if k not in environ and k != CONTROL_VARIABLE]
        message = msgspec.json.encode(Become(changed, without))
        socket.send_fds(self._agent, [message], [stdout, stderr])
        self._watching.close()
        return self._process, self._agent

    def close(self) -> None:
        """Kill it, if it has not ended."""
        self._watching.close()
        self._agent.close()
        if self._process.returncode is None:
            with suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
            self._process.wait()

    def _read(self) -> None:
        with suppress(BlockingIOError):
            data = self._agent.recv(_MOST_BYTES)
            if not data:
                asyncio.get_running_loop().remove_reader(self._agent)
                return
            said = decoder.decode(data)
            self.is_warm = isinstance(said, Warm)
            self._on_news(self, said)

    def _ended(self) -> None:
        self.code = self._process.wait()
        self._on_news(self, None)


def _script_place(words: list[str]) -> str:
    """What the interpreter puts first on the path."""
    if words[0] == "-m":
        return str(Path.cwd())
    return os.path.dirname(os.path.realpath(words[0]))  # noqa: PTH120 - strictly as it does


class Reserve:
    """The standbys of one life.

    Args:
        options: The launch; says how many.
        environ: As of a rank.
        log_dir: Gets their file, ``standby.log``.
        journal: Told of each that ends by itself.
        say: Tells people.
    """

    def __init__(
        self,
        options: LaunchOptions,
        environ: Mapping[str, str],
        log_dir: Path,
        *,
        journal: Journal,
        say: Callable[[str], None],
    ) -> None:
        self._wanted = options.standbys
        self._journal = journal
        self._say = say
        shared = {k: v for k, v in environ.items() if k not in RANKS_OWN}
        self._make = partial(
            Standby, options.command, shared, log=log_dir / "standby.log", on_news=self._news
        )
        self._script = next((word for word in options.command[2:] if word != "-m"), "")
        self._standbys: list[Standby] = []
        self._until: int | None = None
        self._deaths = 0
        self._said = False
        self._begun = False

    @property
    def pids(self) -> set[int]:
        """Their processes."""
        return {standby.pid for standby in self._standbys}

    def fill(self) -> None:
        """Have as many as are wanted."""
        if not self._wanted and not self._said:
            self._said = True
            self._say("a rank that dies is replaced in the running job (no standby is kept)")
        if not self._begun:
            self._begun = True
            self._say_unguarded()
        while len(self._standbys) < self._wanted:
            try:
                self._standbys.append(self._make(until=self._until))
            except OSError as error:
                self._give_up(f"no standby can be started: {error}")

    def take(self) -> Standby | None:
        """One that is warm, not of the reserve any more; None if there is none."""
        standby = next((each for each in self._standbys if each.is_warm), None)
        if standby is not None:
            self._standbys.remove(standby)
        return standby

    def close(self) -> None:
        """End them."""
        while self._standbys:
            self._standbys.pop().close()

    def _news(self, standby: Standby, said: Warm | Reads | None) -> None:
        if standby not in self._standbys:
            return
        if isinstance(said, Warm):
            self._say_ready(said)
            return
        self._standbys.remove(standby)
        standby.close()
        if isinstance(said, Reads):
            self._reads(said)
        else:
            self._died(standby)

    def _reads(self, said: Reads) -> None:
        reads = f"{said.module} reads {said.variable} while it is imported"
        if not said.line:
            self._give_up(reads)
            return
        self._until = said.line
        self.fill()
        self._say(
            f"{reads}, which a standby does not know yet: it leaves {self._script} from line "
            f"{said.line} on to the rank that it becomes, which takes longer then"
        )

    def _died(self, standby: Standby) -> None:
        self._deaths += 1
        assert standby.code is not None
        words = in_words(standby.code)
        self._journal.write("standby", standby_pid=standby.pid, cause=words)
        ended = f"a standby {words}"
        if self._deaths >= _MOST_DEATHS:
            self._give_up(f"{ended}, the {self._deaths}rd one of this life")
            return
        self.fill()
        self._say(f"{ended} → another one is started")

    def _say_unguarded(self) -> None:
        with suppress(OSError, SyntaxError, ValueError):  # no script, or none of Python's
            line = unguarded(Path(self._script).read_bytes())
            if line is not None:
                self._say(
                    f"{self._script} does its work for whoever imports it (line {line}): loader "
                    "workers that are spawned do it again, and a standby stops there; put it "
                    'into a function that is called under if __name__ == "__main__":'
                )

    def _say_ready(self, warm: Warm) -> None:
        if self._said or not all(standby.is_warm for standby in self._standbys):
            return
        self._said = True
        rest = f", imports from line {warm.rest} on left to the script" if warm.rest else ""
        many = "standby" if self._wanted == 1 else "standbys"
        each = f"{warm.memory_bytes / 1e6:.0f} MB" + (" each" if self._wanted > 1 else "")
        self._say(
            "a rank that dies is replaced in the running job "
            f"({self._wanted} warm {many}, {each}{rest})"
        )

    def _give_up(self, why: str) -> None:
        self._wanted, self._said = 0, True
        self._say(f"{why}: no other is kept, and a rank that dies is replaced by a new process")
