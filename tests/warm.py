"""Starts Python scripts in processes forked from one that has imported the frameworks already."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

ZYGOTE = Path(__file__).parent / "scripts" / "zygote.py"
TIMEOUT_S = 120


class HasFileno(Protocol):
    """An open file."""

    def fileno(self) -> int: ...


class Life:
    """A process that runs a script, from its start to its end."""

    def __init__(self, line: socket.socket) -> None:
        self._line = line
        self._line.settimeout(TIMEOUT_S)
        self._code: int | None = None
        self.pid = int(self._line.recv(64))

    def fileno(self) -> int:
        """To wait for its end together with others."""
        return self._line.fileno()

    def wait(self) -> int:
        """Its exit code, as `subprocess` gives it.

        Raises:
            TimeoutError: It has not ended within `TIMEOUT_S`.
        """
        if self._code is None:
            self._code = int(self._line.recv(64))
        return self._code

    def running(self) -> bool:
        """Whether it has not ended yet."""
        return self._code is None and not select.select([self], [], [], 0)[0]

    def kill(self) -> None:
        """SIGKILL, unless it has ended."""
        if self.running():
            with contextlib.suppress(ProcessLookupError):  # it ended just now
                os.kill(self.pid, signal.SIGKILL)

    def close(self) -> None:
        """Kill it if it still runs, and wait for its end."""
        self.kill()
        self.wait()
        self._line.close()


class Zygote:
    """The process that lives are forked from."""

    def __init__(self) -> None:
        self._requests, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, str(ZYGOTE)],
                stdin=theirs,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
        if self._requests.recv(64) != b"ready":
            self.close()
            raise AssertionError("it could not import everything: see its words on stderr")

    @contextlib.contextmanager
    def start(
        self,
        script: object,
        *words: object,
        out: HasFileno,
        err: HasFileno,
        cwd: Path | None = None,
        environ: Mapping[str, str] | None = None,
    ) -> Iterator[Life]:
        """A life of ``script WORDS``, killed at the end of the block if it still runs."""
        inherited = {k: v for k, v in os.environ.items() if k != "PYTEST_CURRENT_TEST"}
        request = {
            "argv": [str(script), *map(str, words)],
            "cwd": str(cwd or Path.cwd()),
            "environ": {**inherited, "OMP_NUM_THREADS": "1", **(environ or {})},
        }
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours:
            with theirs:
                fds = [theirs.fileno(), out.fileno(), err.fileno()]
                socket.send_fds(self._requests, [json.dumps(request).encode()], fds)
            life = Life(ours)
            with contextlib.closing(life):
                yield life

    def run(
        self, script: object, *words: object, cwd: Path | None = None, **environ: str
    ) -> subprocess.CompletedProcess[str]:
        """Run ``script WORDS`` to its end."""
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
            with self.start(script, *words, out=out, err=err, cwd=cwd, environ=environ) as life:
                code = life.wait()
            said = []
            for file in (out, err):
                file.seek(0)
                said.append(file.read())
        return subprocess.CompletedProcess([str(script), *map(str, words)], code, *said)

    def close(self) -> None:
        """End it, and whatever of its lives there still is."""
        self._requests.close()
        self._process.wait(timeout=20)
