"""What trainer and SMP say to each other: msgpack structs, one a datagram.

Every request gets exactly one reply: its own kind, or `Failure`.
"""

from __future__ import annotations

from typing import Annotated, Final

import msgspec

from mnemo.config.kinds import without_password
from mnemo.errors import ProtocolError

PROTOCOL: Final = 2
"""To be raised with any change of a message: a snapshot process outlives an upgrade by
`snapshot.keep_alive`. A test knows when."""

Count = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
"""A number that fits the segment header: ticks, steps, ranks, sizes in bytes."""
Seconds = Annotated[float, msgspec.Meta(ge=0)]
Share = Annotated[float, msgspec.Meta(ge=0)]


class Message(msgspec.Struct, tag=True, frozen=True, omit_defaults=True):
    """Base of all messages."""


class Challenge(Message, frozen=True):
    """The server speaks first."""

    nonce: bytes
    protocol: int = PROTOCOL


class Hello(Message, frozen=True):
    """The client's proof, and its own challenge."""

    nonce: bytes
    proof: bytes


class Welcome(Message, frozen=True):
    """The server's proof. From here on requests are served."""

    proof: bytes
    pid: int


class Failure(Message, frozen=True):
    """A request was refused. ``kind`` is the class name of an error in `mnemo.errors`."""

    kind: str
    text: str


class Done(Message, frozen=True):
    """A request without an answer of its own was carried out."""


class PersistSettings(msgspec.Struct, frozen=True, omit_defaults=True):
    """The persistent tier: URL, seconds between checkpoints, how many are kept."""

    url: str
    every_s: Seconds
    keep: Count
    node: str = ""
    """Where there are several nodes, which of them: each stores its own ranks' parts."""

    @property
    def shown(self) -> str:
        """The URL without user and password, for messages."""
        return without_password(self.url)


def node_name(number: int) -> str:
    """What the ``number``-th node of a run is called."""
    return f"node-{number}"


class ProtectSettings(msgspec.Struct, frozen=True, omit_defaults=True):
    """Protection over several nodes: who this one is, the groups, and where its group listens."""

    node: str
    groups: tuple[tuple[str, ...], ...]
    """Names of the nodes of each group, in an order that is the same everywhere."""
    parities: Annotated[int, msgspec.Meta(ge=1, le=255)]
    addresses: dict[str, tuple[str, int]]
    """Host and port of each node of this one's group, itself included, and of the leader of all."""
    bytes_per_s: Annotated[float, msgspec.Meta(gt=0)] | None = None
    """Most that this node sends of fragments; None: `mnemo.protect.neighbours.default_rate`."""

    @property
    def group(self) -> tuple[str, ...]:
        """This node's."""
        return next((group for group in self.groups if self.node in group), ())


class Listen(Message, frozen=True):
    """Other nodes will want to connect: begin to listen. See `mnemo.transport.address.listen`.

    Asked before `Join`, which has to know where the others do. An SMP that listens elsewhere than
    is asked for listens anew.
    """

    node: str
    interface: str = ""
    ports: str = ""


class Listening(Message, frozen=True):
    """Where other nodes connect."""

    host: str
    port: int


class Join(Message, frozen=True):
    """A trainer takes its place. ``fit`` counts the trainings of one process, from 0.

    A trainer that outlived an earlier SMP sends its board's descriptor along, so that all ranks go
    on with the same one.
    """

    fit: Count
    rank: Count
    members: Annotated[int, msgspec.Meta(ge=1, le=65536)]
    """Ranks on this node."""
    keep_alive_s: Seconds
    persist: PersistSettings | None = None
    protect: ProtectSettings | None = None


class Joined(Message, frozen=True):
    """Carries the board's descriptor."""

    newest: Generation | None


class Generation(msgspec.Struct, frozen=True):
    """A committed generation."""

    tick: int
    step: int


class Recall(Message, frozen=True):
    """Have what other nodes keep of this one brought back, if it has lost it; ask until it is over.

    The other nodes' ranks have joined by then, so that whoever does not answer is lost.
    """


class Recalled(Message, frozen=True):
    """How far it is, in bytes."""

    over: bool
    kept: bool = False
    """Whether there is a committed generation here."""
    done: int = 0
    total: int = 0
    failure: str = ""
    """Why what other nodes keep of this one cannot come back; empty if it can, or is nothing."""
    lost: bool = False
    """It never can: more nodes were lost than there are parities."""
    unreachable: tuple[str, ...] = ()
    """In words: nodes of the group that this one cannot connect to."""


class Reserve(Message, frozen=True):
    """Are segments of ``size`` bytes to be had? Asked before training starts.

    Attributes:
        size: Of one rank's segment.
        buffers: Segments of one rank.
        parities: What the node keeps for others, over the size of one generation of its own.
    """

    size: Count
    buffers: Count
    parities: Share = 0.0


class Begin(Message, frozen=True):
    """Ask for a segment to write generation ``tick`` into. Waits until one is free."""

    tick: Count
    step: Count
    size: Count
    skipped: Count = 0
    """Snapshots that this rank has given up for want of a buffer since it last asked."""


class Granted(Message, frozen=True):
    """The segment to write. Its descriptor comes along."""

    index: int
    live: tuple[int, ...]
    """All segments that this rank has; it lets go of others."""
    shard: bool
    """False once replicas have been seen to differ: copy everything from the next one on."""


class Seal(Message, frozen=True):
    """Segment ``index`` is complete."""

    index: Count
    tick: Count


