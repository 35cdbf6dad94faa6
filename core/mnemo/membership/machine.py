"""One node's part in the membership: no I/O, no threads, no time of its own.

A *turn* is a generator of operations on Stores. Whoever drives the machine carries each out and
hands back its answer with the time; a test decides what happens between any two of them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from typing import Final

from mnemo.errors import StoreLostError
from mnemo.membership.lease import NEVER
from mnemo.membership.plan import heirs, is_launch
from mnemo.membership.records import (
    HEAD,
    MOVED,
    Ballot,
    Epoch,
    Head,
    Hello,
    Member,
    Seal,
    State,
    were_lost,
)
from mnemo.membership.roll import Moment
from mnemo.membership.rules import Rules
from mnemo.membership.seat import Seat, Turn
from mnemo.membership.store import Answer, CompareSet, Get, Host, Op, Set

_LOOKED_AT: Final = 4
"""Places where a node looks for a Store in one turn."""


class Machine:
    """Takes part for one agent.

    Args:
        me: The agent.
        seal: Of the run.
        rules: Of the run.
        places: Where a Store may be: first that of the run's first Store, or the arbiter's.
        now: Seconds of the node's monotonic clock.

    Attributes:
        me: The agent.
        running: The epoch that the workers may run under, until `run_until`; None if they must
            not run. When it goes, the workers have to be stopped, then `stopped` called.
        run_until: Instant at which the workers have to be stopped if nothing is heard until then.
        committed: The newest membership that is known to be decided.
    """

    def __init__(
        self, me: Member, seal: Seal, rules: Rules, places: tuple[str, ...], now: float
    ) -> None:
        self.me = me
        self.running: Epoch | None = None
        self.run_until = NEVER
        self.committed: Epoch | None = None
        self._seal = seal
        self._rules = rules
        self._moment = Moment(now)
        self._turn: Turn | None = None
        self._seat: Seat | None = None
        """In the Store that it takes part in."""
        self._is_bound = False
        """It has agreed to something, so that it may be part of a quorum: from then on it takes
        part in no Store of a lower ballot than it has before."""
        self._accepted: Epoch | None = None
        """The newest proposal that it agreed to, unless it was decided."""
        self._ended = 0
        """The newest epoch that nothing runs under any more here."""
        self._lost: tuple[str, ...] = ()
        self._has_workers = False
        self._held = now
        """Until then it takes part in no other Store."""
        self._hope = now
        """Until then the Store that it takes part in may come to something."""
        self._round = 0
        self._idle_since = now
        self._first = places[0]
        self._places = dict.fromkeys(places)
        """Where a Store may be, the newest last."""
        self._looked = 0
        self._term = -1
        self._redirect_at = now
        self._made = 0

    # --- for whoever drives it ----------------------------------------------------------------

    def begin(self, now: float) -> Op | None:
        """Begin a turn; what has to be done first."""
        self._turn = self._take_turn()
        return self.answer(None, now)

    def answer(self, answer: Answer | StoreLostError, now: float) -> Op | None:
        """Hand over what came of the last operation; the next one, or None: the turn is over.

        Raises:
            MembershipRecordError: The Store is not this run's.
        """
        assert self._turn is not None
        self.tick(now)
        try:
            if isinstance(answer, StoreLostError):
                return self._turn.throw(answer)
            return self._turn.send(answer)
        except StopIteration:
            self._turn = None
            return None

    def tick(self, now: float) -> None:
        """Time has passed; has to be called at `run_until`, too."""
        self._moment.now = now
        if self.running is not None and now >= self.run_until:
            self._end(self.running)

    def stopped(self, now: float) -> None:
        """All workers are dead."""
        self.tick(now)
        assert self.running is None
        self._has_workers = False

    def end_epoch(self, now: float) -> None:
        """The epoch cannot go on, for example since a worker failed: ask for the next."""
        self.tick(now)
        if self.running is not None:
            self._end(self.running)

    def confirm_lost(self, key: str) -> None:
        """The operator vouches that the agent ``key`` is dead, with all its workers."""
        self._lost = tuple(sorted({*self._lost, key}))

    @property
    def place(self) -> str:
        """Where the Store is that it takes part in; empty if there is none."""
        return self._seat.place if self._seat else ""

    @property
    def waits_for(self) -> str:
        """What it waits for, in words; empty while it runs."""
        now, seat = self._moment.now, self._seat
        if self.running is not None:
            return ""
        if seat is None:
            more = ", …" * (len(self._places) > _LOOKED_AT)
            return f"no Store answers at {', '.join([*self._places][:_LOOKED_AT])}{more}"
        if now - seat.head_since > self._rules.node_loss_s:
            gone = self._rules.arbiter and seat.is_gone
            return f"no Store {'of this run is left' if gone else 'answers'} at {seat.place}"
        if self._is_slow(seat):
            return f"the Store takes {seat.answers_in:.1f} s to answer: its link is too slow"
        here, nodes = seat.living(), self._rules.nodes
        if seat.has_looked and is_launch(self.committed, here) and len(here) < nodes:
            return f"{len(here)} of {nodes} nodes are here"
        if seat.state is not None and seat.state.over and now < self._hope:
            return f"{were_lost(seat.missing) or 'a member was lost'}, and nobody takes its place"
        if self.committed is not None and now >= self._held:
            return "too few members are here to decide"
        if self.is_spare:
            return "this node is a spare"
        return "the nodes agree"

    @property
    def is_spare(self) -> bool:
        """Whether others run, or may, and this node is not needed."""
        seat = self._seat
        if seat is None or self._moment.now - seat.head_since > self._rules.node_loss_s:
            return False
        over = seat.state is None or seat.state.over
        return self.committed is not None and not over and not self._is_in(self.committed)

    @property
    def silent(self) -> str:
        """What does not answer any more, in words, where `running` has just gone for that."""
        return self._seat.silent if self._seat else ""

    @property
    def is_stuck(self) -> bool:
        """Whether it waits for a quorum, or the operator's word (`confirm_lost`)."""
        return self._is_in(self.committed) and self.waits_for.startswith(("no Store", "too few"))

    @property
    def present(self) -> frozenset[str]:
        """Keys of the agents that take part, as far as this one has looked."""
        return frozenset(self._seat.living() if self._seat else ())

    @property
    def left(self) -> tuple[int, ...] | None:
        """Node ranks of the members of `committed` that are here, where no epoch can follow it.

        None where this agent has not looked just now, or too few are here to tell: the others may
        have decided something else.
        """
        seat, epoch = self._seat, self.committed
        if seat is None or epoch is None or self.is_stuck or not seat.has_looked:
            return None
        return tuple(rank for rank, m in enumerate(epoch.members) if m.key in self.present)

    @property
    def joined(self) -> tuple[str, int]:
        """See `mnemo.membership.seat.Seat.joined`."""
        return self._seat.joined if self._seat else ("", 0)

    @property
    def has_given_up(self) -> bool:
        """Whether it has waited for longer than `Rules.give_up_s`: save the state and exit."""
        waited = self._moment.now - self._idle_since
        return self.running is None and waited >= self._rules.give_up_s

    # --- a turn -------------------------------------------------------------------------------

    def _take_turn(self) -> Turn:
        if self._seat is not None:
            with contextlib.suppress(StoreLostError):  # time tells
                yield from self._follow(self._seat)
            if self._seat.is_gone and self._rules.arbiter and self.committed is None:
                self._seat = None  # it was of the launch before, whose last node has removed it
        if self._seat is None or (self._is_free and not self._rules.arbiter):
            yield from self._look()

    def _follow(self, seat: Seat) -> Turn:
        """Take part in the Store: beat first, then read.

        Whom it answers too slowly keeps silent until it does not, and so is lost for the others,
        who go on without: its lease would run out again and again.
        """
        if self._is_slow(seat):
            yield from seat.read()
            return
        yield from seat.say_hello(self._hello())
        start = self._moment.now
        yield from seat.say_alive(self._ended, self._lost)
        head = yield from seat.read()
        self._hear(seat, head)
        state = seat.state or State()
        self._know(state)
        since = start if self._rules.arbiter else seat.lease.read(start, head.round, head.granted)
        if state.proposed is not None or state.over:
            self._end(state.committed)
        elif state.committed is not None and state.committed.ballot == seat.ballot:
            self._run(state.committed, since + self._rules.fence_s)
        if self._agrees(state, seat):
            yield from seat.say_alive(self._ended, self._lost)
        yield from seat.lead(head)
        yield from self._redirect(seat.ballot)

    def _is_slow(self, seat: Seat) -> bool:
        return seat.answers_in > self._rules.slow_s

    def _hello(self) -> Hello:
        return Hello(self.me, self._is_bound, self.committed, self._accepted)

    def _hear(self, seat: Seat, head: Head) -> None:
        """What the Store's being there means for others."""
        patient = self._moment.now + self._rules.move_s
        if seat.changed or head.round > self._round:
            self._hope = patient
        self._round = head.round
        if head.round > seat.echo and not (seat.state and seat.state.over):
            # That it says so is a promise. Where an epoch is over, nobody needs one: the nodes
            # that are missing may be in another Store.
            seat.echo, self._held = head.round, patient

    def _know(self, state: State) -> None:
        """Remember what has been decided, and where Stores may be."""
        epoch = state.committed
        if epoch and (self.committed is None or epoch.number > self.committed.number):
            self.committed = epoch
        if self._accepted and self.committed and self._accepted.number <= self.committed.number:
            self._accepted = None
        if epoch and not state.over and not state.proposed and not self._is_in(epoch):
            self._idle_since = self._moment.now  # others run: a spare waits as long as they do
        for known in (epoch, state.proposed):
            for member in reversed(known.members if known else ()):
                if member.store:
                    self._places.setdefault(member.store)

    def _agrees(self, state: State, seat: Seat) -> bool:
        """Agree to what is proposed, unless that is said already: nothing may run any more."""
        proposed = state.proposed
        if proposed is None or self._has_workers or seat.acked == proposed.attempt:
            return False
        if not self._is_in(proposed) and not self._is_in(state.committed):
            return False
        self._accepted, seat.acked = proposed, proposed.attempt
        self._is_bound = True
        return True

    def _is_in(self, epoch: Epoch | None) -> bool:
        return epoch is not None and epoch.rank_of(self.me.key) is not None

    def _run(self, epoch: Epoch, until: float) -> None:
        """Let the workers run until then, if they may."""
        if self.running is not None and self.running != epoch:
            self._end(self.running)
        if epoch.hollow or epoch.number <= self._ended or not self._is_in(epoch):
            return
        if self.running is None and (self._has_workers or self._moment.now >= until):
            return
        self.running, self.run_until = epoch, max(until, self.run_until)
        self._has_workers = True
        self.tick(self._moment.now)

    def _end(self, epoch: Epoch | None) -> None:
        """Nothing may run under ``epoch`` any more."""
        self._ended = max(self._ended, epoch.number if epoch else 0)
        if self.running is not None:
            self.running, self.run_until = None, NEVER
            self._idle_since = self._moment.now

    # --- other Stores -------------------------------------------------------------------------

    @property
    def _is_free(self) -> bool:
        """Whether it may take part in another Store."""
        return not self._has_workers and self.running is None and self._moment.now >= self._held

    def _look(self) -> Turn:
        """Take part in the Store of the highest ballot that is found, or host one."""
        now_in = self._seat.ballot if self._seat else None
        stays = self._is_bound or self._moment.now < self._hope
        best, at = now_in if stays else None, ""
        for place in self._next_places():
            try:
                head = yield from self._head_at(place)
            except StoreLostError:
                continue
            if head is not None and head.ballot != now_in:
                self._term = max(self._term, head.ballot.term)
                if best is None or head.ballot > best:
                    best, at = head.ballot, place
        if best is not None and at:
            yield from self._join(best, at)
        elif self._has_to_host():
            yield from self._host()

    def _next_places(self) -> tuple[str, ...]:
        """Some of the places where a Store may be; others the next time."""
        places = tuple(reversed(self._places))
        at = self._looked % len(places)
        self._looked = at + _LOOKED_AT
        return (places[at:] + places[:at])[:_LOOKED_AT]

    def _head_at(self, place: str) -> Generator[Op, Answer, Head | None]:
        """What stands in the Store at ``place``; the first of the run begins to be one here.

        One that the run has left is told where the run is now, for those that come there.
        """
        answer = yield Get(place, (HEAD, MOVED))
        assert isinstance(answer, tuple)
        raw, moved = answer
        seat = self._seat
        if moved is not None:
            there = self._seal.unwrap(MOVED, moved, Ballot)
            self._places.setdefault(there.place)
            if seat and seat.state and there < seat.ballot:
                yield Set(place, MOVED, self._seal.wrap(MOVED, seat.ballot))
            return None
        if raw is None and self._seat is None and place == self._first:
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

    def _redirect(self, ballot: Ballot) -> Turn:
        """One member looks at times whether somebody comes to where the run began."""
        members = self.running.members if self.running and ballot.term else ()
        others = [member for member in members if member.store != ballot.place] or members
        if others and others[-1].key == self.me.key and self._moment.now >= self._redirect_at:
            self._redirect_at = self._moment.now + 2 * self._rules.move_s
            yield from self._head_at(self._first)

    def _join(self, ballot: Ballot, place: str) -> Turn:
        """Take part in the Store of ``ballot`` at ``place``, and in no other, if it may."""
        if not self._is_free:
            return
        self._seat = Seat(place, ballot, self.me, self._seal, self._rules, self._moment)
        self._round = 0
        self._hope = self._moment.now + self._rules.move_s
        with contextlib.suppress(StoreLostError):
            yield from self._seat.say_hello(self._hello())

    def _has_to_host(self) -> bool:
        """Whether it is this node's turn to host a Store since there is none."""
        if not self.me.store or not self._is_free or self.committed is None:
            return False
        if not self._is_in(self.committed):
            return False
        host = self._seat.ballot.place if self._seat else ""
        line = [heir.key for heir in heirs(self.committed, host)].index(self.me.key)
        return self._moment.now >= self._hope + line * self._rules.open_s

    def _host(self) -> Turn:
        place = self.me.store
        ballot = self._new_ballot(self._term + 1, place)
        with contextlib.suppress(StoreLostError):
            yield Host(place)
            head = yield from self._open(place, ballot)
            if head is not None and head.ballot == ballot:
                yield from self._join(ballot, place)

    def _new_ballot(self, term: int, place: str) -> Ballot:
        self._made += 1
        return Ballot(term, place, f"{self.me.key}/{self._made}")
