"""What the ranks of `benchmarks.recovery` have come to, sent to who measures as it happens."""

from __future__ import annotations

import functools
import json
import os
import socket
import threading
import time
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

Mark = dict[str, Any]
"""``what``, ``at`` (Unix seconds), ``rank``, ``pid``, and what else belongs to it."""


WHERE: Final = "BENCHMARK_MARKS"
"""Variable of the environment that says where they go."""


@functools.cache
def _socket() -> socket.socket:
    found = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    found.connect(os.environ[WHERE])
    return found


def mark(what: str, **more: float) -> None:
    """This rank has come to that, now."""
    rank = int(os.environ["RANK"])
    found = {"what": what, "at": time.time(), "rank": rank, "pid": os.getpid(), **more}
    _socket().send(json.dumps(found).encode())


class Marks:
    """Of all ranks, in the order in which they came; close it."""

    def __init__(self, directory: Path) -> None:
        self.where = str(directory / "marks")
        self.all: list[Mark] = []
        self._news = threading.Condition()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(self.where)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        while data := self._socket.recv(4096):
            with self._news:
                self.all.append(json.loads(data))
                self._news.notify_all()

    def close(self) -> None:
        """Ranks that still run fail at their next mark."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as me:
            me.sendto(b"", self.where)
        self._reader.join()
        self._socket.close()

    def of(self, what: str, **fields: float) -> list[Mark]:
        """Those of a kind, with these fields."""
        return [
            mark
            for mark in list(self.all)
            if mark["what"] == what and all(mark.get(k) == v for k, v in fields.items())
        ]

    def wait_for(self, ready: Callable[[], Any], timeout_s: float) -> Any:
        """Wait until it gives something that is true, looked at with each mark; what it gave."""
        with self._news:
            return self._news.wait_for(ready, timeout_s)
