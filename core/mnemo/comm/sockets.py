"""The TCP sockets of one communicator, told from all others of the process, and shut down.

gloo offers no way to end an operation that waits for a peer, and hides its sockets. But each
communicator of ours listens at an address of its own, so its connections are those which were
accepted there, or which lead to where another member listens. Shut down, they fail whatever waits
on them, here and at the other end, within milliseconds.
"""

from __future__ import annotations

import contextlib
import os
import socket
import stat
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator


class Address(NamedTuple):
    """Where a communicator listens."""

    host: str
    port: int


def listening() -> set[Address]:
    """All addresses at which this process listens for TCP connections."""
    found = set()
    for each in _sockets():
        with contextlib.suppress(OSError):
            if each.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                found.add(Address(*each.getsockname()[:2]))
    return found


def connected(mine: Address, theirs: Collection[Address]) -> frozenset[int]:
    """Inode numbers of the sockets accepted at ``mine`` or connected to one of ``theirs``."""
    return frozenset(os.fstat(each.fileno()).st_ino for each in _between(mine, theirs))


def still_open(inodes: Collection[int]) -> bool:
    """Whether this process has one of these sockets, be it connected or not."""
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208 - names only, as fast as it gets
        with contextlib.suppress(OSError):
            found = os.stat(f"/proc/self/fd/{name}")  # noqa: PTH116
            if stat.S_ISSOCK(found.st_mode) and found.st_ino in inodes:
                return True
    return False


def sever(mine: Address, theirs: Collection[Address]) -> None:
    """Shut those sockets down. Their owner is to close them."""
    for each in _between(mine, theirs):
        with contextlib.suppress(OSError):  # the other end was faster
            each.shutdown(socket.SHUT_RDWR)


def _between(mine: Address, theirs: Collection[Address]) -> Iterator[socket.socket]:
    for each in _sockets():
        try:
            there = Address(*each.getpeername()[:2])
            here = Address(*each.getsockname()[:2])
        except OSError:
            continue  # it listens, or is closed by now
        if here == mine or there in theirs:
            yield each


def _sockets() -> Iterator[socket.socket]:
    """Each TCP socket of the process, as a duplicate: the number may be another file's by now."""
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208 - names only, as fast as it gets
        try:
            if not os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):  # noqa: PTH115
                continue
            fd = os.dup(int(name))
        except OSError:
            continue
        try:
            found = socket.socket(fileno=fd)
        except OSError:
            os.close(fd)
            continue
        with found:
            if found.type == socket.SOCK_STREAM and found.family in (
                socket.AF_INET,
                socket.AF_INET6,
            ):
                yield found
