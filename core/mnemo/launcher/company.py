"""What agents tell each other once the membership has ended, and who of them is still there.

Nobody beats for the membership any more then. Each agent says by records of its own that it lives,
so that the others do not wait for one that was lost.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Final, TypeVar

import msgspec

from mnemo.errors import SalvageError, StoreLostError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Collection, Sequence

    from mnemo.launcher.said import Said

_POLL_S: Final = 0.1
_BEAT_S: Final = 1.0
_COMES_S: Final = 60.0
"""By how much later than this one another agent may begin."""
_SILENCE_S: Final = 15.0
"""An agent, or the Store, that is not heard of for so long is lost."""
_T = TypeVar("_T", bound=msgspec.Struct)


class Alive(msgspec.Struct, frozen=True, array_like=True):
    """An agent is; ``number`` grows each time that it says so."""

    number: int


class Gone(msgspec.Struct, frozen=True, array_like=True):
    """An agent was asked to end."""


class Company:
    """The agents of one epoch that are left, as one of them hears of them.

    Args:
        said: What they say.
        addresses: Of their nodes, by node rank.
        rank: This one's.
        patience_s: Seconds that all of it may take.
    """

    def __init__(
        self, said: Said, addresses: Sequence[str], rank: int, *, patience_s: float
    ) -> None:
        self._said = said
        self._addresses = addresses
        self._rank = rank
        self._deadline = _now() + patience_s
        self._patience_s = patience_s
        self._heard: dict[int, tuple[int, float]] = {}
        """Of each other one: what was heard last, and until when it is to be heard again."""

    @contextlib.asynccontextmanager
    async def living(self) -> AsyncIterator[None]:
        """Say that this agent lives, as long as the block runs."""
        beating = asyncio.create_task(self._beat())
        try:
            yield
        finally:
            beating.cancel()
            await asyncio.wait({beating})

    async def _beat(self) -> None:
        number = 0
        while True:
            with contextlib.suppress(StoreLostError):
                number += 1
                await self._said.set(f"alive/{self._rank}", Alive(number))
            await asyncio.sleep(_BEAT_S)

    async def say_gone(self) -> None:
        """Say that this agent is asked to end, if the Store takes it in a moment."""
        with contextlib.suppress(StoreLostError, asyncio.TimeoutError):
            await asyncio.wait_for(self._said.put(f"gone/{self._rank}", Gone()), _BEAT_S)

    async def tell(self, key: str, record: msgspec.Struct) -> None:
        """Say ``record``.

        Raises:
            StoreLostError: The Store has gone.
        """
        deadline = _now() + _SILENCE_S
        while True:
            try:
                await self._said.put(key, record)
            except StoreLostError:
                if _now() > deadline:
                    raise
            else:
                return
            await asyncio.sleep(_POLL_S)

    async def first(self, key: str, kind: type[_T]) -> _T:
        """What somebody says, whoever it is.

        Raises:
            SalvageError: Nobody does.
            StoreLostError: The Store has gone.
        """
        deadline = _now() + _COMES_S
        while _now() < deadline:
            (found,) = await self._read([key], kind)
            if found is not None:
                return found
            await asyncio.sleep(_POLL_S)
        raise SalvageError(f"no node has said within {_COMES_S:g} s who is left")

    async def all(self, what: str, kind: type[_T], ranks: Collection[int]) -> list[_T]:
        """What each of ``ranks`` says of ``what``.

        Raises:
            SalvageError: One of them has gone, or takes too long.
            StoreLostError: The Store has gone.
        """
        while True:
            found = await self._read([f"{what}/{rank}" for rank in ranks], kind)
            records = [record for record in found if record is not None]
            if len(records) == len(found):
                return records
            missing = [
                rank
                for rank, record in zip(ranks, found, strict=True)
                if record is None and rank != self._rank
            ]
            await self._look_after(missing)
            await asyncio.sleep(_POLL_S)

    async def _look_after(self, ranks: Collection[int]) -> None:
        said = await self._read([f"alive/{rank}" for rank in ranks], Alive)
        gone = await self._read([f"gone/{rank}" for rank in ranks], Gone)
        for rank, alive, end in zip(ranks, said, gone, strict=True):
            number, until = self._heard.setdefault(rank, (0, _now() + _COMES_S))
            node = f"node {self._addresses[rank]}"
            if end is not None:
                raise SalvageError(f"{node} was asked to end")
            if alive is not None and alive.number > number:
                self._heard[rank] = alive.number, _now() + _SILENCE_S
            elif _now() > until:
                raise SalvageError(f"{node} is lost, too")
            if _now() > self._deadline:
                raise SalvageError(f"{node} is not through after {self._patience_s:g} s")

    async def _read(self, keys: list[str], kind: type[_T]) -> list[_T | None]:
        deadline = _now() + _SILENCE_S
        while True:
            try:
                return await self._said.read_all(keys, kind)
            except StoreLostError:
                if _now() > deadline:
                    raise
            await asyncio.sleep(_POLL_S)


def _now() -> float:
    return asyncio.get_running_loop().time()
