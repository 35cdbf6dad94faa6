"""Start the node's SMP, find it, and start another where it has died.

Whoever needs one calls `ensure`. The SMP itself takes the run's lock for life, so that of several
that are started at once one stays, and a lock that can be had means that none lives.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Final

from mnemo.errors import SmpError
from mnemo.smp.client import REPLY_TIMEOUT_S, SmpClient
from mnemo.smp.paths import RunPaths
from mnemo.transport import auth
from mnemo.transport.local import ConnectionLostError

START_TIMEOUT_S: Final = 60.0
_RESTART_S: Final = 5.0
"""After how long without an answer another one is started; one too many ends by itself."""
_LOOK_S: Final = 0.01


def ensure(paths: RunPaths) -> SmpClient:
    """A connection to the run's SMP, which is started if none answers.

    Raises:
        SmpError: It refuses, or neither answers nor starts; the message has the end of its log.
    """
    deadline = time.monotonic() + START_TIMEOUT_S
    restart_at = 0.0
    while True:
        try:
            paths.make()
            secret = auth.load_or_create_secret(paths.secret)
            try:
                return SmpClient.connect(paths, secret, START_TIMEOUT_S)
            except ConnectionLostError as error:
                if time.monotonic() > deadline:
                    raise SmpError(f"{error}. Its log says: {_tail(paths)}") from error
            except SmpError:
                if auth.load_or_create_secret(paths.secret) == secret:
                    raise
            if time.monotonic() >= restart_at:
                _spawn(paths)
                restart_at = time.monotonic() + _RESTART_S
        except FileNotFoundError:
            restart_at = 0.0  # one that ended has just removed the directory: begin anew
        time.sleep(_LOOK_S)  # it shows itself by a file: nothing to wait on


def find(paths: RunPaths, timeout_s: float = REPLY_TIMEOUT_S) -> SmpClient | None:
    """A connection to the run's SMP if one lives, and answers within ``timeout_s`` seconds."""
    if paths.read_record() is None:
        return None
    try:
        return SmpClient.connect(paths, auth.load_or_create_secret(paths.secret), timeout_s)
    except (SmpError, FileNotFoundError):
        return None


def _spawn(paths: RunPaths) -> None:
    """Start an SMP that belongs to nobody: own session, and orphaned at once by a double fork."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MNEMO_FAULTS")}
    environment["MNEMO_ROLE"] = "smp"
    environment["PYTHONPATH"] = os.pathsep.join(
        str(Path(p).absolute()) for p in sys.path if Path(p).is_dir()
    )
    code = (
        "import subprocess, sys; subprocess.Popen([sys.executable, '-m', 'mnemo.smp', sys.argv[1]],"
        " stdin=subprocess.DEVNULL, start_new_session=True, cwd='/')"
    )
    log = os.open(paths.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        done = subprocess.run(
            [sys.executable, "-S", "-E", "-c", code, str(paths.directory)],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            check=False,
        )
    finally:
        os.close(log)
    if done.returncode:
        raise SmpError(f"the snapshot process could not be started: {_tail(paths)}")


def _tail(paths: RunPaths) -> str:
    with contextlib.suppress(OSError):
        return paths.log.read_text(errors="replace")[-500:].strip() or "nothing"
    return "nothing"
