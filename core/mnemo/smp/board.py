"""A shared page on which ranks leave their position and the leader what all are to do when.

Readable after a rank's death, which is how the steps lost by a crash are counted. Each field is
one aligned 8-byte word, written whole, so no lock is needed.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import struct
from dataclasses import dataclass
from typing import Any, Final

from mnemo.errors import ProtocolError

_RECORD: Final = 64
_SCHEDULE: Final = struct.Struct("<qq")
_WORD: Final = struct.Struct("<q")
_STOP_REQUESTED: Final = 16
_STOP_AT: Final = 24
_STORE_FROM: Final = 32
_POSITION: Final = struct.Struct("<qqqqd")


_SIZE_IS_FIXED: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW


def _size(members: int) -> int:
    return -(-(_RECORD * (members + 1)) // mmap.PAGESIZE) * mmap.PAGESIZE


@dataclass(frozen=True)
class Position:
    """Where a rank is: counts of finished ticks, steps and batches of this epoch; unix seconds."""

    tick: int
    step: int
    epoch: int
    batch: int
    time: float


class Board:
    """One page (or more) in a memfd: the schedule first, then 64 bytes a rank."""

    def __init__(self, fd: int) -> None:
        """Map the board behind ``fd``, which this object owns from here on."""
        self.fd = fd
        self._map = mmap.mmap(fd, os.fstat(fd).st_size)

    @classmethod
    def create(cls, members: int) -> Board:
        """A new board for ``members`` ranks."""
        fd = os.memfd_create("mnemo:board", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, _size(members))
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SIZE_IS_FIXED)
        board = cls(fd)
        board.reset()
        return board

    @classmethod
    def taken_over(cls, fd: int, members: int) -> Board:
        """The board that a rank holds from an earlier SMP; ``fd`` stays the caller's.

        Raises:
            ProtocolError: No board for ``members`` ranks.
        """
        try:
            fixed = fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _SIZE_IS_FIXED == _SIZE_IS_FIXED
        except OSError:
            fixed = False
        if not fixed or os.fstat(fd).st_size != _size(members):
            raise ProtocolError(f"the descriptor handed over is no board of {members} ranks")
        return cls(os.dup(fd))

    def schedule(self, tick: int) -> None:
        """Leader: the next generation is taken at ``tick``.

        The one before stays readable: a rank may be one step behind the leader.
        """
        before = _SCHEDULE.unpack_from(self._map, 0)[1]
        _SCHEDULE.pack_into(self._map, 0, before, tick)

    def is_scheduled(self, tick: int) -> bool:
        """Whether a generation is due at ``tick``."""
        return tick in _SCHEDULE.unpack_from(self._map, 0)

    def scheduled(self) -> int:
        """When the newest generation that was scheduled is due, -1 if none was."""
        return int(_SCHEDULE.unpack_from(self._map, 0)[1])

    def request_stop(self) -> None:
        """Any rank: training should stop after a step that the leader will name."""
        _WORD.pack_into(self._map, _STOP_REQUESTED, 1)

    def stop_requested(self) -> bool:
        """Whether any rank has asked to stop."""
        return bool(_WORD.unpack_from(self._map, _STOP_REQUESTED)[0])

    def set_stop(self, boundary: int) -> None:
        """Leader: every rank stops at step boundary ``boundary``."""
        _WORD.pack_into(self._map, _STOP_AT, boundary)

    def stop_at(self) -> int:
        """The step boundary to stop at, -1 for none."""
        return int(_WORD.unpack_from(self._map, _STOP_AT)[0])

    def set_store(self, tick: int) -> None:
        """Leader of one of several nodes: the first generation from ``tick`` on goes to storage."""
        _WORD.pack_into(self._map, _STORE_FROM, tick)

    def store_from(self) -> int:
        """What `set_store` set last, -1 for nothing."""
        return int(_WORD.unpack_from(self._map, _STORE_FROM)[0])

    def reset(self) -> None:
        """Leader of a new life: no generation scheduled, no stop asked for, nothing to store."""
        _SCHEDULE.pack_into(self._map, 0, -1, -1)
        _WORD.pack_into(self._map, _STOP_REQUESTED, 0)
        _WORD.pack_into(self._map, _STOP_AT, -1)
        _WORD.pack_into(self._map, _STORE_FROM, -1)

    def report(self, slot: int, position: Position) -> None:
        """Leave a rank's position; ``slot`` counts the ranks of this node from 0."""
        p = position
        _POSITION.pack_into(
            self._map, _RECORD * (slot + 1), p.tick, p.step, p.epoch, p.batch, p.time
        )

    def position(self, slot: int) -> Position:
        """What a rank reported last; all zero if nothing."""
        return Position(*_POSITION.unpack_from(self._map, _RECORD * (slot + 1)))

    def positions(self) -> list[dict[str, Any]]:
        """All ranks' positions as plain data."""
        count = len(self._map) // _RECORD - 1
        found = []
        for slot in range(count):
            p = self.position(slot)
            if p.time:
                found.append(
                    {
                        "slot": slot,
                        "tick": p.tick,
                        "step": p.step,
                        "epoch": p.epoch,
                        "batch": p.batch,
                        "time": p.time,
                    }
                )
        return found

    def furthest(self) -> int:
        """Most optimizer steps that any rank has reported, 0 if none has."""
        return max((position["step"] for position in self.positions()), default=0)

    def close(self) -> None:
        """Unmap and close; harmless a second time."""
        if not self._map.closed:
            self._map.close()
            os.close(self.fd)
