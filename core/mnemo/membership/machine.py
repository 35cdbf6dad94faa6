"""One node's part in the membership: no I/O, no threads, no time of its own.

A *turn* is a generator of operations on Stores. Whoever drives the machine carries each out and
hands back its answer with the time; a test decides what happens between any two of them.
"""

from __future__ import annotations

import contextlib
from enum import Enum

from mnemo.errors import StoreLostError
from mnemo.membership.lease import NEVER
from mnemo.membership.places import Places
from mnemo.membership.plan import heirs, is_launch
from mnemo.membership.records import (
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
from mnemo.membership.store import Answer, Host, Op


class Wait(Enum):
    """What an agent waits for; where that says all, in words."""

    NOTHING = ""
    STORE = "a Store"
    LINK = "a faster link"
    NODES = "nodes, at a launch"
    SUCCESSOR = "somebody in a lost one's place"
    QUORUM = "too few members are here to decide"
    TURN = "this node is a spare"
    ACCORD = "the nodes agree"


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
        self._places = Places(me, seal, rules, places, self._moment)

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
    def wait(self) -> Wait:
        """What it waits for."""
        now, seat = self._moment.now, self._seat
        if self.running is not None:
            return Wait.NOTHING
        if seat is None:
            return Wait.STORE
        if now - seat.head_since > self._rules.node_loss_s:
            return Wait.STORE
        if self._is_slow(seat):
            return Wait.LINK
        here = seat.living()
        if seat.has_looked and is_launch(self.committed, here) and len(here) < self._rules.nodes:
            return Wait.NODES
        if seat.state is not None and seat.state.over and now < self._hope:
            return Wait.SUCCESSOR
        if self.committed is not None and now >= self._held:
            return Wait.QUORUM
        return Wait.TURN if self.is_spare else Wait.ACCORD

    @property
    def waits_for(self) -> str:
        """`wait` in words; empty while it runs."""
        seat, wait = self._seat, self.wait
        if wait is Wait.STORE:
            if seat is None:
                return f"no Store answers at {self._places}"
            gone = self._rules.arbiter and seat.is_gone
            return f"no Store {'of this run is left' if gone else 'answers'} at {seat.place}"
        if seat is None:
            return ""
        if wait is Wait.LINK:
            return f"the Store takes {seat.answers_in:.1f} s to answer: its link is too slow"
        if wait is Wait.NODES:
            return f"{len(seat.living())} of {self._rules.nodes} nodes are here"
        if wait is Wait.SUCCESSOR:
            return f"{were_lost(seat.missing) or 'a member was lost'}, and nobody takes its place"
        return str(wait.value)

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
        return self._is_in(self.committed) and self.wait in {Wait.STORE, Wait.QUORUM}

    @property
    def is_left_out(self) -> bool:
        """Whether the others may have decided to go on without this member."""
        return self.is_stuck or self.wait is Wait.LINK

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
        if seat is None or epoch is None or self.is_left_out or not seat.has_looked:
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
        yield from self._places.redirect(seat, self.running)

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
        self._places.learn(epoch, state.proposed)

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
        stays = self._is_bound or self._moment.now < self._hope
        least = self._seat.ballot if self._seat and stays else None
        found = yield from self._places.look(self._seat, least)
        if found is not None:
            yield from self._join(*found)
        elif self._has_to_host():
            yield from self._host()

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
        with contextlib.suppress(StoreLostError):
            yield Host(place)
            ballot = yield from self._places.open_next()
            if ballot is not None:
                yield from self._join(ballot, place)
