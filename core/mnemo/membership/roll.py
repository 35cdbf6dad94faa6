"""All nodes that take part in a Store, as one of them sees them."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, field

from mnemo.errors import MembershipRecordError
from mnemo.membership.records import (
    Ballot,
    Beat,
    Hello,
    Member,
    Seal,
    beat_key,
    hello_key,
    joined_key,
)
from mnemo.membership.store import Answer, Get, Op


@dataclass(slots=True)
class Moment:
    """The time of the last answer, in seconds of the node's own monotonic clock."""

    now: float


@dataclass(slots=True)
class Seen:
    """One node.

    Attributes:
        hello: What it said when it came.
        beat: Its newest.
        since: When that was first seen.
        came: When the node was.
    """

    hello: Hello
    beat: Beat
    since: float
    came: float


@dataclass(slots=True)
class Roll:
    """Who has joined one Store, and when each was last seen to live.

    A node counts as lost when its beat has not changed for ``node_loss_s`` by this node's clock.
    """

    seal: Seal
    ballot: Ballot
    moment: Moment
    node_loss_s: float
    _seen: dict[int, Seen] = field(default_factory=dict)
    _slots: int = 0
    _lost: set[str] = field(default_factory=set)

    def pardon(self) -> None:
        """This node was not in touch itself: nobody's silence so far says anything."""
        for seen in self._seen.values():
            seen.since = self.moment.now

    def refresh(self, place: str) -> Generator[Op, Answer, None]:
        """Read what is new: in one operation, unless somebody has come."""
        (count,) = yield from self._read(
            place, (joined_key(self.ballot),), range(1, self._slots + 1)
        )
        newcomers = range(self._slots + 1, int(count or 0) + 1)
        if newcomers:
            self._slots = newcomers[-1]
            yield from self._read(place, (), newcomers)

    def _read(
        self, place: str, more: tuple[str, ...], slots: range
    ) -> Generator[Op, Answer, list[bytes | None]]:
        """Hear those in ``slots``; what stands at the keys ``more``."""
        unknown = [slot for slot in slots if slot not in self._seen]
        beats = [beat_key(self.ballot, slot) for slot in slots]
        keys = (*more, *beats, *(hello_key(self.ballot, slot) for slot in unknown))
        answer = yield Get(place, keys)
        assert isinstance(answer, tuple)
        values = dict(zip(keys, answer, strict=True))
        for slot in slots:
            self._hear(slot, values)
        return [values[key] for key in more]

    def _hear(self, slot: int, values: dict[str, bytes | None]) -> None:
        at, come = beat_key(self.ballot, slot), hello_key(self.ballot, slot)
        said, known = values[at], self._seen.get(slot)
        if said is None:
            return
        try:
            beat = self.seal.unwrap(at, said, Beat)
            if known is None:
                hello = values[come]
                if hello is None:
                    return
                opened = self.seal.unwrap(come, hello, Hello)
                self._seen[slot] = Seen(opened, beat, self.moment.now, self.moment.now)
            elif beat.number > known.beat.number:
                known.beat, known.since = beat, self.moment.now
        except MembershipRecordError:
            return  # a stranger's: as if it were not there
        self._lost.update(beat.lost)

    @property
    def lost(self) -> frozenset[str]:
        """Keys of the members that the operator vouches are dead."""
        return frozenset(self._lost)

    def is_quiet(self, key: str) -> bool:
        """Whether ``key`` surely no longer runs what it ran when its newest beat was first seen."""
        seen = self._current().get(key)
        return key in self._lost or (seen is not None and not self._lives(seen))

    def living(self) -> dict[str, Member]:
        """Those that are not lost, by key, in the order in which they joined."""
        return {
            key: seen.hello.member
            for key, seen in self._current().items()
            if self._lives(seen) and key not in self._lost
        }

    @property
    def count(self) -> int:
        """How many have ever joined, if something is known of all; else 0."""
        return self._slots if len(self._seen) == self._slots else 0

    def has_settled(self, seconds: float) -> bool:
        """Whether nobody has come for so long."""
        newest = max((seen.came for seen in self._seen.values()), default=self.moment.now)
        return self.moment.now - newest >= seconds

    def beats(self) -> dict[str, Beat]:
        """The newest beat of each, by key."""
        return {key: seen.beat for key, seen in self._current().items()}

    def hellos(self) -> list[Hello]:
        """What each said when it came."""
        return [seen.hello for seen in self._current().values()]

    def _lives(self, seen: Seen) -> bool:
        return self.moment.now - seen.since < self.node_loss_s

    def _current(self) -> dict[str, Seen]:
        """By key. Of several slots that a node took since it heard no answer, the last counts."""
        return {seen.hello.member.key: seen for _, seen in sorted(self._seen.items())}
