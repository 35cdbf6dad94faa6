"""What an agent asks of the Stores that it speaks to, beside what `mnemo.membership` does."""

from __future__ import annotations

from typing import Protocol

from mnemo.membership import Stores


class AgentStores(Stores, Protocol):
    """All of one agent's: `mnemo.launcher.c10d.C10dStores`, `mnemo.launcher.etcd.EtcdStores`."""

    async def warm_up(self) -> None:
        """Be ready to host one at once."""
        ...

    async def forget(self, place: str, joined: str, count: int) -> None:
        """Remove all that the run has at ``place``, if that would stay, and nobody else has come.

        Args:
            place: Where it is.
            joined: Key of the counter of agents.
            count: What that is as long as no other has come.

        Raises:
            StoreLostError: It does not answer.
        """
        ...

    async def close(self) -> None:
        """Hang up, and end the Store that is hosted here."""
        ...
