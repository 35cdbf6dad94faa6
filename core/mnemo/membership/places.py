"""Where Stores may be: looked at in turns, opened, and told where the run has gone."""

from __future__ import annotations

from collections.abc import Generator
from typing import Final

from mnemo.errors import StoreLostError
from mnemo.membership.records import HEAD, MOVED, Ballot, Epoch, Head, Member, Seal
from mnemo.membership.roll import Moment
from mnemo.membership.rules import Rules
from mnemo.membership.seat import Seat, Turn
from mnemo.membership.store import Answer, CompareSet, Get, Op, Set

_LOOKED_AT: Final = 4
"""Places where a node looks for a Store in one turn."""


class Places:
    """All that one agent knows of.

    Args:
        me: The agent.
        seal: Of the run.
        rules: Of the run.
        places: First that of the run's first Store, or the arbiter's.
        moment: The time.
    """

    def __init__(
        self, me: Member, seal: Seal, rules: Rules, places: tuple[str, ...], moment: Moment
    ) -> None:
        self._me = me
        self._seal = seal
        self._rules = rules
        self._moment = moment
        self._first = places[0]
        self._known = dict.fromkeys(places)
        """The newest last."""
        self._looked = 0
        self._term = -1
        """The highest of a Store that was seen."""
        self._made = 0
        self._redirect_at = moment.now

    def __str__(self) -> str:
        more = ", …" * (len(self._known) > _LOOKED_AT)
        return f"{', '.join([*self._known][:_LOOKED_AT])}{more}"

    def learn(self, *epochs: Epoch | None) -> None:
        """Members may host Stores."""
        for epoch in epochs:
            for member in reversed(epoch.members if epoch else ()):
                if member.store:
                    self._known.setdefault(member.store)

    def look(
        self, seat: Seat | None, least: Ballot | None
    ) -> Generator[Op, Answer, tuple[Ballot, str] | None]:
        """The Store of the highest ballot that is found in a turn, if it is above ``least``.

        Args:
            seat: In the Store that the agent takes part in.
            least: Its ballot, as long as it stays there unless it finds a higher one.
        """
        now_in, found = seat.ballot if seat else None, None
        for place in self._next():
            try:
                head = yield from self._head_at(place, seat)
            except StoreLostError:
                continue
            if head is not None and head.ballot != now_in:
                self._term = max(self._term, head.ballot.term)
                if least is None or head.ballot > least:
                    least, found = head.ballot, (head.ballot, place)
        return found

    def open_next(self) -> Generator[Op, Answer, Ballot | None]:
        """Have the Store that this agent hosts begin; its ballot, if it is this agent's."""
        place = self._me.store
        ballot = self._new_ballot(self._term + 1, place)
        head = yield from self._open(place, ballot)
        return ballot if head is not None and head.ballot == ballot else None

    def redirect(self, seat: Seat, running: Epoch | None) -> Turn:
        """One member looks at times whether somebody comes to where the run began."""
        ballot = seat.ballot
        members = running.members if running and ballot.term else ()
        others = [member for member in members if member.store != ballot.place] or members
        if others and others[-1].key == self._me.key and self._moment.now >= self._redirect_at:
            self._redirect_at = self._moment.now + 2 * self._rules.move_s
            yield from self._head_at(self._first, seat)

    def _next(self) -> tuple[str, ...]:
        """Some of them; others the next time."""
        places = tuple(reversed(self._known))
        at = self._looked % len(places)
        self._looked = at + _LOOKED_AT
        return (places[at:] + places[:at])[:_LOOKED_AT]

    def _head_at(self, place: str, seat: Seat | None) -> Generator[Op, Answer, Head | None]:
        """What stands in the Store at ``place``; the first of the run begins to be one here.

        One that the run has left is told where the run is now, for those that come there.
        """
        answer = yield Get(place, (HEAD, MOVED))
        assert isinstance(answer, tuple)
        raw, moved = answer
        if moved is not None:
            there = self._seal.unwrap(MOVED, moved, Ballot)
            self._known.setdefault(there.place)
            if seat and seat.state and there < seat.ballot:
                yield Set(place, MOVED, self._seal.wrap(MOVED, seat.ballot))
            return None
        if raw is None and seat is None and place == self._first:
            ballot = self._new_ballot(0, "" if self._rules.arbiter else place)
            return (yield from self._open(place, ballot))
        head = self._seal.unwrap(HEAD, raw, Head) if raw else None
        if head and seat and seat.state and head.ballot < seat.ballot:
            yield Set(place, MOVED, self._seal.wrap(MOVED, seat.ballot))
        return head

    def _open(self, place: str, ballot: Ballot) -> Generator[Op, Answer, Head | None]:
        there = yield CompareSet(place, HEAD, None, self._seal.wrap(HEAD, Head(ballot)))
        assert there is None or isinstance(there, bytes)
        return self._seal.unwrap(HEAD, there, Head) if there else None

    def _new_ballot(self, term: int, place: str) -> Ballot:
        self._made += 1
        return Ballot(term, place, f"{self._me.key}/{self._made}")
