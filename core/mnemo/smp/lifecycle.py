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
from typing import Final

import psutil

from mnemo.errors import SmpError
from mnemo.smp.client import SmpClient
from mnemo.smp.paths import RunPaths
from mnemo.transport import auth

START_TIMEOUT_S: Final = 60.0


def ensure(paths: RunPaths) -> SmpClient:
    """A connection to the run's SMP, which is started if none answers.

    Raises:
        SmpError: It neither answers nor starts; the message carries the end of its log.
    """
    paths.make()
    secret = auth.load_or_create_secret(paths.secret)
    deadline = time.monotonic() + START_TIMEOUT_S
    started = False
    while True:
        try:
            return SmpClient.connect(paths, secret)
        except SmpError as error:
            if time.monotonic() > deadline:
                raise SmpError(f"{error}. Its log says: {_tail(paths)}") from error
        if not started or not _alive(paths):
            _spawn(paths)
            started = True
        _await_record(paths, deadline)
        secret = auth.load_or_create_secret(paths.secret)


def find(paths: RunPaths) -> SmpClient | None:
    """A connection to the run's SMP if one lives."""
    if not paths.directory.is_dir() or not paths.secret.exists():
        return None
    try:
        return SmpClient.connect(paths, auth.load_or_create_secret(paths.secret))
    except SmpError:
        return None


def _alive(paths: RunPaths) -> bool:
    record = paths.read_record()
    return record is not None and psutil.pid_exists(record.pid)


def _spawn(paths: RunPaths) -> None:
    """Start an SMP that belongs to nobody: own session, and orphaned at once by a double fork."""
    paths.make()
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MNEMO_FAULTS",))}
    environment["MNEMO_ROLE"] = "smp"
    environment["PYTHONPATH"] = os.pathsep.join(
        p for p in map(os.path.abspath, sys.path) if os.path.isdir(p)
    )
    code = (
        "import os, subprocess, sys; log = os.open(sys.argv[2], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600);"
        "subprocess.Popen([sys.executable, '-m', 'mnemo.smp', sys.argv[1]], stdin=subprocess.DEVNULL,"
        " stdout=log, stderr=log, start_new_session=True, cwd=sys.argv[1])"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-E", "-c", code, str(paths.directory), str(paths.log)],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SmpError(f"the snapshot process could not be started: {done.stderr.strip()[-500:]}")


def _await_record(paths: RunPaths, deadline: float) -> None:
    """Wait until a living SMP has published itself, or a little while."""
    limit = min(deadline, time.monotonic() + 10.0)
    while time.monotonic() < limit:
        if _alive(paths):
            return
        time.sleep(0.01)  # another process publishes a file: nothing to wait on but the file


def _tail(paths: RunPaths) -> str:
    with contextlib.suppress(OSError):
        return paths.log.read_text(errors="replace")[-500:].strip() or "nothing"
    return "nothing"
