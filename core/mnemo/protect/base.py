"""The last protected generation as base of the next one: only differences to it travel.

Codes are linear: parities of a difference, added to the old parities, are the new ones, and adding
is XOR. What lies here of the base is checked before anything is made of it: a damaged chunk would
otherwise be inherited by all later generations.
"""

from __future__ import annotations

import logging
from typing import NamedTuple

import numpy as np
import xxhash

from mnemo.errors import FragmentError
from mnemo.protect.shard import Fragments

log = logging.getLogger("mnemo.protect")


class Old(NamedTuple):
    """A chunk as it is kept, and the digest that it had when it was protected."""

    data: memoryview
    digest: int


class OldFragment:
    """One of this node's fragments of the base, chunk by chunk."""

    def __init__(self, base: Fragments, stripe: int) -> None:
        """Make room for one chunk.

        Args:
            base: What is kept of the base.
            stripe: Of the fragment.
        """
        self._base = base
        self._stripe = stripe
        self._row = base.tables[stripe][base.plan.index_of(base.position, stripe)]
        self._buffer = memoryview(bytearray(base.plan.generation.chunk))

    def digest(self, chunk: int) -> int:
        """The digest that a chunk had when it was protected."""
        return int(self._row[chunk])

    def read(self, chunk: int, length: int) -> Old:
        """A chunk of ``length`` bytes, unchecked; the one read before it counts no more.

        Raises:
            FragmentError: It is kept no more.
        """
        data = self._buffer[:length]
        self._base.read(self._stripe, chunk, data)
        return Old(data, self.digest(chunk))


def check(old: Old) -> None:
    """Make sure that a chunk is what was protected.

    Raises:
        FragmentError: It is not.
    """
    if xxhash.xxh3_64_intdigest(old.data) != old.digest:
        why = "what is kept of the last protected generation is damaged"
        # Said here: another node may notice the hang-up before the leader hears of the reason.
        log.warning("%s: its checksum is %#018x no more", why, old.digest)
        raise FragmentError(why)


def add(part: memoryview, old: Old) -> None:
    """Add ``old`` to ``part``: of new data it makes their difference, of a parity's the new one.

    Raises:
        FragmentError: As `check`.
    """
    check(old)
    target = np.frombuffer(part, np.uint8)
    np.bitwise_xor(target, np.frombuffer(old.data, np.uint8), out=target)
