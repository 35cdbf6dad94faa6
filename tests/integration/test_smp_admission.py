"""Who connects to a snapshot process and does not prove anything costs it nothing."""

from __future__ import annotations

import asyncio
import socket
from typing import TYPE_CHECKING

import pytest
from smp_lab import run_directory

from mnemo.smp import server
from mnemo.smp.server import Server
from mnemo.transport import local

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mnemo.smp.paths import RunPaths

PATIENCE_S = 20.0


@pytest.fixture
def paths() -> Iterator[RunPaths]:
    with run_directory() as found:
        found.make()
        yield found


@pytest.mark.parametrize("end", ["time is up", "the server stops"])
def test_one_who_says_nothing_is_hung_up_on(
    paths: RunPaths, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    monkeypatch.setattr(server, "ADMISSION_S", 0.1 if end == "time is up" else 600.0)

    async def main() -> None:
        loop = asyncio.get_running_loop()
        with local.listen(paths.socket) as listener:
            served = Server(paths, listener, b"s" * 32)
            running = loop.create_task(served.run())
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as mute:
                mute.setblocking(False)
                await loop.sock_connect(mute, str(paths.socket))
                assert await loop.sock_recv(mute, 1000)  # the challenge
                if end == "the server stops":
                    served.stop()
                while await asyncio.wait_for(loop.sock_recv(mute, 1000), PATIENCE_S):
                    pass
                assert end == "the server stops" or not running.done()
            served.stop()
            await asyncio.wait_for(running, PATIENCE_S)

    asyncio.run(main())
