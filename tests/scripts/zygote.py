"""Runs Python scripts, each in a process forked from this one, which has imported everything.

Importing the frameworks takes a script seconds, forking takes it none. Each life is else what the
interpreter makes of a script: a process of its own, with its own arguments, environment, directory
and output, that can be killed, and that ends with its own exit code.

Standard input is a socket. A message on it asks for a life: a JSON object, and three descriptors:
a socket of that life, its standard output, its standard error. On its own socket a life's process
id is answered at once, its exit code (as of `subprocess`) at its end; a life whose socket is closed
at the other end is killed.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import runpy
import select
import signal
import socket
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import jsonargparse  # noqa: F401 - imported for the lives, as are those below
import lightning_cases  # noqa: F401
import lightning_lab  # noqa: F401

from mnemo import faults

MESSAGE = 1 << 18
"""Most bytes of a request."""


def live(request: dict[str, Any], out: int, err: int) -> int:
    """What a forked process does; its exit code."""
    os.environ.clear()
    os.environ.update(request["environ"])
    os.chdir(request["cwd"])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for number, fd in enumerate((nothing, out, err)):
        os.dup2(fd, number)
        os.close(fd)
    tempfile.tempdir = None
    sys.argv = request["argv"]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    faults.arm(os.environ)
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
        code: object = None
    except SystemExit as leaving:
        code = leaving.code
    except BaseException as error:  # noqa: BLE001 - as the interpreter's own end
        sys.last_type, sys.last_value = type(error), error
        code = 1
        try:
            sys.excepthook(type(error), error, error.__traceback__)
        except SystemExit as leaving:
            code = leaving.code
    if not isinstance(code, int | None):
        print(code, file=sys.stderr)
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return code or 0


def serve(requests: socket.socket) -> None:
    """Until the other end is closed; then no life is left."""
    lives: dict[int, tuple[int, socket.socket]] = {}
    lines: dict[socket.socket, int] = {}
    while True:
        for ready in select.select([requests, *lives, *lines], [], [])[0]:
            if ready is requests:
                text, fds, _, _ = socket.recv_fds(requests, MESSAGE, 3)
                if not text:
                    for pid, _ in lives.values():
                        os.kill(pid, signal.SIGKILL)
                        os.waitpid(pid, 0)
                    return
                pid = os.fork()
                if pid == 0:
                    for fd in (requests.fileno(), fds[0], *lives, *(s.fileno() for s in lines)):
                        os.close(fd)
                    os._exit(live(json.loads(text), *fds[1:]))
                line = socket.socket(fileno=fds[0])
                os.close(fds[1])
                os.close(fds[2])
                pidfd = os.pidfd_open(pid)
                lives[pidfd], lines[line] = (pid, line), pid
                line.send(str(pid).encode())
            elif isinstance(ready, int):
                pid, line = lives.pop(ready)
                os.close(ready)
                code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                lines.pop(line, None)
                with contextlib.suppress(OSError), line:  # nobody may wait for it any more
                    line.send(str(code).encode())
            elif ready in lines:
                os.kill(lines.pop(ready), signal.SIGKILL)
                ready.close()


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's is for the tests, and the lives
    with socket.socket(fileno=os.dup(0)) as asked:
        asked.send(b"ready")
        serve(asked)
