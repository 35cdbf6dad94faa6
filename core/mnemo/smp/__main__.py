"""``python -m mnemo.smp RUN_DIRECTORY``: the process itself. Started by `mnemo.smp.lifecycle`."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path

import msgspec

from mnemo.smp.paths import RunPaths, SmpRecord
from mnemo.smp.server import Server
from mnemo.transport import auth, local


def _take_lock(path: Path) -> int | None:
    """The run's lock, held until this process ends; None if another SMP has it."""
    while True:
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(lock), path.stat()):
                return lock
        except BlockingIOError:
            os.close(lock)
            return None
        except FileNotFoundError:
            pass
        os.close(lock)  # its last holder has removed it meanwhile: it locks nothing


def _listen(paths: RunPaths) -> tuple[socket.socket, Path]:
    """Listen in the run directory; beside the temporary files where that has no sockets."""
    before = paths.read_record()
    if before is not None and before.socket != str(paths.socket):
        _remove_elsewhere(Path(before.socket))
    try:
        paths.socket.unlink(missing_ok=True)
        return local.listen(paths.socket), paths.socket
    except OSError as error:
        elsewhere = Path(tempfile.mkdtemp(prefix=f"mnemo-{os.getuid()}-sock-")) / "smp.sock"
        logging.warning(
            "no unix sockets in %s (%s): listening at %s",
            paths.directory,
            error.strerror,
            elsewhere,
        )
        return local.listen(elsewhere), elsewhere


def _remove_elsewhere(address: Path) -> None:
    with contextlib.suppress(OSError):
        address.unlink(missing_ok=True)
        address.parent.rmdir()


async def _serve(paths: RunPaths, listener: socket.socket, secret: bytes) -> None:
    server = Server(paths, listener, secret)
    loop = asyncio.get_running_loop()
    pending: set[asyncio.Task[None]] = set()

    def terminate() -> None:
        pending.add(loop.create_task(server.persist_and_stop()))

    loop.add_signal_handler(signal.SIGTERM, terminate)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    await server.run()


def main() -> int:
    """Take the lock, listen, serve, clean up. Exit code 3: another SMP serves this run."""
    paths = RunPaths(Path(sys.argv[1]))
    logging.basicConfig(
        level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(message)s"
    )
    if _take_lock(paths.lock) is None:
        return 3
    secret = auth.load_or_create_secret(paths.secret)
    listener, address = _listen(paths)
    draft = paths.record.with_suffix(".tmp")
    draft.write_bytes(msgspec.json.encode(SmpRecord(os.getpid(), str(address), time.time())))
    draft.rename(paths.record)
    try:
        asyncio.run(_serve(paths, listener, secret))
    finally:
        listener.close()
        if address != paths.socket:
            _remove_elsewhere(address)
        paths.remove()
    return 0


if __name__ == "__main__":
    sys.exit(main())
