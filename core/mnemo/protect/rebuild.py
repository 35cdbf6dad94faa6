"""A replacement's part of a rebuild: it asks who is left, what they keep, and for what it lost."""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import AsyncIterator, Collection
from dataclasses import dataclass
from typing import Final

from mnemo.erasure.stripes import Group
from mnemo.errors import (
    FragmentError,
    PeerError,
    ProtectionError,
    ShardsLostError,
)
from mnemo.protect.messages import (
    Ask,
    Describe,
    Described,
    Kept,
    Message,
    Rebuild,
)
from mnemo.protect.neighbours import Neighbours
from mnemo.protect.plan import Plan
from mnemo.protect.shard import Fragments, Table, seal_of
from mnemo.protect.streams import Incoming, receive
from mnemo.protect.tasks import together
from mnemo.transport.peer import Peer

log = logging.getLogger("mnemo.protect")

_DAMAGED: Final = (PeerError, ProtectionError, FragmentError)


@dataclass
class Progress:
    """How far a rebuild is, in bytes; counts up while it runs."""

    done: int = 0
    total: int = 0


@dataclass(frozen=True)
class Survivors:
    """Who is left, and a generation that they keep.

    Attributes:
        plan: Its layout.
        digests: Of all its fragments, as of `Fragments.all_digests`.
        nodes: Who keeps it.
        lost: All others.
    """

    plan: Plan
    digests: memoryview
    nodes: tuple[str, ...]
    lost: tuple[str, ...]


async def find_survivors(fit: int, group: Group, neighbours: Neighbours) -> list[Survivors]:
    """Ask all of ``group`` what they keep.

    Returns:
        The generations that enough of them keep, the oldest first; none where nobody keeps any,
        all having answered.

    Raises:
        ShardsLostError: Too few keep the same generation.
        ProtectionError: What they say of it cannot be.
    """
    others = [node for node in group.nodes if node != neighbours.name]
    answers = dict(
        zip(others, await asyncio.gather(*(_ask(fit, n, neighbours) for n in others)), strict=True)
    )
    keepers: dict[tuple[int, bytes], list[str]] = defaultdict(list)
    for node, seals in answers.items():
        for epoch_and_seal in (seals or {}).items():
            keepers[epoch_and_seal].append(node)
    if not keepers and all(seals is not None for seals in answers.values()):
        return []
    by_number = sorted(keepers.items(), key=lambda kept: len(kept[1]), reverse=True)
    most: dict[int, tuple[bytes, tuple[str, ...]]] = {}
    for (epoch, seal), kept_by in by_number:
        most.setdefault(epoch, (seal, tuple(kept_by)))
    found = []
    for epoch, (seal, nodes) in sorted(most.items()):
        if len(nodes) < group.code.k:
            continue
        plan, digests = await _describe(fit, nodes, epoch, seal, neighbours)
        if plan.group != group:
            raise ProtectionError(
                f"epoch {epoch} is of the group {', '.join(plan.group.nodes)} with "
                f"{plan.group.parities} parities, not of this node's"
            )
        found.append(Survivors(plan, digests, nodes, _others(group, nodes)))
    if not found:
        lost = _others(group, by_number[0][1] if by_number else ())
        raise ShardsLostError(
            f"{len(lost)} of {len(group.nodes)} nodes have nothing that was protected in this "
            f"group: {', '.join(lost)}; the parities make up for {group.parities}. Resume from a "
            "checkpoint on storage, or start with the nodes and settings of before"
        )
    return found


def _others(group: Group, nodes: Collection[str]) -> tuple[str, ...]:
    return tuple(node for node in group.nodes if node not in nodes)


async def _ask(fit: int, node: str, neighbours: Neighbours) -> dict[int, bytes] | None:
    """What ``node`` keeps; None if it does not answer."""
    try:
        async with neighbours.call(node, Ask(fit)) as peer:
            kept = (await receive(peer, Kept)).message
    except _DAMAGED as error:
        log.info("%s does not say what it keeps: %s", node, error)
        return None
    assert isinstance(kept, Kept)
    return kept.seals


