"""What an agent asks of the other nodes' agents; on one node, nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from mnemo.launcher.restarts import Ended, Position
from mnemo.launcher.seat import Seat

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from mnemo.launcher.options import LaunchOptions


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """Why a life ended, as the node where it began to end tells the others.

    Attributes:
        cause: Who failed and how, in words; empty where it is a node that does not answer.
        position: Where the run was, if that is known.
        code: The exit code that the job ends with; None if all ranks restart.
        silent: What does not answer, in words, where there is no cause.
        refused: A rank would not begin as it was started, and would not again. Where a node has
            just taken a lost one's place that node leaves, and the others wait for another.
        leaves: Said by such a node: it leaves, since its ranks have failed before they trained.
            Heard by the others: so does who is to blame, and they wait for another.
    """

    cause: str
    position: Position | None = None
    code: int | None = None
    silent: str = ""
    refused: bool = False
    leaves: bool = False


class Team(Protocol):
    """The agents of all nodes of a job."""

    def __str__(self) -> str:
        """What stands behind the number of this node's ranks."""
        ...

    async def take_seat(self, port: int) -> Seat | Ended:
        """Wait until all nodes of the next life are there.

        Args:
            port: Where this node's first rank could host the ranks' store.

        Returns:
            The end of the job, where others have ended it, or one is missing for too long.

        Raises:
            LaunchError: One is missing for too long, and there was no life before.
        """
        ...

    def watch(self, changed: Callable[[], None]) -> None:
        """Have ``changed`` called whenever `is_over` may have become true."""
        ...

    @property
    def is_over(self) -> bool:
        """Whether the seat that was taken last is not this node's any more: all ranks end."""
        ...

    @property
    def is_newcomer(self) -> bool:
        """Whether this node has just taken a lost one's place: the others do without it."""
        ...

    async def why(self) -> Report:
        """What ended it."""
        ...

    async def is_elsewhere(self, code: int, tail: Iterable[str]) -> bool:
        """Whether a rank failed here because something failed on another node.

        Args:
            code: Its exit code; negative for a signal.
            tail: Its last lines.

        Returns:
            True if `why` says what.
        """
        ...

    async def report(self, report: Report) -> int | None:
        """Tell the others that this life has failed here; they learn `why`.

        Returns:
            The report's code, or that of another node which has ended the job before; None if
            the job goes on without the node that is to blame.
        """
        ...

    async def all_ended(self, code: int) -> int | None:
        """This node's ranks have ended, with ``code``: wait for those of the others.

        Returns:
            The exit code of the job; None if the seat was lost meanwhile.
        """
        ...

    async def close(self) -> None:
        """The job is over for this node."""
        ...


class Alone:
    """The only node."""

    is_over = False
    is_newcomer = False

    def __init__(self, options: LaunchOptions) -> None:
        self._options = options
        self._lives = 0

    def __str__(self) -> str:
        return ""

    async def take_seat(self, port: int) -> Seat:
        """At once."""
        options = self._options
        self._lives += 1
        return Seat(
            world_size=options.ranks,
            master_addr=options.master_addr,
            master_port=options.master_port or port,
            restarts=self._lives - 1,
        )

    def watch(self, changed: Callable[[], None]) -> None:
        """Nothing happens elsewhere."""

    async def why(self) -> Report:
        """Never asked."""
        raise NotImplementedError

    async def is_elsewhere(self, code: int, tail: Iterable[str]) -> bool:
        """There is no other."""
        del code, tail
        return False

    async def report(self, report: Report) -> int | None:
        """Nobody else is there to be told."""
        return report.code

    async def all_ended(self, code: int) -> int:
        """They have."""
        return code

    async def close(self) -> None:
        """Nothing is open."""
