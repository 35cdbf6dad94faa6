"""A wire that is slow: passes frames on between two interfaces, late and only so many at a time.

``python slow_link.py ONE OTHER`` runs where both are, that is in the switch's namespace. Each line
of its standard input is a delay each way in seconds, and a rate each way in bytes per second; once
that holds it is written back. It ends with its standard input.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sys
from typing import Final

_ETH_P_ALL: Final = 3
_SOL_PACKET: Final = 263
_PACKET_VNET_HDR: Final = 15
"""Frames come and go with what the kernel knows about them, so that none has to be cut to the
wire's size, or to have its checksum made, on the way."""
_MOST_BYTES: Final = 1 << 17
_TICK_S: Final = 1e-9
_QUEUE_S: Final = 0.25
"""What would wait for longer than that to be sent is dropped, as a switch does."""


class Wire:
    """Both directions of it."""

    def __init__(self, *interfaces: str) -> None:
        self._ends = [_open(name) for name in interfaces]
        self._delay_s = 0.0
        self._rate = float("inf")
        self._free_at = [0.0, 0.0]
        self._last_at = [0.0, 0.0]
        loop = asyncio.get_running_loop()
        for side, end in enumerate(self._ends):
            loop.add_reader(end, self._take, side)

    def slow(self, delay_s: float, rate: float) -> None:
        """From now on frames take ``delay_s``, and the time to send them at ``rate`` bytes/s."""
        self._delay_s, self._rate = delay_s, rate

    def _take(self, side: int) -> None:
        frame, address = self._ends[side].recvfrom(_MOST_BYTES)
        if address[2] == socket.PACKET_OUTGOING:
            return  # what was put there
        loop = asyncio.get_running_loop()
        begins = max(loop.time(), self._free_at[side])
        if begins - loop.time() > _QUEUE_S:
            return
        self._free_at[side] = begins + len(frame) / self._rate
        # None overtakes another, also where the delay has become shorter.
        at = max(self._free_at[side] + self._delay_s, self._last_at[side] + _TICK_S)
        self._last_at[side] = at
        loop.call_at(at, self._pass, self._ends[1 - side], frame)

    @staticmethod
    def _pass(end: socket.socket, frame: bytes) -> None:
        with contextlib.suppress(OSError):  # the link is down, or has no room: lost, as on a wire
            end.send(frame)


def _open(interface: str) -> socket.socket:
    end = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ETH_P_ALL))
    end.setsockopt(_SOL_PACKET, _PACKET_VNET_HDR, 1)
    end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8 << 20)
    end.bind((interface, _ETH_P_ALL))
    end.setblocking(False)
    return end


async def main(one: str, other: str) -> None:
    wire = Wire(one, other)
    loop = asyncio.get_running_loop()
    words = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(words), sys.stdin)
    while line := await words.readline():
        wire.slow(*map(float, line.split()))
        print(line.decode(), end="", flush=True)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
