"""What membership asks of a Store, and what may be asked of one at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


class Store(Protocol):
    """A few registers that several nodes share, each operation of which happens at one instant.

    Every method raises `mnemo.errors.StoreLostError` if there was no answer in time; the
    operation may then have happened, or happen later.
    """

    async def get(self, keys: tuple[str, ...]) -> tuple[bytes | None, ...]:
        """The values of ``keys``, each read after the call; None where nothing was set."""
        ...

    async def set(self, key: str, value: bytes) -> None:
        """Set ``key`` to ``value``, which is not empty."""
        ...

    async def compare_set(self, key: str, expected: bytes | None, value: bytes) -> bytes | None:
        """Set ``key`` if it is ``expected`` (None: nothing); what stands there afterwards."""
        ...

    async def add(self, key: str) -> int:
        """Add 1 to a counter that begins with 0, and return it."""
        ...


@dataclass(frozen=True, slots=True)
class Get:
    """See `Store.get`."""

    place: str
    keys: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Set:
    """See `Store.set`."""

    place: str
    key: str
    value: bytes


@dataclass(frozen=True, slots=True)
class CompareSet:
    """See `Store.compare_set`."""

    place: str
    key: str
    expected: bytes | None
    value: bytes


@dataclass(frozen=True, slots=True)
class Add:
    """See `Store.add`."""

    place: str
    key: str


@dataclass(frozen=True, slots=True)
class Host:
    """Have a new, empty Store at this node's ``place``; one that was there before ends."""

    place: str


Op = Get | Set | CompareSet | Add | Host
Answer = tuple[bytes | None, ...] | bytes | int | None
