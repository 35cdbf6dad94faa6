"""One node's part in one Store: its slot there, what it says, what it reads, what it writes."""

from __future__ import annotations

from collections.abc import Generator
from typing import Final

import msgspec

from mnemo.errors import StoreLostError
from mnemo.membership.coordinator import decide, follow_up
from mnemo.membership.lease import NEVER, Lease
from mnemo.membership.records import (
    HEAD,
    Ballot,
    Beat,
    Head,
    Hello,
    Member,
    Seal,
    State,
    beat_key,
    hello_key,
    joined_key,
    state_key,
)
from mnemo.membership.roll import Moment, Roll
from mnemo.membership.rules import Rules
from mnemo.membership.store import Add, Answer, CompareSet, Get, Op, Set

Turn = Generator[Op, Answer, None]
_DEPUTIES: Final = 3
"""Members that always know who lives, so that one acts at once when the one before it is lost."""


class Seat:
    """What one agent has in the Store of ``ballot`` at ``place``.

    Attributes:
        place: Where the Store is.
        ballot: Which one it is.
        state: What stood in it in the last turn; None if nothing did.
        acked: The attempt that this node agrees to; its next beat says so.
        echo: The round that this node has read, as its next beat says.
        lease: See there.
        changed: Whether the last turn read another state than the one before.
        head_since: When this node first read the head that it last read.
        is_gone: There was nothing of this Store, or another one, where it was.
        answers_in: Seconds that it last took the Store to say what stands in the head.
    """

    def __init__(
        self, place: str, ballot: Ballot, me: Member, seal: Seal, rules: Rules, moment: Moment
    ) -> None:
        self.place = place
        self.ballot = ballot
        self.state: State | None = None
        self.acked = 0
        self.echo = 0
        self.lease = Lease()
        self.changed = False
        self.head_since = moment.now
        self.is_gone = False
        self.answers_in = 0.0
        self._me = me
        self._seal = seal
        self._rules = rules
        self._moment = moment
        self._roll = Roll(seal, ballot, moment, rules.node_loss_s)
        self._slot = 0
        self._beat = Beat(0)
        self._beat_raw: bytes | None = None
        self._head: Head | None = None
        self._head_raw: bytes | None = None
        self._wrote = b""
        self._serial = 0
        self._looked_at = NEVER
        self._in_touch = moment.now

    # --- what it says -------------------------------------------------------------------------

    @property
    def has_looked(self) -> bool:
        """Whether `living` is as it was a moment ago."""
        return self._moment.now - self._looked_at < self._rules.node_loss_s

    def living(self) -> dict[str, Member]:
        """Agents that are not lost, by key, as far as this one has looked."""
        return self._roll.living()

    @property
    def joined(self) -> tuple[str, int]:
        """Where it stands how many have joined, and that number if all are known; else 0."""
        return joined_key(self.ballot), self._roll.count

    @property
    def missing(self) -> tuple[Member, ...]:
        """Members without which the others have to go on, as far as this one knows."""
        state = self.state or State()
        if state.proposed is not None:
            return state.proposed.lost
        return (
            tuple(state.committed.members[rank] for rank in state.lost) if state.committed else ()
        )

    @property
    def silent(self) -> str:
        """What does not answer any more, in words, where something has to."""
        if lost := [member.address for member in self.missing]:
            return f"{', '.join(lost)} {'does' if len(lost) == 1 else 'do'} not answer any more"
        if self._moment.now - self.head_since > self._rules.fence_s / 2:
            return f"the Store at {self.place} does not answer any more"
        return "a node does not answer any more"

    def say_hello(self, hello: Hello) -> Turn:
        """Take a slot, if it has none yet."""
        if self._slot:
            return
        slot = yield Add(self.place, joined_key(self.ballot))
        assert isinstance(slot, int)
        self._beat = Beat(1)
        key = beat_key(self.ballot, slot)
        self._beat_raw = self._seal.wrap(key, self._beat)
        yield CompareSet(self.place, key, None, self._beat_raw)
        key = hello_key(self.ballot, slot)
        yield Set(self.place, key, self._seal.wrap(key, hello))
        self._slot = slot

    def say_alive(self, ended: int, lost: tuple[str, ...]) -> Turn:
        """Set the next beat.

        By compare-and-set: an older one that comes late must not take its place.

        Args:
            ended: See `Beat.ended`.
            lost: See `Beat.lost`.
        """
        key = beat_key(self.ballot, self._slot)
        while True:
            beat = Beat(self._beat.number + 1, self.echo, self.acked, ended, lost)
            raw = self._seal.wrap(key, beat)
            there = yield CompareSet(self.place, key, self._beat_raw, raw)
            if there is None:
                self.is_gone = True
                raise StoreLostError(f"the Store at {self.place} has forgotten {self._me.key}")
            assert isinstance(there, bytes)
            self._beat_raw, self._beat = there, self._seal.unwrap(key, there, Beat)
            if there == raw:
                return

    # --- what it reads ------------------------------------------------------------------------

    def read(self) -> Generator[Op, Answer, Head]:
        """The head; `state` is what it says.

        Raises:
            StoreLostError: Another Store is at that place by now.
        """
        asked = self._moment.now
        raw = yield from self._get(HEAD)
        self.answers_in = self._moment.now - asked
        head = self._seal.unwrap(HEAD, raw, Head) if raw else None
        if head is None or head.ballot != self.ballot:
            self.is_gone = True
            raise StoreLostError(f"the Store at {self.place} is another one by now")
        self.changed = self._head is None or head.state != self._head.state
        if self.changed and head.state:
            said = yield from self._get(head.state)
            if said is None:
                raise StoreLostError(f"the Store at {self.place} has lost {head.state}")
            self.state = self._seal.unwrap(head.state, said, State)
        if self._moment.now - self._in_touch > self._rules.node_loss_s / 2:
            self._roll.pardon()
        self._in_touch = self._moment.now
        if raw != self._head_raw:
            self.head_since = self._moment.now
        self._head, self._head_raw = head, raw
        return head

    def _get(self, key: str) -> Generator[Op, Answer, bytes | None]:
        answer = yield Get(self.place, (key,))
        assert isinstance(answer, tuple)
        return answer[0]

    # --- what it writes -----------------------------------------------------------------------

    def lead(self, head: Head) -> Turn:
        """If it is up to this node, write what follows ``head``, or at least that it is there."""
        line = self._line()
        silence = self._moment.now - self.head_since
        acts = line == 0 or self._head_raw == self._wrote
        patience = self._rules.node_loss_s * (1 + min(line // _DEPUTIES, _DEPUTIES))
        if acts or line < _DEPUTIES or silence > patience:
            yield from self._roll.refresh(self.place)
            self._looked_at = self._moment.now
            if acts or silence > self._rules.node_loss_s:
                yield from self._act(head)

    def _line(self) -> int:
        """How many would act before this node does: the Store's host, members, then the others."""
        host = self.ballot.place
        if host and self._me.store == host:
            return 0
        epoch = self.state.committed if self.state else None
        rank = epoch.rank_of(self._me.key) if epoch else None
        if rank is None:
            rank = len(epoch.members if epoch else ()) + self._slot - 1
        return rank + bool(host)

    def _act(self, head: Head) -> Turn:
        before = self.state
        after = decide(self._rules, self.ballot, before, self._roll)
        following = follow_up(self._rules, head, before, after or before, self._roll)
        if after is not None:
            self._serial += 1
            key = state_key(self.ballot, self._slot, self._serial)
            yield Set(self.place, key, self._seal.wrap(key, after))
            following = msgspec.structs.replace(following, state=key)
        wanted = self._seal.wrap(HEAD, following)
        there = yield CompareSet(self.place, HEAD, self._head_raw, wanted)
        self._wrote = wanted if there == wanted else b""
