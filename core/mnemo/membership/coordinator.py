"""What follows from what a node sees: the next state of the agreement. No I/O, no time of its own.

Any node may write what is decided here: the Store takes one change of its head at a time, and each
change names the one that it follows. That usually one node does so keeps the others' turns short.
"""

from __future__ import annotations

from collections.abc import Collection

import msgspec

from mnemo.membership.plan import (
    anchor_of,
    awaits_more,
    echo_of_quorum,
    is_launch,
    is_quorum,
    successors,
)
from mnemo.membership.records import Ballot, Epoch, Head, Member, State
from mnemo.membership.roll import Roll
from mnemo.membership.rules import Rules


def decide(rules: Rules, ballot: Ballot, state: State | None, roll: Roll) -> State | None:
    """The state that should follow ``state``; None if it should stay.

    Args:
        rules: Of the run.
        ballot: Of the Store.
        state: What stands in it; None in a new one.
        roll: Who is there, read after ``state`` was.
    """
    if state is None:
        return _first(rules, ballot, roll)
    if state.proposed is not None:
        if _is_agreed(rules, state.committed, state.proposed, roll):
            return State(state.attempt, committed=state.proposed)
        living = roll.living()
        if state.proposed.hollow or all(m.key in living for m in state.proposed.members):
            return None
    elif not _has_ended(ballot, state, roll):
        return None
    return _next(rules, ballot, state, roll)


def _first(rules: Rules, ballot: Ballot, roll: Roll) -> State | None:
    """Take over what was decided in Stores before, once a quorum has said what it knows.

    If the next epoch was decided in one of them without anybody here knowing, a quorum had agreed
    to it, and so has somebody who is here. It is decided again, whoever may be alive: what was
    decided once stays so.
    """
    hellos = roll.hellos()
    known = [hello.committed for hello in hellos if hello.committed]
    if not known:
        return _next(rules, ballot, State(), roll)
    newest = max(known, key=lambda epoch: epoch.number)
    bound = [hello.member.key for hello in hellos if hello.bound]
    if not is_quorum(newest, bound, roll.lost):
        return None
    accepted = [
        hello.accepted
        for hello in hellos
        if hello.accepted and hello.accepted.number == newest.number + 1
    ]
    if not accepted:
        return _next(rules, ballot, State(committed=newest), roll)
    latest = max(accepted, key=lambda epoch: (epoch.ballot, epoch.attempt))
    again = msgspec.structs.replace(latest, ballot=ballot, attempt=1, hollow=True)
    return State(1, committed=newest, proposed=again)


def _has_ended(ballot: Ballot, state: State, roll: Roll) -> bool:
    """Whether another epoch is needed."""
    epoch = state.committed
    if epoch is None or state.over or epoch.hollow or epoch.ballot != ballot:
        return True
    living, beats = roll.living(), roll.beats()
    return any(
        member.key not in living or beats[member.key].ended >= epoch.number
        for member in epoch.members
    )


def _next(rules: Rules, ballot: Ballot, state: State, roll: Roll) -> State | None:
    """Propose the next epoch; say that this one is over if there cannot be one yet."""
    epoch, living = state.committed, roll.living()
    if rules.arbiter or epoch is None or is_quorum(epoch, living, roll.lost):
        there = list(living.values())
        early = is_launch(epoch, living) and awaits_more(there, rules.nodes, rules.spares)
        members = successors(epoch, there, rules.nodes)
        if members is not None and (not early or roll.has_settled(rules.settle_s)):
            attempt = state.attempt + 1
            number = epoch.number + 1 if epoch else 1
            anchor = anchor_of(members, ballot.place)
            lost = tuple(m for m in _before(epoch, living) if m not in members)
            proposed = Epoch(number, ballot, attempt, members, anchor, lost)
            return State(attempt, committed=epoch, proposed=proposed)
    before = enumerate(epoch.members if epoch else ())
    gone = tuple(rank for rank, member in before if member.key not in living)
    over = State(state.attempt, committed=epoch, over=epoch is not None, lost=gone)
    return over if over != state else None


def _before(epoch: Epoch | None, living: Collection[str]) -> tuple[Member, ...]:
    """Who ran last: not who was only decided again, nor who belonged to another launch."""
    if epoch is None or is_launch(epoch, living):
        return ()
    return epoch.lost + epoch.members if epoch.hollow else epoch.members


def _is_agreed(rules: Rules, epoch: Epoch | None, proposed: Epoch, roll: Roll) -> bool:
    """Whether ``proposed`` may follow ``epoch``.

    A quorum of ``epoch`` has to agree, so that no other Store can decide anything else. All of the
    new members have to, so that they can begin. And nobody may still run under ``epoch``: those
    that go have agreed, too, or are quiet *after* the proposal stands in the Store. Whoever is only
    slow reads it in its next turn, before which it has to beat. Under an epoch of an earlier Store
    nobody runs: its quorum has waited that out before it came here.
    """
    acked = {key for key, beat in roll.beats().items() if beat.acked == proposed.attempt}
    if epoch is not None and not rules.arbiter and not is_quorum(epoch, acked, roll.lost):
        return False
    if proposed.hollow:
        return True
    if any(member.key not in acked for member in proposed.members):
        return False
    if epoch is None or epoch.hollow or epoch.ballot != proposed.ballot:
        return True
    return all(member.key in acked or roll.is_quiet(member.key) for member in epoch.members)


def follow_up(
    rules: Rules, head: Head, before: State | None, after: State | None, roll: Roll
) -> Head:
    """The head that says ``after``; its state's key is not set yet.

    Rounds go on only while a quorum lives, so that the others are free to move to another Store.
    """
    if after is None:
        return msgspec.structs.replace(head, pulse=head.pulse + 1)
    epoch = after.committed
    present = rules.arbiter or epoch is None or is_quorum(epoch, roll.living(), roll.lost)
    granted = 0
    if epoch is not None:
        echoes = {key: beat.echo for key, beat in roll.beats().items()}
        granted = echo_of_quorum(epoch, echoes, roll.lost)
        if before is not None and before.committed == epoch:
            granted = max(granted, head.granted)
    return msgspec.structs.replace(
        head, pulse=head.pulse + 1, round=head.round + present, granted=granted
    )
