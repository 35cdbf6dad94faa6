"""What a process that takes a lost rank's place is given while it is alone.

It starts as the first one did, and asks for the same operations. What the others once got is in the
Store: a log directory's name, a seed. Beyond the record each operation ends as if all had asked
with this process's values, which is good for what is checked, and for state that is replaced later.
"""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

import msgspec
import torch

from mnemo.comm.operation import fill, size_of
from mnemo.errors import ReplayError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from mnemo.comm.c10d import Store
    from mnemo.comm.kept import Entry
    from mnemo.comm.operation import Operation

_KEY = "mnemo/started"
_local = threading.local()


@contextmanager
def unrecorded() -> Iterator[None]:
    """What this thread asks for is not repeated by a process that takes a lost rank's place.

    For what happens before the first boundary: it is not put in the record of the start, and a
    process that is alone does it with its own values.
    """
    before, _local.off = getattr(_local, "off", False), True
    try:
        yield
    finally:
        _local.off = before


def recorded() -> bool:
    """Whether what this thread asks for is part of the record."""
    return not getattr(_local, "off", False)


def publish(store: Store, entries: Sequence[Entry]) -> None:
    """Write down a group's operations until its first boundary, for those that come later."""
    said = [
        (each.signature, None if each.data is None else each.data.numpy().tobytes())
        for each in entries
        if each.recorded
    ]
    store.set(_KEY, msgspec.msgpack.encode(said))


class Startup:
    """The record of a group, as a process reads it that is alone.

    Args:
        store: The group's own.
    """

    def __init__(self, store: Store) -> None:
        self._entries: list[tuple[str, bytes | None]] = []
        if store.check([_KEY]):
            kind = list[tuple[str, bytes | None]]
            self._entries = msgspec.msgpack.decode(store.get(_KEY), type=kind)
        self._at = 0
        self.told: list[torch.Tensor] = []
        """Results of what is asked next, whatever the record has."""

    def answer(self, operation: Operation) -> None:
        """Give an operation its result.

        Raises:
            ReplayError: The record has another one here.
        """
        if self.told:
            operation.outputs[0].copy_(self.told.pop(0))
            return
        if not operation.recorded or self._at >= len(self._entries):
            operation.alone()
            return
        signature, data = self._entries[self._at]
        if signature != operation.signature:
            msg = (
                f"operation {self._at} of this start is {operation.signature!r} where the first "
                f"start had {signature!r}: a process that starts alone has to ask for the same"
            )
            raise ReplayError(msg)
        self._at += 1
        if data is None or len(data) != size_of(operation.outputs):
            operation.alone()
        elif data:
            fill(operation.outputs, torch.frombuffer(bytearray(data), dtype=torch.uint8))
