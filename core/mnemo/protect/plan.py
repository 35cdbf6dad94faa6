"""Which bytes of which shard belong to which fragment: arithmetic without any I/O.

A node's shard is the sequence of its ranks' segments, each padded to whole pages. It is cut into k
blocks of a length that is the same in the whole group; where a shard is shorter, the rest of its
blocks counts as zeros, which are neither stored nor sent. A fragment is sent, encoded and checked
in chunks.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Final

import msgspec

from mnemo.erasure.codes import MOST_FRAGMENTS
from mnemo.erasure.stripes import BLOCK_ALIGN, Group
from mnemo.errors import CodeError, ProtectionError
from mnemo.protect.messages import Generation, Piece

CHUNK: Final = 1 << 20
"""Bytes of a fragment that are sent, encoded and checked at once."""
MOST_CHUNK: Final = 16 << 20
DIGEST_BYTES: Final = 8
MOST_DIGEST_BYTES: Final = 32 << 20
"""Of all fragments of a generation."""


def page_up(size: int) -> int:
    """``size`` rounded up to whole pages."""
    return -(-size // BLOCK_ALIGN) * BLOCK_ALIGN


def shard_size(pieces: tuple[Piece, ...]) -> int:
    """Bytes of a shard made of ``pieces``."""
    return sum(page_up(piece.size) for piece in pieces)


@dataclass(frozen=True)
class Plan:
    """Layout of one generation over its group."""

    generation: Generation

    def __post_init__(self) -> None:
        """Look at what another node said before anything is allocated by it.

        Raises:
            ProtectionError: It cannot be.
        """
        given = self.generation
        try:
            if len(given.nodes) > MOST_FRAGMENTS:
                raise CodeError(f"{len(given.nodes)} nodes: a group has {MOST_FRAGMENTS} at most")
            self.group  # noqa: B018 - made here, so that it raises here
        except CodeError as error:
            raise ProtectionError(f"epoch {given.epoch} cannot be laid out: {error}") from error
        if len(given.shards) != len(given.nodes):
            raise ProtectionError(
                f"epoch {given.epoch} has {len(given.shards)} shards for {len(given.nodes)} nodes"
            )
        if given.chunk % BLOCK_ALIGN or given.chunk > MOST_CHUNK:
            raise ProtectionError(
                f"epoch {given.epoch} has chunks of {given.chunk} bytes: whole pages of "
                f"{BLOCK_ALIGN} up to {MOST_CHUNK} are possible"
            )
        digests = self.all_digest_bytes
        if digests > MOST_DIGEST_BYTES:
            raise ProtectionError(
                f"epoch {given.epoch} with chunks of {given.chunk} bytes has {digests} bytes of "
                f"digests, {MOST_DIGEST_BYTES} are possible: larger chunks are needed"
            )
        for node, pieces in zip(given.nodes, given.shards, strict=True):
            ranks = [piece.rank for piece in pieces]
            if not ranks or ranks != sorted(set(ranks)):
                raise ProtectionError(
                    f"epoch {given.epoch}: node {node} says it holds ranks {ranks}: "
                    "they have to be some, in order, each once"
                )

    @classmethod
    def of(cls, generation: Generation) -> Plan:
        """Lay out ``generation`` with the smallest chunks, from its own on, that are possible.

        Raises:
            ProtectionError: It cannot be laid out.
        """
        while True:
            try:
                return cls(generation)
            except ProtectionError:
                if generation.chunk >= MOST_CHUNK:
                    raise
                generation = msgspec.structs.replace(generation, chunk=generation.chunk * 2)

    @cached_property
    def group(self) -> Group:
        """Who holds what."""
        return Group(self.generation.nodes, self.generation.parities)

    @cached_property
    def sizes(self) -> list[int]:
        """Bytes of every node's shard."""
        return [shard_size(pieces) for pieces in self.generation.shards]

    @cached_property
    def block(self) -> int:
        """Bytes of a block of the largest shard."""
        return self.group.block_size(self.sizes)

    def is_like(self, other: Plan) -> bool:
        """Whether all fragments of ``other`` have the same places, lengths and chunks."""
        mine, its = self.generation, other.generation
        return (self.group, mine.chunk, self.sizes) == (other.group, its.chunk, other.sizes)

    def index_of(self, position: int, stripe: int) -> int:
        """Which fragment of ``stripe`` the node at ``position`` holds: every node has one."""
        found = self.group.stripes[stripe]
        if position in found.parity:
            return self.group.code.k + found.parity.index(position)
        return found.data.index(position)

    def position_of(self, stripe: int, index: int) -> int:
        """Who holds fragment ``index`` of ``stripe``."""
        found = self.group.stripes[stripe]
        return (found.data + found.parity)[index]

    @cached_property
    def _block_offsets(self) -> dict[tuple[int, int], int]:
        return {
            (position, place.stripe): number * self.block
            for position in range(len(self.sizes))
            for number, place in enumerate(self.group.blocks(position))
        }

    @cached_property
    def _sizes(self) -> dict[tuple[int, int], int]:
        """Bytes by stripe and fragment."""
        found = {}
        for stripe in self.group.stripes:
            for index, position in enumerate(stripe.data):
                left = self.sizes[position] - self.shard_offset(position, stripe.number)
                found[stripe.number, index] = max(0, min(left, self.block))
            longest = max(found[stripe.number, index] for index in range(self.group.code.k))
            for index in range(self.group.code.k, self.group.code.n):
                found[stripe.number, index] = longest
        return found

    @cached_property
    def _parity_offsets(self) -> dict[tuple[int, int], int]:
        found = {}
        for position in range(len(self.sizes)):
            offset = 0
            for place in self.group.parities_of(position):
                found[position, place.stripe] = offset
                offset += self.stripe_size(place.stripe)
        return found

    def shard_offset(self, position: int, stripe: int) -> int:
        """Where in its shard the block lies that the node at ``position`` has in ``stripe``."""
        return self._block_offsets[position, stripe]

    def parity_offset(self, position: int, stripe: int) -> int:
        """Where in its parity memory the node at ``position`` keeps that of ``stripe``."""
        return self._parity_offsets[position, stripe]

    def parity_size(self, position: int) -> int:
        """Bytes of all parities of the node at ``position``."""
        return sum(self.stripe_size(place.stripe) for place in self.group.parities_of(position))

    def kept_by(self, position: int) -> int:
        """Bytes of all fragments of the node at ``position``."""
        stripes = range(len(self.sizes))
        return sum(self.size(stripe, self.index_of(position, stripe)) for stripe in stripes)

    def size(self, stripe: int, index: int) -> int:
        """Bytes of a fragment that are stored and sent."""
        return self._sizes[stripe, index]

    def stripe_size(self, stripe: int) -> int:
        """Bytes of the longest data fragment of ``stripe``, and of its parities."""
        return self._sizes[stripe, self.group.code.k]

    def chunks(self, stripe: int) -> int:
        """Chunks of the longest fragment of ``stripe``."""
        return -(-self.stripe_size(stripe) // self.generation.chunk)

    def length(self, stripe: int, index: int, chunk: int) -> int:
        """Bytes of one chunk of a fragment; 0 where there are only zeros."""
        left = self.size(stripe, index) - chunk * self.generation.chunk
        return max(0, min(left, self.generation.chunk))

    def stripe_length(self, stripe: int, chunk: int) -> int:
        """Bytes of one chunk of the longest fragment of ``stripe``: what is computed with."""
        return self.length(stripe, self.group.code.k, chunk)

    def digest_bytes(self, stripe: int) -> int:
        """Bytes of all digests of one stripe."""
        return self.group.code.n * self.chunks(stripe) * DIGEST_BYTES

    @property
    def all_digest_bytes(self) -> int:
        """Bytes of all digests."""
        return sum(self.digest_bytes(stripe) for stripe in range(len(self.sizes)))

    def sent_by(self, position: int) -> int:
        """Bytes of fragments that leave the node at ``position`` while this is protected."""
        data = sum(self.size(p.stripe, p.index) for p in self.group.blocks(position))
        return data + (self.group.parities - 1) * self.stripe_size(position)
