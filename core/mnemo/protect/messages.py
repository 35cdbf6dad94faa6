"""What the nodes of a group say to each other. Every message travels under the transport's MAC.

A connection begins with an *opening*, which says what it is for. Members and leader talk over one
that lasts; fragments have connections of their own, which end with the attempt they are part of.
"""

from __future__ import annotations

from typing import Annotated, Final

import msgspec

_Count = Annotated[int, msgspec.Meta(ge=0)]
_Size = Annotated[int, msgspec.Meta(ge=1, le=1 << 50)]


class Piece(msgspec.Struct, frozen=True, array_like=True):
    """One rank's sealed segment; ``size`` in bytes, ``bulk_size`` those of its bulk."""

    rank: _Count
    size: _Size
    bulk_size: _Count


class Generation(msgspec.Struct, frozen=True):
    """A generation that a group protects: all that has to be known to lay it out.

    Attributes:
        epoch: Number of the attempt to protect it, larger than of all before.
        tick: Its number in the run.
        step: Optimizer steps done.
        nodes: The group, in its order.
        parities: Nodes of it that may be lost.
        chunk: Bytes of fragments that are sent, encoded and checked at once.
        shards: What each node holds, in the order of ``nodes``.
    """

    epoch: _Count
    tick: _Count
    step: int
    nodes: tuple[str, ...]
    parities: int
    chunk: _Size
    shards: tuple[tuple[Piece, ...], ...]


class _Opening(msgspec.Struct, tag=True, frozen=True):
    fit: int


class Join(_Opening, frozen=True):
    """A member to its leader: both talk from here on."""


class Offer(_Opening, frozen=True):
    """Fragment ``index`` of ``stripe`` follows, chunk by chunk: data to a hub, or a parity."""

    epoch: int
    stripe: int
    index: int


class Ask(_Opening, frozen=True):
    """Which generations are kept? Answered by `Kept`."""


class Describe(_Opening, frozen=True):
    """Answered by `Described` with all digests, or `Refused`."""

    epoch: int


class Read(_Opening, frozen=True):
    """Send your fragment of ``stripe``: the chunks from ``first`` on, ``stop`` not among them."""

    epoch: int
    stripe: int
    first: _Count
    stop: _Count


class Rebuild(_Opening, frozen=True):
    """Compute fragment ``index`` of ``stripe`` from others, and send its chunks as of `Read`.

    ``lost`` are nodes not to be asked.
    """

    epoch: int
    stripe: int
    index: int
    first: _Count
    stop: _Count
    lost: tuple[str, ...]


Opening = Join | Offer | Ask | Describe | Read | Rebuild


class Chunk(msgspec.Struct, tag=True, frozen=True):
    """Chunk ``number`` of the fragment that this connection is for; its bytes are the payload.

    In an attempt upon a base they are the difference to it. Without any, this chunk and those that
    follow, ``count`` in all, do not differ.
    """

    number: int
    count: int = 1


class Stored(msgspec.Struct, tag=True, frozen=True):
    """A holder of a fragment to its hub: it is stored, all of it, and the digests agree."""


class Digests(msgspec.Struct, tag=True, frozen=True):
    """A fragment's holder to its hub: all is sent, or stored. The payload has its chunks' digests.

    Then the hub to all: its stripe is done. The payload has the digests of all its fragments.
    """


class Kept(msgspec.Struct, tag=True, frozen=True):
    """Generations kept whole, by epoch: what they are, as a digest that is equal on all nodes."""

    seals: dict[int, bytes]


class Described(msgspec.Struct, tag=True, frozen=True):
    """A generation; the payload has the digests of all its stripes, one after the other."""

    generation: Generation


class Refused(msgspec.Struct, tag=True, frozen=True):
    """What was asked for cannot be done."""

    why: str


class Holds(msgspec.Struct, tag=True, frozen=True):
    """A member's committed generations, tick to step, and what it keeps protected.

    Attributes:
        ticks: Generations that could be protected.
        kept: Epochs whose fragments are kept whole, with their ticks.
        protected: The newest of them of which it is known that all kept it.
        epoch: The newest epoch that was heard of.
        address: Where the member listens: host and port.
    """

    ticks: dict[int, int]
    kept: dict[int, int]
    protected: int
    epoch: Annotated[int, msgspec.Meta(ge=-1, le=1 << 62)]
    address: tuple[str, int]


class Propose(msgspec.Struct, tag=True, frozen=True):
    """The leader: hold ``tick`` unchanged. Of what is kept only epoch ``base`` is needed.

    Where generations follow each other too fast, it is one that is still to come.
    """

    epoch: _Count
    tick: int
    base: int


class Pinned(msgspec.Struct, tag=True, frozen=True):
    """A member holds what was proposed.

    ``base`` is the seal of what it keeps of the proposal's base, if the differences to that are
    likely to be few; empty otherwise.
    """

    epoch: int
    step: int
    pieces: tuple[Piece, ...]
    base: bytes


class Go(msgspec.Struct, tag=True, frozen=True):
    """The leader: protect it; everybody listens at ``addresses``, in the group's order.

    ``upon_base``: what travels are differences to the proposal's base.
    """

    generation: Generation
    addresses: tuple[tuple[str, int], ...]
    upon_base: bool


class Complete(msgspec.Struct, tag=True, frozen=True):
    """A member stored all that it should, and knows that all hubs are done."""

    epoch: int


class Failed(msgspec.Struct, tag=True, frozen=True):
    """A member cannot go on with this epoch; ``gone``: it has newer generations than that."""

    epoch: int
    why: str
    gone: bool = False


class Protected(msgspec.Struct, tag=True, frozen=True):
    """The leader: all members are complete. What is older is needed no more."""

    epoch: int


class Void(msgspec.Struct, tag=True, frozen=True):
    """The leader: the attempt is given up."""

    epoch: int
    why: str = ""
    """Empty where the next one follows at once."""


class Lacks(msgspec.Struct, tag=True, frozen=True):
    """The leader: these members went away; until they are back nothing newer is protected."""

    nodes: tuple[str, ...]


FromMember = Holds | Pinned | Complete | Failed
FromLeader = Propose | Go | Protected | Void | Lacks
Message = Opening | Chunk | Stored | Digests | Kept | Described | Refused | FromMember | FromLeader
DECODER: Final[msgspec.msgpack.Decoder[Message]] = msgspec.msgpack.Decoder(Message)
