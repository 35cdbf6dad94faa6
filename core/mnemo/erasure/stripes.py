"""Which nodes protect each other, and which of them holds which fragment of what.

A group of n nodes has n stripes, over which the parities rotate: the parities of stripe ``s`` lie
with the m nodes from ``s`` on, its data with the others. So every node has data in k = n - m
stripes and parities in m, and its shard is cut into k blocks, one a stripe. The first holder of a
stripe's parities, its *hub*, receives all data, computes all parities and sends the others theirs:
(n - 1) / (n - m) of a shard leaves each node, the least of the ways compared (REFT, section on
in-memory redundancy; measured in ``docs/adr/0006``).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Final

from mnemo.erasure.codes import Code, CodeKind
from mnemo.errors import CodeError

BLOCK_ALIGN: Final = 4096
"""Blocks are whole pages."""


@dataclass(frozen=True)
class Stripe:
    """Positions (in the group) of those that hold a stripe's fragments, in their order."""

    number: int
    data: tuple[int, ...]
    parity: tuple[int, ...]

    @property
    def hub(self) -> int:
        """Who computes the parities."""
        return self.parity[0]


@dataclass(frozen=True)
class Place:
    """One block of a shard: fragment ``index`` of stripe ``stripe``."""

    stripe: int
    index: int


@dataclass(frozen=True)
class Group:
    """Nodes that protect each other against the loss of any ``parities`` of them.

    Attributes:
        nodes: Their names, in an order that is the same everywhere.
        parities: m, less than the number of nodes.

    Raises:
        CodeError: Too few nodes, or one is named twice.
    """

    nodes: tuple[str, ...]
    parities: int

    def __post_init__(self) -> None:
        if len(set(self.nodes)) != len(self.nodes):
            raise CodeError(f"a node is named twice in a group: {', '.join(self.nodes)}")
        if not 0 < self.parities < len(self.nodes):
            raise CodeError(
                f"{self.parities} parities for {len(self.nodes)} nodes: at least one node has to "
                "hold data"
            )

    @cached_property
    def code(self) -> Code:
        """The code of every stripe."""
        kind = CodeKind.XOR if self.parities == 1 else CodeKind.REED_SOLOMON
        return Code(kind, len(self.nodes) - self.parities, self.parities)

    @cached_property
    def stripes(self) -> tuple[Stripe, ...]:
        """All stripes; there are as many as nodes."""
        n = len(self.nodes)
        found = []
        for number in range(n):
            parity = tuple((number + j) % n for j in range(self.parities))
            data = tuple(i for i in range(n) if i not in parity)
            found.append(Stripe(number, data, parity))
        return tuple(found)

    def blocks(self, position: int) -> tuple[Place, ...]:
        """Where the k blocks of the shard of the node at ``position`` belong, in their order."""
        return tuple(
            Place(stripe.number, stripe.data.index(position))
            for stripe in self.stripes
            if position in stripe.data
        )

    def parities_of(self, position: int) -> tuple[Place, ...]:
        """The m parities that the node at ``position`` holds."""
        return tuple(
            Place(stripe.number, self.code.k + stripe.parity.index(position))
            for stripe in self.stripes
            if position in stripe.parity
        )

    def block_size(self, shard_sizes: Mapping[int, int] | list[int]) -> int:
        """Bytes of a fragment: that of the largest shard, of which the others' lack the end."""
        sizes = shard_sizes.values() if isinstance(shard_sizes, Mapping) else shard_sizes
        block = -(-max(sizes, default=0) // self.code.k)
        return -(-block // BLOCK_ALIGN) * BLOCK_ALIGN

    def sent_over_shard(self) -> float:
        """Bytes that leave a node, over those of its shard."""
        n = len(self.nodes)
        return (n - 1) / (n - self.parities)


@dataclass(frozen=True)
class Grouping:
    """All groups of a job.

    Attributes:
        groups: Every node is in one, but where there is only one node.
        degraded: In what the protection is less than was asked for, in words.
    """

    groups: tuple[Group, ...]
    degraded: tuple[str, ...]

    def of(self, node: str) -> Group | None:
        """The group of ``node``."""
        return next((group for group in self.groups if node in group.nodes), None)


def make_groups(domains: Mapping[str, str], *, size: int, parities: int) -> Grouping:
    """Divide nodes into groups of about ``size``, each spread over as many domains as there are.

    Args:
        domains: The failure domain (rack, host) of every node; '' for one of its own.
        size: Nodes of a group as asked for. Where it does not divide the number of nodes, groups
            are larger, never smaller.
        parities: Nodes of a group that may be lost.

    Raises:
        CodeError: ``size`` does not exceed ``parities``.
    """
    if not 0 < parities < size:
        raise CodeError(
            f"groups of {size} nodes with {parities} parities: give at least 1 parity, and more "
            "nodes than parities"
        )
    nodes, degraded = len(domains), []
    if nodes < 2:
        return Grouping((), ("one node alone: nothing protects it against its loss",))
    if nodes < size:
        kept = min(parities, nodes - 1)
        degraded.append(
            f"{nodes} nodes where groups of {size} were asked for: one group of {nodes}, which "
            f"survives the loss of {kept}"
        )
        parities = kept
    number = max(1, nodes // size)
    members: list[list[str]] = [[] for _ in range(number)]
    for i, node in enumerate(_domain_by_domain(domains)):
        members[i % number].append(node)
    groups = tuple(Group(tuple(sorted(names)), parities) for names in members)
    for i, group in enumerate(groups):
        for domain, count in Counter(domains[node] for node in group.nodes).items():
            if domain and count > parities:
                degraded.append(
                    f"domain {domain} has {count} nodes of group {i}, which survives the loss of "
                    f"{parities}"
                )
    return Grouping(groups, tuple(degraded))


def _domain_by_domain(domains: Mapping[str, str]) -> list[str]:
    """All nodes, those of a domain one after the other, so that dealing them out parts them."""
    found: dict[str, list[str]] = {}
    for node in sorted(domains):
        found.setdefault(domains[node] or f"\0{node}", []).append(node)
    together = [nodes for _, nodes in sorted(found.items(), key=lambda item: -len(item[1]))]
    return [node for nodes in together for node in nodes]
