"""At the start every node tries every other, so that a closed port is found before it matters."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Final

import msgspec

from mnemo.errors import PeerError
from mnemo.transport.address import Address
from mnemo.transport.endpoints import connect
from mnemo.transport.handshake import Identity
from mnemo.transport.peer import Rules

_AT_ONCE: Final = 16
_NO_MESSAGES: Final = msgspec.msgpack.Decoder(None)


class Unreachable(msgspec.Struct, frozen=True, order=True):
    """One direction that does not work.

    Attributes:
        node: Who tried.
        target: Whom.
        address: Where, as text.
        why: What happened.
    """

    node: str
    target: str
    address: str
    why: str

    def __str__(self) -> str:
        return f"node {self.node} cannot reach {self.target} at {self.address}: {self.why}"


async def find_unreachable(
    me: Identity, nodes: Mapping[str, Address], rules: Rules | None = None
) -> list[Unreachable]:
    """Try every node but this one; each has to listen by now.

    Put together, the results of all nodes name each pair that fails, and in which direction.

    Args:
        me: This node.
        nodes: Where each node of the run listens.
        rules: Waits and limits.

    Returns:
        Those that cannot be reached from here, by name.
    """
    names = sorted(nodes)
    own = names.index(me.node) if me.node in nodes else 0
    # Each node begins behind itself: otherwise all would be at the first one's door at once.
    order = [name for name in names[own:] + names[:own] if name != me.node]
    free = asyncio.Semaphore(_AT_ONCE)

    async def attempt(target: str) -> Unreachable | None:
        async with free:
            try:
                peer = await connect(me, nodes[target], _NO_MESSAGES, expect=target, rules=rules)
            except PeerError as error:
                return Unreachable(me.node, target, str(nodes[target]), error.why)
            await peer.close()
            return None

    found = await asyncio.gather(*map(attempt, order))
    return sorted(one for one in found if one is not None)