async def _describe(
    fit: int, nodes: tuple[str, ...], epoch: int, seal: bytes, neighbours: Neighbours
) -> tuple[Plan, memoryview]:
    """Layout and digests of an epoch, from the first node that tells the truth."""
    why = ""
    for node in nodes:
        try:
            async with neighbours.call(node, Describe(fit, epoch)) as peer:
                return await _receive_description(peer, seal)
        except _DAMAGED as error:
            why = f"{node}: {error}"
    raise ProtectionError(f"epoch {epoch} is kept, and nobody can describe it: {why}")


async def _receive_description(peer: Peer[Message], seal: bytes) -> tuple[Plan, memoryview]:
    digests = memoryview(b"")
    plan: Plan | None = None

    def place(message: Message, size: int) -> memoryview | None:
        nonlocal digests, plan
        if isinstance(message, Described):
            plan = Plan(message.generation)
            if plan.all_digest_bytes == size:
                digests = memoryview(bytearray(size))
                return digests
        raise FragmentError(f"{peer.node} described a generation with {size} bytes of digests")

    await peer.receive(place)
    if plan is None or seal_of(plan, digests) != seal:
        raise FragmentError(f"{peer.node} described another generation than it said it keeps")
    return plan, digests


class Rebuilding:
    """Brings back this node's fragments of one generation."""

    def __init__(
        self,
        fit: int,
        survivors: Survivors,
        fragments: Fragments,
        neighbours: Neighbours,
        progress: Progress,
    ) -> None:
        """Describe it; `run` does it.

        Args:
            fit: Whose generation.
            survivors: Who is left.
            fragments: Of this node, with memory in which nothing lies yet.
            neighbours: The others.
            progress: Counts.
        """
        plan = survivors.plan
        self._fit = fit
        self._survivors = survivors
        self._fragments = fragments
        self._neighbours = neighbours
        self._plan = plan
        self._progress = progress

    async def run(self) -> None:
        """Fetch all fragments, each from another survivor. Afterwards they are whole.

        Raises:
            ShardsLostError: A fragment cannot be had from anybody.
        """
        self._fragments.take_all_digests(self._survivors.digests)
        await together(*(self._fetch(stripe) for stripe in range(len(self._plan.group.nodes))))

    async def _fetch(self, stripe: int) -> None:
        """Bring back this node's fragment of ``stripe``, a part from each survivor.

        So all of them have as much to do, whatever their number.
        """
        nodes, plan = self._survivors.nodes, self._plan
        index = plan.index_of(self._fragments.position, stripe)
        wanted = [c for c in range(plan.chunks(stripe)) if plan.length(stripe, index, c)]
        share = -(-len(wanted) // len(nodes)) or 1
        for part, start in enumerate(range(0, len(wanted), share)):
            turn = (stripe + part) % len(nodes)
            await self._fetch_part(
                nodes[turn:] + nodes[:turn], stripe, index, wanted[start : start + share]
            )

    async def _fetch_part(
        self, nodes: tuple[str, ...], stripe: int, index: int, wanted: list[int]
    ) -> None:
        """Bring back chunks of a fragment from the first of ``nodes`` that can."""
        left, failures = wanted, []
        for node in nodes:
            try:
                async for chunk in self._chunks(node, stripe, index, left):
                    left = [other for other in left if other > chunk]
            except _DAMAGED as error:
                log.warning("fragment %d of stripe %d from %s: %s", index, stripe, node, error)
                failures.append(str(error))
            else:
                return
        raise ShardsLostError(
            f"fragment {index} of stripe {stripe} comes back from nobody: {'; '.join(failures)}"
        )

    async def _chunks(
        self, node: str, stripe: int, index: int, wanted: list[int]
    ) -> AsyncIterator[int]:
        """Have ``node`` compute chunks of a fragment, and store them."""
        plan, lost = self._plan, self._survivors.lost
        table: Table = self._fragments.tables[stripe]
        buffer = memoryview(bytearray(plan.generation.chunk))
        epoch, first, stop = plan.generation.epoch, wanted[0], wanted[-1] + 1
        request = Rebuild(self._fit, epoch, stripe, index, first, stop, lost)
        async with self._neighbours.call(node, request) as peer:
            incoming = Incoming(peer)
            for chunk in wanted:
                part = buffer[: plan.length(stripe, index, chunk)]
                digest = await incoming.next(chunk, part)
                if digest != table[index][chunk]:
                    raise FragmentError(f"{node} computed chunk {chunk} wrongly")
                self._fragments.write(stripe, chunk, part)
                self._progress.done += len(part)
                yield chunk
