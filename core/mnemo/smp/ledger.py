"""A small state of one rank, written at every step, that outlives the rank at any instant.

A memfd that the SMP holds and never looks into, so that writing takes no message: two slots are
written in turn, each told whole by a digest over its bytes. Whoever is killed in the middle of one
leaves the other.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import struct
from dataclasses import dataclass
from typing import Final

import xxhash

from mnemo.errors import IntegrityError
from mnemo.smp.segment import PAGE, page_up

_MAGIC: Final = b"MNEMOLG1"
_LEAST: Final = 64 << 10
_HEAD: Final = struct.Struct("<8sQ")
"""Magic, and bytes of a slot."""
_TOLD: Final = struct.Struct("<QQQ")
"""Of a slot: how many were written before, tick, length."""
_SLOT: Final = struct.Struct("<24sQ")
"""That, and the xxh3-64 of it and the bytes."""
_SLOTS: Final = 2


@dataclass(frozen=True)
class Entry:
    """What was written at ``tick``."""

    tick: int
    content: bytes


class Ledger:
    """The writer's side. One that is too small is replaced by another: `fd` has to be kept anew."""

    def __init__(self, name: str, size: int = 0) -> None:
        """Make one.

        Args:
            name: Of the memory, for people.
            size: Bytes that are to fit.

        Raises:
            OSError: No memory left.
        """
        # What is written is about as long each time; page faults come once.
        self._room = page_up(max(2 * size, _LEAST))
        self._written = 0
        self.fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            length = PAGE + _SLOTS * self._room
            os.posix_fallocate(self.fd, 0, length)
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
            self._map = mmap.mmap(self.fd, length)
        except OSError:
            os.close(self.fd)
            raise
        _HEAD.pack_into(self._map, 0, _MAGIC, self._room)

    def fits(self, size: int) -> bool:
        """Whether ``size`` bytes can be written."""
        return size <= self._room

    def write(self, tick: int, content: bytes) -> None:
        """Replace what was written the time before last. It `fits`."""
        slot = self._written % _SLOTS
        start = PAGE + slot * self._room
        self._map[start : start + len(content)] = content
        told = _TOLD.pack(self._written, tick, len(content))
        self._written += 1
        _SLOT.pack_into(self._map, _place(slot), told, _digest(told, content))

    def close(self) -> None:
        """Let go of it; harmless a second time."""
        if not self._map.closed:
            self._map.close()
            os.close(self.fd)


def read(fd: int) -> Entry:
    """What was written last and whole.

    Raises:
        IntegrityError: Nothing was, or this is no ledger.
    """
    try:
        magic, room = _HEAD.unpack(os.pread(fd, _HEAD.size, 0))
    except struct.error:
        magic, room = b"", 0
    if magic != _MAGIC or os.fstat(fd).st_size != PAGE + _SLOTS * room:
        raise IntegrityError("the descriptor is that of no ledger")
    whole: dict[int, Entry] = {}
    for slot in range(_SLOTS):
        told, digest = _SLOT.unpack(os.pread(fd, _SLOT.size, _place(slot)))
        number, tick, length = _TOLD.unpack(told)
        content = os.pread(fd, min(length, room), PAGE + slot * room)
        if digest and digest == _digest(told, content):
            whole[number] = Entry(tick, content)
    if not whole:
        raise IntegrityError("the ledger holds nothing that was written whole")
    return whole[max(whole)]


def _place(slot: int) -> int:
    return (1 + slot) * 64


def _digest(told: bytes, content: bytes) -> int:
    # Never 0, which an unwritten slot has.
    return xxhash.xxh3_64_intdigest(content, seed=xxhash.xxh3_64_intdigest(told)) | 1
