"""What stands in the Store, and the seal that each record carries.

Every value is 32 bytes of MAC, under the run's secret and over the key that it stands at, and a
msgpack record. So no record can be made without the secret, or be moved to another key.
"""

from __future__ import annotations

import hmac
from collections.abc import Sequence
from typing import Final, TypeVar

import msgspec

from mnemo.errors import MembershipRecordError
from mnemo.transport.auth import mac

_MAC_BYTES: Final = 32
_PURPOSE: Final = "mnemo-membership-1"

HEAD: Final = "head"
MOVED: Final = "moved"
"""In a Store that the run has left: the `Ballot` of the one where it was then."""


class Ballot(msgspec.Struct, frozen=True, order=True, array_like=True):
    """Which Store: each move of the Store makes a higher one.

    Attributes:
        term: 0 for the first Store of a run.
        place: Where that Store is; empty if it is an arbiter's.
        maker: Who wrote its first record, and which one that was for it: no two Stores have the
            same ballot, not even two at one place.
    """

    term: int
    place: str
    maker: str = ""


def joined_key(ballot: Ballot) -> str:
    """Where a counter stands: how many slots have been taken.

    All that agents write of themselves stands under the Store's ballot. Whoever still takes part
    in the Store that was at that place before writes where nobody reads.
    """
    return f"{ballot.maker}/joined"


def hello_key(ballot: Ballot, slot: int) -> str:
    """Where the `Hello` of ``slot`` stands."""
    return f"{ballot.maker}/hello/{slot}"


def beat_key(ballot: Ballot, slot: int) -> str:
    """Where the `Beat` of ``slot`` stands."""
    return f"{ballot.maker}/beat/{slot}"


def state_key(ballot: Ballot, slot: int, serial: int) -> str:
    """Where the ``serial``-th `State` that the node of ``slot`` wrote stands, for ever."""
    return f"{ballot.maker}/state/{slot}/{serial}"


KEEPS: Final = "keeps rank "
"""Begins a label: the first rank whose state this node's memory has, from an earlier launch."""


class Member(msgspec.Struct, frozen=True, array_like=True):
    """A node's agent, from its start to its end.

    Attributes:
        node: The node's name, the same for every agent that is started there.
        incarnation: Tells one of them from the next.
        address: Where the launcher of other nodes reaches it.
        store: Where its agent would host a Store; empty if it cannot.
        ranks: Ranks that run there.
        labels: Anything else that others have to know.
    """

    node: str
    incarnation: str
    address: str = ""
    store: str = ""
    ranks: int = 1
    labels: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """What tells it from every other agent of the run."""
        return f"{self.node}/{self.incarnation}"


def were_lost(members: Sequence[Member]) -> str:
    """That they were, in words; empty for none."""
    addresses = ", ".join(member.address for member in members)
    if len(members) > 1:
        return f"nodes {addresses} were lost"
    return f"node {addresses} was lost" if members else ""


class Epoch(msgspec.Struct, frozen=True, array_like=True):
    """One membership.

    Attributes:
        number: Grows by one from each to the next; has one membership only, ever.
        ballot: The Store that it was proposed in.
        attempt: Which proposal of that Store it was.
        members: By node rank.
        anchor: The key of the member that hosted that Store, which makes half of them a quorum;
            empty if none of them does.
        lost: Members of the epoch before that are none of this one's.
        hollow: It may have been decided in a Store that was lost, and is decided again for that
            reason alone: nobody runs under it.
    """

    number: int
    ballot: Ballot
    attempt: int
    members: tuple[Member, ...]
    anchor: str = ""
    lost: tuple[Member, ...] = ()
    hollow: bool = False

    def rank_of(self, key: str) -> int | None:
        """The node rank of the member ``key``; None if it is none."""
        return next((rank for rank, each in enumerate(self.members) if each.key == key), None)

    @property
    def world_size(self) -> int:
        """Ranks on all nodes."""
        return sum(member.ranks for member in self.members)


class State(msgspec.Struct, frozen=True, array_like=True):
    """What has been agreed, and what is about to be.

    Attributes:
        attempt: Proposals made in this Store so far.
        committed: The newest membership that was decided.
        proposed: The next, as long as it is not decided. Nobody runs meanwhile.
        over: ``committed`` has ended, and there are not enough nodes for the next.
        lost: Node ranks of its members that are lost, then.
    """

    attempt: int = 0
    committed: Epoch | None = None
    proposed: Epoch | None = None
    over: bool = False
    lost: tuple[int, ...] = ()


class Head(msgspec.Struct, frozen=True, array_like=True):
    """The one record that is changed, by compare-and-set.

    Attributes:
        ballot: Which Store this is.
        pulse: Grows with every change; the coordinator's heartbeat.
        round: Grows with every change as long as a quorum is in contact with this Store.
        granted: A quorum of ``committed`` had read this round, or a later one, and thereby
            promised to stay with this Store for a while (see `mnemo.membership.lease`).
        state: The key of the `State`; empty in a new Store.
    """

    ballot: Ballot
    pulse: int = 0
    round: int = 0
    granted: int = 0
    state: str = ""


class Hello(msgspec.Struct, frozen=True, array_like=True):
    """A node takes part in a Store.

    Attributes:
        member: Who.
        bound: It has agreed to something before, so it takes part in no lower ballot any more.
        committed: The newest membership that it knows to be decided.
        accepted: The newest proposal after that which it has agreed to.
    """

    member: Member
    bound: bool = False
    committed: Epoch | None = None
    accepted: Epoch | None = None


class Beat(msgspec.Struct, frozen=True, array_like=True):
    """A node lives.

    Attributes:
        number: Grows with each.
        echo: The newest round that it has read.
        acked: The attempt that it agrees to: its workers have stopped. 0 for none.
        ended: The epoch that cannot go on as far as it knows; 0 for none.
        lost: Keys of members that the operator vouches are dead.
    """

    number: int
    echo: int = 0
    acked: int = 0
    ended: int = 0
    lost: tuple[str, ...] = ()


Record = TypeVar("Record", bound=msgspec.Struct)


class Seal:
    """Makes and checks the MACs of one run's records."""

    def __init__(self, secret: bytes, run_id: str) -> None:
        self._secret = secret
        self._run_id = run_id.encode()

    def wrap(self, key: str, record: msgspec.Struct) -> bytes:
        """What to set at ``key``."""
        payload = msgspec.msgpack.encode(record)
        return mac(self._secret, _PURPOSE, self._run_id, key.encode(), payload) + payload

    def unwrap(self, key: str, value: bytes, kind: type[Record]) -> Record:
        """What was set at ``key``.

        Raises:
            MembershipRecordError: It was not made with this run's secret for this key.
        """
        given, payload = value[:_MAC_BYTES], value[_MAC_BYTES:]
        right = mac(self._secret, _PURPOSE, self._run_id, key.encode(), payload)
        if not hmac.compare_digest(given, right):
            raise MembershipRecordError(
                f"the Store's record {key} ({len(value)} bytes) was not made with this run's "
                "secret: use the same MNEMO_SECRET_FILE and run id on all nodes, and a Store "
                "that no other job uses"
            )
        try:
            return msgspec.msgpack.decode(payload, type=kind)
        except msgspec.DecodeError as error:
            raise MembershipRecordError(
                f"the Store's record {key} cannot be read ({error}): use the same version of "
                "mnemo on all nodes"
            ) from error
