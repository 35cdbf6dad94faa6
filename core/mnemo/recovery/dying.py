"""Being told that a process dies before the kernel has taken its memory back.

That takes 0.1 to 0.2 ms for each MB, and only then does whoever waits for the process hear of its
end, and do its sockets close. Robust mutexes (``man 3 pthread_mutexattr_setrobust``) are given up
before: the main thread of the process holds one in shared memory, for as long as it lives, and a
thread of the other process waits for it.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import signal
import threading
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

_PTHREAD_PROCESS_SHARED: Final = 1
_PTHREAD_MUTEX_ROBUST: Final = 1
_ATTRIBUTES_BYTES: Final = 64
"""More than any platform's ``pthread_mutexattr_t``; the mutex has a page of its own."""
_PF_EXITING: Final = 0x4
_FLAGS, _EXIT_CODE = 6, -1
"""Fields of ``/proc/PID/stat`` behind the name."""

_libc = ctypes.CDLL(None, use_errno=True)


def hold() -> int:
    """Take a mutex that is given up when the calling thread ends, and not before.

    Returns:
        The file descriptor of its memory, to stay open: `await_death` finds it by its number.

    Raises:
        OSError: The system has no such mutexes.
    """
    fd = os.memfd_create("mnemo-alive")
    try:
        os.ftruncate(fd, mmap.PAGESIZE)
        mutex, attributes = _map(fd), ctypes.create_string_buffer(_ATTRIBUTES_BYTES)
        _check(_libc.pthread_mutexattr_init(attributes))
        _check(_libc.pthread_mutexattr_setpshared(attributes, _PTHREAD_PROCESS_SHARED))
        _check(_libc.pthread_mutexattr_setrobust(attributes, _PTHREAD_MUTEX_ROBUST))
        _check(_libc.pthread_mutex_init(mutex, attributes))
        _check(_libc.pthread_mutex_lock(mutex))
    except BaseException:
        os.close(fd)
        raise
    return fd


def await_death(pid: int, fd: int, callback: Callable[[], None]) -> None:
    """Call back, in a thread, once the thread of another process has ended that called `hold`.

    Args:
        pid: The process.
        fd: What `hold` gave it.
        callback: Not called if this process ends before.

    Raises:
        OSError: Its memory cannot be had.
    """
    path = f"/proc/{pid}/fd/{fd}"
    if not os.readlink(path).startswith("/memfd:mnemo-alive"):  # noqa: PTH115 - no path
        raise OSError(errno.ENOENT, "it is something else by now", path)
    shared = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        mutex = _map(shared)
    finally:
        os.close(shared)

    def wait() -> None:
        result = _libc.pthread_mutex_lock(mutex)
        _libc.pthread_mutex_unlock(mutex)
        _libc.munmap(mutex, ctypes.c_size_t(mmap.PAGESIZE))
        if result == errno.EOWNERDEAD:
            callback()

    threading.Thread(target=wait, name=f"mnemo-dying-{pid}", daemon=True).start()


def dying_of(pid: int) -> int | None:
    """The signal that a process is dying of; None if it is not, or that cannot be told."""
    with suppress(OSError, ValueError, IndexError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        number = int(fields[_EXIT_CODE]) & 0x7F
        if int(fields[_FLAGS]) & _PF_EXITING and number:
            return signal.Signals(number)
    return None


def _map(fd: int) -> ctypes.c_void_p:
    """Not by `mmap`, which takes the memory away at the interpreter's end, before the process's."""
    _libc.mmap.restype = ctypes.c_void_p
    address = _libc.mmap(
        None,
        ctypes.c_size_t(mmap.PAGESIZE),
        mmap.PROT_READ | mmap.PROT_WRITE,
        mmap.MAP_SHARED,
        fd,
        ctypes.c_long(0),
    )
    if address == ctypes.c_void_p(-1).value:
        raise OSError(ctypes.get_errno(), "mmap")
    return ctypes.c_void_p(address)


def _check(result: int) -> None:
    if result:
        raise OSError(result, os.strerror(result))
