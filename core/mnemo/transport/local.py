"""Unix sockets between the processes of one node.

``SOCK_SEQPACKET`` keeps message boundaries, so a frame is one datagram: there is no partial read,
and no length field to forge. File descriptors travel beside a message by ``SCM_RIGHTS``.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import os
import select
import socket
import struct
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final

from mnemo.errors import ProtocolError, SmpError

MAX_MESSAGE: Final = 64 * 1024
"""Largest control message, bytes. State never travels here: it lies in shared memory."""
MAX_FDS: Final = 64
_ADDRESS_BYTES: Final = 107
_UCRED = struct.Struct("3i")


class ConnectionLostError(SmpError):
    """Nobody answers at the other end; what was asked may or may not have been done."""


def peer(sock: socket.socket) -> tuple[int, int]:
    """Process id and user id at the other end, from the kernel (``SO_PEERCRED``)."""
    raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    pid, uid, _gid = _UCRED.unpack(raw)
    return int(pid), int(uid)


def _short_path(path: Path) -> tuple[str, int | None]:
    """A name for ``path`` within the 107 bytes that a socket address holds.

    A longer one is reached through the directory's descriptor. The caller closes it.
    """
    if len(os.fsencode(path)) <= _ADDRESS_BYTES:
        return str(path), None
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY)
    return f"/proc/self/fd/{directory}/{path.name}", directory


def listen(path: Path) -> socket.socket:
    """A listening socket at ``path``, non-blocking.

    Raises:
        OSError: The directory's file system has no unix sockets, or the path is taken.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    name, directory = _short_path(path)
    try:
        sock.bind(name)
        sock.listen(128)
        sock.setblocking(False)
    except OSError:
        sock.close()
        raise
    finally:
        if directory is not None:
            os.close(directory)
    return sock


def _receive(sock: socket.socket) -> tuple[bytes, list[int]]:
    fds = array.array("i")
    data, ancillary, flags, _ = sock.recvmsg(
        MAX_MESSAGE, socket.CMSG_SPACE(MAX_FDS * fds.itemsize), socket.MSG_CMSG_CLOEXEC
    )
    for level, kind, content in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(content[: len(content) - len(content) % fds.itemsize])
    if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
        close_all(fds)
        raise ProtocolError(
            f"a control message is longer than {MAX_MESSAGE} bytes "
            f"or carries over {MAX_FDS} descriptors"
        )
    if not data:  # the end of the stream, or an empty datagram that means the same here
        close_all(fds)
        return data, []
    return data, list(fds)


def _send(sock: socket.socket, data: bytes, fds: Sequence[int]) -> None:
    if len(data) > MAX_MESSAGE or len(fds) > MAX_FDS:
        raise ProtocolError(
            f"a control message of {len(data)} bytes with {len(fds)} descriptors is too large"
        )
    if fds:
        socket.send_fds(sock, [data], fds, socket.MSG_NOSIGNAL)
    else:
        sock.send(data, socket.MSG_NOSIGNAL)


def close_all(fds: Sequence[int]) -> None:
    """Close descriptors that arrived with a message nobody wants."""
    for fd in fds:
        os.close(fd)


