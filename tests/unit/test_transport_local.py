"""Frames and descriptors over unix sockets."""

from __future__ import annotations

import asyncio
import ctypes
import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from mnemo.errors import ProtocolError
from mnemo.transport import local

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def connected(tmp_path: Path) -> Iterator[tuple[local.BlockingChannel, socket.socket]]:
    """A client's channel, and the other end as it is."""
    with pair(tmp_path / "s") as both:
        yield both


class pair:  # noqa: N801 - used as a function
    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> tuple[local.BlockingChannel, socket.socket]:
        listener = local.listen(self.path)
        listener.setblocking(True)
        self.client = local.BlockingChannel(self.path, 5.0)
        self.server, _ = listener.accept()
        listener.close()
        return self.client, self.server

    def __exit__(self, *exc: object) -> None:
        self.client.close()
        self.server.close()


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_messages_keep_their_borders(
    connected: tuple[local.BlockingChannel, socket.socket],
) -> None:
    client, server = connected
    client.send(b"one")
    client.send(b"x" * local.MAX_MESSAGE)
    assert server.recv(local.MAX_MESSAGE) == b"one"
    assert len(server.recv(local.MAX_MESSAGE)) == local.MAX_MESSAGE
    server.send(b"a")
    server.send(b"b")
    assert [client.receive()[0], client.receive()[0]] == [b"a", b"b"]


def test_descriptors_travel_and_stay_open_here(
    connected: tuple[local.BlockingChannel, socket.socket],
) -> None:
    client, server = connected
    fds = [os.memfd_create(f"mnemo:{i}") for i in range(local.MAX_FDS)]
    try:
        os.write(fds[7], b"seven")
        socket.send_fds(server, [b"here"], fds)
        data, received = client.receive()
        assert data == b"here"
        assert os.pread(received[7], 10, 0) == b"seven"
        assert not any(os.get_inheritable(fd) for fd in received)
        local.close_all(received)
        assert os.pread(fds[7], 10, 0) == b"seven"
    finally:
        local.close_all(fds)


def test_too_large_is_refused_on_both_sides(
    connected: tuple[local.BlockingChannel, socket.socket],
) -> None:
    client, server = connected
    with pytest.raises(ProtocolError, match="too large"):
        client.send(b"x" * (local.MAX_MESSAGE + 1))
    with pytest.raises(ProtocolError, match="with 65 descriptors"):
        client.send(b"x", [0] * (local.MAX_FDS + 1))
    server.send(b"x" * (local.MAX_MESSAGE + 1))
    with pytest.raises(ProtocolError, match="longer than"):
        client.receive()


def test_too_many_descriptors_are_closed(
    connected: tuple[local.BlockingChannel, socket.socket],
) -> None:
    client, server = connected
    fd = os.memfd_create("mnemo:many")
    try:
        before = descriptors()
        socket.send_fds(server, [b"x"], [fd] * 200)
        with pytest.raises(ProtocolError, match="carries over"):
            client.receive()
        assert descriptors() == before
    finally:
        os.close(fd)


def test_descriptors_without_a_message_are_closed(
    connected: tuple[local.BlockingChannel, socket.socket],
) -> None:
    client, server = connected
    before = descriptors()
    socket.send_fds(server, [b""], [0, 1])
    with pytest.raises(local.ConnectionLostError, match="closed the connection"):
        client.receive()
    assert descriptors() == before


def test_the_other_end_goes_away(connected: tuple[local.BlockingChannel, socket.socket]) -> None:
    client, server = connected
    server.close()
    with pytest.raises(local.ConnectionLostError, match="went away: Broken pipe"):
        client.send(b"x")
    with pytest.raises(local.ConnectionLostError):
        client.receive()
    client.close()
    client.close()
    with pytest.raises(local.ConnectionLostError):
        client.settimeout(1.0)


def test_no_answer_in_time(connected: tuple[local.BlockingChannel, socket.socket]) -> None:
    client, _ = connected
    client.settimeout(0.01)
    with pytest.raises(local.ConnectionLostError, match=r"did not answer within 0\.01 s"):
        client.receive()


def test_nobody_listens(tmp_path: Path) -> None:
    with pytest.raises(local.ConnectionLostError, match="No such file"):
        local.BlockingChannel(tmp_path / "none", 1.0)
    (tmp_path / "file").touch()
    with pytest.raises(local.ConnectionLostError, match="Connection refused"):
        local.BlockingChannel(tmp_path / "file", 1.0)


def test_a_path_longer_than_an_address(tmp_path: Path) -> None:
    directory = tmp_path / ("d" * 100) / ("e" * 100)
    directory.mkdir(parents=True)
    before = descriptors()
    with pair(directory / "smp.sock") as (client, server):
        client.send(b"far")
        assert server.recv(10) == b"far"
    assert descriptors() == before


def test_a_file_system_without_sockets(tmp_path: Path) -> None:
    """POSIX message queues are a file system that refuses to make a socket."""
    libc = ctypes.CDLL(None, use_errno=True)
    place = os.fsencode(tmp_path)
    if libc.mount(b"none", place, b"mqueue", 0, None):
        pytest.skip(f"mounting is not allowed here: {os.strerror(ctypes.get_errno())}")
    try:
        before = descriptors()
        with pytest.raises(OSError, match="not permitted"):
            local.listen(tmp_path / "s")
        assert descriptors() == before
    finally:
        libc.umount(place)


def test_the_kernel_says_who_is_there(tmp_path: Path) -> None:
    with pair(tmp_path / "s") as (_, server):
        assert local.peer(server) == (os.getpid(), os.getuid())


def test_the_server_notices_a_hang_up_while_it_is_at_work(tmp_path: Path) -> None:
    gone: list[str] = []

    async def serve() -> None:
        with pair(tmp_path / "s") as (client, server):
            channel = local.AsyncChannel(server)
            client.send(b"ask")
            assert await channel.receive() == (b"ask", [])
            hung_up = asyncio.Event()
            with channel.watching(lambda: (gone.append("early"), hung_up.set())):  # type: ignore[func-returns-value]
                client.send(b"more")  # not a hang-up
                await asyncio.sleep(0)
            assert await channel.receive() == (b"more", [])
            with channel.watching(lambda: (gone.append("gone"), hung_up.set())):  # type: ignore[func-returns-value]
                client.close()
                await asyncio.wait_for(hung_up.wait(), 5)
            assert await channel.receive() == (b"", [])
            channel.close()

    asyncio.run(serve())
    assert gone == ["gone"]
