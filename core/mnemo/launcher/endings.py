"""How a life or a job has ended, as the agents of several nodes tell each other."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Final

import msgspec

from mnemo.errors import StoreLostError
from mnemo.launcher.restarts import Position
from mnemo.launcher.team import Report

if TYPE_CHECKING:
    from collections.abc import Callable

    from mnemo.launcher.said import Said
    from mnemo.membership import Epoch

_POLL_S: Final = 0.1


class End(msgspec.Struct, frozen=True, array_like=True):
    """How a life ended, on one node or because of one."""

    code: int | None
    cause: str = ""
    position: tuple[int, int, int] | None = None
    refused: bool = False
    leaves: str = ""
    """The key of the agent whose node leaves for that, where the others do without it."""


class Endings:
    """Of the epochs that one agent takes part in.

    Args:
        said: What agents say.
        key: This agent's.
    """

    def __init__(self, said: Said, key: str) -> None:
        self._said = said
        self._key = key

    async def why(self, epoch: Epoch, *, is_newcomer: bool) -> Report | None:
        """What ended ``epoch``'s life; None if nobody has said.

        Args:
            epoch: The one.
            is_newcomer: See `mnemo.launcher.team.Team.is_newcomer`.
        """
        end = None
        with contextlib.suppress(StoreLostError):
            end = await self._said.read(f"end/{epoch.number}", End)
        if end is None:
            return None
        position = Position(*end.position) if end.position else None
        other = bool(end.leaves) and end.leaves != self._key
        leaves = other or (end.refused and not is_newcomer)
        code = None if leaves else end.code
        return Report(cause=end.cause, position=position, code=code, leaves=leaves)

    async def tell(
        self, epoch: Epoch, report: Report, *, is_newcomer: bool, leaves: str
    ) -> int | None:
        """Say that ``epoch``'s life has failed here.

        Args:
            epoch: The one.
            report: Why.
            is_newcomer: See `mnemo.launcher.team.Team.is_newcomer`.
            leaves: The key of the agent whose node leaves for it; empty for none.

        Returns:
            See `mnemo.launcher.team.Team.report`.
        """
        at, code = report.position, report.code
        refused = report.refused and bool(epoch.lost)
        if (refused and not is_newcomer) or leaves not in {"", self._key}:
            code = None
        position = (at.epoch, at.batch, at.step) if at else None
        end = End(report.code, report.cause, position, refused, leaves)
        with contextlib.suppress(StoreLostError):
            first = await self._said.put(f"end/{epoch.number}", end)
            if leaves and first != end:
                code = None  # another node was faster, and may be the cause
            if code is not None and not refused and not leaves:
                code = (await self.close(epoch, end)).code
        return code

    async def close(self, epoch: Epoch, end: End) -> End:
        """Say that the job is over with ``epoch``; how it is, as the first has said.

        Raises:
            StoreLostError: The Store does not answer.
        """
        return await self._said.put(f"over/{epoch.number}", end)

    async def closed(self, epoch: Epoch) -> End | None:
        """See `close`; None if it is not over.

        Raises:
            StoreLostError: The Store does not answer.
        """
        return await self._said.read(f"over/{epoch.number}", End)

    async def of_all(self, epoch: Epoch, code: int, is_over: Callable[[], bool]) -> int | None:
        """This node's ranks have ended with ``code``: wait for those of the others.

        Returns:
            See `mnemo.launcher.team.Team.all_ended`.
        """
        mine = epoch.rank_of(self._key)
        keys = [f"exit/{epoch.number}/{rank}" for rank in range(len(epoch.members))]
        while not is_over():
            with contextlib.suppress(StoreLostError):
                await self._said.put(f"exit/{epoch.number}/{mine}", End(code))
                ends = [end for end in await self._said.read_all(keys, End) if end is not None]
                if len(ends) == len(keys):
                    everywhere = max(end.code or 0 for end in ends)
                    await self.close(epoch, End(everywhere))
                    return everywhere
            await asyncio.sleep(_POLL_S)
        return None

    async def leave(self) -> None:
        """Say that this agent leaves.

        Raises:
            StoreLostError: The Store does not answer.
        """
        await self._said.put(f"left/{self._key}", End(0))

    async def left(self, keys: frozenset[str]) -> set[str]:
        """Which of the agents ``keys`` have left.

        Raises:
            StoreLostError: The Store does not answer.
        """
        order = sorted(keys)
        found = await self._said.read_all([f"left/{key}" for key in order], End)
        return {key for key, end in zip(order, found, strict=True) if end is not None}