class Sealed(Message, frozen=True):
    """Acknowledges a seal; tells the newest generation that all members have sealed."""

    committed: Generation | None
    differ: str = ""
    """Where replicas were found to differ: rank and tensor; empty if they agree."""
    not_stored: str = ""
    """Why the newest generation that was to be persisted could not be; empty if it was."""
    not_protected: str = ""
    """Why nothing newer is being protected; empty if it is, or nothing should be."""


class Drop(Message, frozen=True):
    """Generation ``tick`` will not be completed by this rank."""

    tick: Count


class Fetch(Message, frozen=True):
    """Ask for the newest committed generation, older than tick ``below`` if that is not 0.

    It stays unchanged until the next `Fetch` of this connection, or its end.
    """

    below: Count = 0
    fit: Count | None = None
    """For tools, which join no fit: whose generation."""


class Fetched(Message, frozen=True):
    """One read-only descriptor a member, in rank order."""

    generation: Generation | None


class Resume(Message, frozen=True):
    """Training goes on from ``tick``: what this rank sealed later is void. -1: from nothing."""

    tick: Annotated[int, msgspec.Meta(ge=-1, le=2**63 - 1)]


class Adopt(Message, frozen=True):
    """Segments (their descriptors come along) that outlived an earlier SMP."""

    indexes: tuple[Count, ...]


class KeepLedger(Message, frozen=True):
    """Hold this rank's ledger (`mnemo.smp.ledger`), whose descriptor comes along, for a successor.

    In place of the one held before. It is given up where a training begins anew, or is over.
    """


class FetchLedger(Message, frozen=True):
    """Ask for the ledger of a rank that was lost."""

    fit: Count
    rank: Count


class Ledgers(Message, frozen=True):
    """Carries the ledger's descriptor, if there is one."""


class Finish(Message, frozen=True):
    """The fit ended well here. Its newest generation stays until the program has, too: `Over`.

    The rank keeps its place meanwhile.
    """


class Over(Message, frozen=True):
    """The program ended well: what finished is not wanted again, and its memory is given back.

    A rank speaks for itself, and counts for nothing where a launcher attends, which knows more: how
    each process exited. Whoever is no rank speaks for all.
    """


class Leave(Message, frozen=True):
    """The fit ended here; ``finished`` says that nobody will want to resume it."""

    finished: bool


class Flush(Message, frozen=True):
    """Persist a committed generation now, and answer when that is done."""

    fit: Count
    tick: Count | None = None
    """Which one; None for the newest."""


class Flushed(Message, frozen=True):
    """Step of the checkpoint that was written last, or -1."""

    step: int
    failure: str = ""
    """Why none could be written this time; empty if it was, or nothing was asked for by name."""


class Look(Message, frozen=True):
    """What is kept of the newest training that has not ended well? Asked when no rank is left."""


class Looked(Message, frozen=True):
    """That training, and how its ranks had it stored and protected."""

    fit: int = -1
    """-1: there is none."""
    steps: dict[int, int] = {}
    """Step by tick, of all committed generations."""
    persist: PersistSettings | None = None
    protect: ProtectSettings | None = None
    lives: dict[int, str] = {}
    """By tick, the life that took it, where that is known: the same on all ranks."""


class Status(Message, frozen=True):
    """Ask how things are."""


class StatusReply(Message, frozen=True):
    """JSON: see `mnemo.smp.server.Server.status`."""

    body: bytes


class Attend(Message, frozen=True):
    """The launcher of the ranks is here: stay as long as this connection does."""


class Shutdown(Message, frozen=True):
    """Give all memory back and exit (``mnemo clean``). Refused under a training unless forced."""

    force: bool = False


class Rollback(Message, frozen=True):
    """Forget generations newer than ``step``. Refused under a training."""

    step: Count


Request = (
    Hello
    | Listen
    | Join
    | Recall
    | Reserve
    | Begin
    | Seal
    | Drop
    | Fetch
    | Resume
    | Adopt
    | KeepLedger
    | FetchLedger
    | Finish
    | Over
    | Leave
    | Flush
    | Look
    | Status
    | Attend
    | Shutdown
    | Rollback
)
Reply = (
    Challenge
    | Welcome
    | Failure
    | Done
    | Listening
    | Joined
    | Recalled
    | Granted
    | Sealed
    | Fetched
    | Ledgers
    | Flushed
    | Looked
    | StatusReply
)

_encoder = msgspec.msgpack.Encoder()
_requests = msgspec.msgpack.Decoder(Request)
_replies = msgspec.msgpack.Decoder(Reply)
_UNREADABLE: Final = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
"""What msgspec raises at bytes that are no message, text that is no UTF-8, nesting without end."""


def encode(message: Message) -> bytes:
    """Serialise a message."""
    return _encoder.encode(message)


def decode_request(data: bytes) -> Request:
    """Parse what a client sent.

    Raises:
        ProtocolError: Not a request.
    """
    try:
        return _requests.decode(data)  # type: ignore[no-any-return]
    except _UNREADABLE as error:
        raise ProtocolError(f"not a request: {error}") from error


def decode_reply(data: bytes) -> Reply:
    """Parse what the server sent.

    Raises:
        ProtocolError: Not a reply.
    """
    try:
        return _replies.decode(data)  # type: ignore[no-any-return]
    except _UNREADABLE as error:
        raise ProtocolError(f"not a reply: {error}") from error