class BlockingChannel:
    """The trainer's end. One thread at a time may use it."""

    def __init__(self, path: Path, timeout_s: float) -> None:
        """Connect to the socket at ``path``.

        Raises:
            ConnectionLostError: Nobody listens there.
        """
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        self._sock.settimeout(timeout_s)
        directory: int | None = None
        try:
            name, directory = _short_path(path)
            self._sock.connect(name)
        except OSError as error:
            self._sock.close()
            raise ConnectionLostError(
                f"no snapshot process answers at {path}: {error.strerror or error}"
            ) from error
        finally:
            if directory is not None:
                os.close(directory)

    def settimeout(self, seconds: float) -> None:
        """How long `send` and `receive` wait.

        Raises:
            ConnectionLostError: It was closed.
        """
        try:
            self._sock.settimeout(seconds)
        except OSError as error:
            raise _gone(error) from error

    def send(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Send one message with descriptors, which stay open here."""
        try:
            _send(self._sock, data, fds)
        except ProtocolError:
            raise
        except OSError as error:
            raise _gone(error) from error

    def receive(self) -> tuple[bytes, list[int]]:
        """The next message and its descriptors, which the caller owns from here on."""
        try:
            data, fds = _receive(self._sock)
        except ProtocolError:
            raise
        except TimeoutError as error:
            raise ConnectionLostError(
                f"the snapshot process did not answer within {self._sock.gettimeout()} s"
            ) from error
        except OSError as error:
            raise _gone(error) from error
        if not data:
            raise ConnectionLostError("the snapshot process closed the connection")
        return data, fds

    def is_open(self) -> bool:
        """Whether the other end is still there, without a wait."""
        if self._sock.fileno() < 0:
            return False
        hang_up = select.poll()
        hang_up.register(self._sock, 0)
        return not hang_up.poll(0)

    def hang_up(self) -> None:
        """End the connection, for processes that were forked with it as well, and close it."""
        with contextlib.suppress(OSError):  # the other end was faster
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()

    def close(self) -> None:
        """Close the connection; harmless a second time."""
        self._sock.close()


def _gone(error: OSError) -> ConnectionLostError:
    return ConnectionLostError(f"the snapshot process went away: {error.strerror or error}")


class AsyncChannel:
    """The server's end, for asyncio."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._loop = asyncio.get_running_loop()
        self.pid, self.uid = peer(sock)
        """Process and user at the other end."""
        self._pidfd = self._watch()

    def _watch(self) -> int:
        """Hang up when the peer's process ends, though a child of it may hold the socket open.

        Loader workers are forked with all sockets of their trainer and outlive its SIGKILL.
        """
        try:
            pidfd = os.pidfd_open(self.pid)
        except ProcessLookupError:  # gone already
            self._sock.shutdown(socket.SHUT_RDWR)
            return -1
        except (OSError, AttributeError):
            return -1  # an old kernel, or another pid namespace: the socket alone has to tell
        self._loop.add_reader(pidfd, self.hang_up)
        return pidfd

    def hang_up(self) -> None:
        """End the connection: whoever waits for the peer gets no more of it."""
        self._unwatch()
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def _unwatch(self) -> None:
        if self._pidfd >= 0:
            self._loop.remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = -1

    @contextlib.contextmanager
    def watching(self, gone: Callable[[], None]) -> Iterator[None]:
        """Call ``gone``, once, if the peer hangs up while it waits for an answer."""
        sock, loop = self._sock, self._loop

        def look() -> None:
            loop.remove_reader(sock)
            try:
                hung_up = not sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
            except OSError:
                hung_up = True
            if hung_up:
                gone()

        loop.add_reader(sock, look)
        try:
            yield
        finally:
            loop.remove_reader(sock)

    async def _ready(self, *, writing: bool) -> None:
        done: asyncio.Future[None] = self._loop.create_future()
        fd = self._sock.fileno()
        if fd < 0:
            raise ConnectionResetError("closed")
        add, remove = (
            (self._loop.add_writer, self._loop.remove_writer)
            if writing
            else (self._loop.add_reader, self._loop.remove_reader)
        )

        def ready() -> None:
            if not done.done():
                done.set_result(None)

        add(fd, ready)
        try:
            await done
        finally:
            remove(fd)

    async def receive(self) -> tuple[bytes, list[int]]:
        """The next message; empty bytes when the peer has closed."""
        while True:
            try:
                return _receive(self._sock)
            except BlockingIOError:
                await self._ready(writing=False)

    async def send(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Send one message, waiting while the peer's queue is full."""
        while True:
            try:
                _send(self._sock, data, fds)
            except BlockingIOError:
                await self._ready(writing=True)
            else:
                return

    def close(self) -> None:
        """Close the connection; harmless a second time."""
        self._unwatch()
        self._sock.close()
