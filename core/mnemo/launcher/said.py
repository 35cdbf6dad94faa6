"""What agents tell each other in the Store that they take part in, each thing once."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Final, TypeVar

import msgspec

from mnemo.errors import MembershipRecordError, StoreLostError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from mnemo.membership import Machine, Seal, Store, Stores

_STRANGERS: Final = "strangers"
_T = TypeVar("_T", bound=msgspec.Struct)


class Said:
    """The launcher's own records, beside those of `mnemo.membership`.

    Args:
        stores: Speaks to Stores.
        machine: Knows in which one this agent takes part.
        seal: Of the run.
        prefix: Of all keys.
    """

    def __init__(self, stores: Stores, machine: Machine, seal: Seal, prefix: str = "") -> None:
        self._stores = stores
        self._machine = machine
        self._seal = seal
        self._prefix = prefix

    def below(self, prefix: str) -> Said:
        """Those whose keys begin with ``prefix``."""
        return Said(self._stores, self._machine, self._seal, f"{self._prefix}{prefix}/")

    async def put(self, key: str, record: _T) -> _T:
        """Set what is set once; what stands there now: the first stays.

        Raises:
            StoreLostError: The Store does not answer.
        """
        key = self._prefix + key
        store = await self._store()
        there = await store.compare_set(key, None, self._seal.wrap(key, record))
        return self._open(key, there, type(record)) or record

    async def set(self, key: str, record: msgspec.Struct) -> None:
        """Set what one agent alone sets, again and again.

        Raises:
            StoreLostError: The Store does not answer.
        """
        key = self._prefix + key
        await (await self._store()).set(key, self._seal.wrap(key, record))

    async def read(self, key: str, kind: type[_T]) -> _T | None:
        """What it was set to; None if nobody did.

        Raises:
            StoreLostError: The Store does not answer.
        """
        (found,) = await self.read_all((key,), kind)
        return found

    async def read_all(self, keys: Iterable[str], kind: type[_T]) -> list[_T | None]:
        """As `read`, of several keys at once.

        Raises:
            StoreLostError: The Store does not answer.
        """
        names = tuple(self._prefix + key for key in keys)
        found = await (await self._store()).get(names) if names else ()
        return [self._open(name, raw, kind) for name, raw in zip(names, found, strict=True)]

    def _open(self, key: str, raw: bytes | None, kind: type[_T]) -> _T | None:
        if raw is not None:
            with contextlib.suppress(MembershipRecordError):  # a stranger's
                return self._seal.unwrap(key, raw, kind)
        return None

    async def knock(self, places: Iterable[str]) -> None:
        """Leave a trace, at whichever of ``places`` answers: somebody came with another secret."""
        for place in places:
            with contextlib.suppress(StoreLostError):
                await (await self._stores.store(place)).add(_STRANGERS)

    async def have_strangers_come(self) -> bool:
        """Whether somebody did. It is not under a MAC, and says nothing else.

        Raises:
            StoreLostError: The Store does not answer.
        """
        (count,) = await (await self._store()).get((_STRANGERS,))
        return count is not None

    async def _store(self) -> Store:
        if not self._machine.place:
            raise StoreLostError("this node takes part in no Store")
        return await self._stores.store(self._machine.place)
