"""Membership in simulated time, case by case."""

from __future__ import annotations

import contextlib
import random
from typing import TYPE_CHECKING

import msgspec
import pytest
from membership_lab import ETCD, SEAL, MemoryStore, Node, World

from mnemo.errors import ConfigError, MembershipRecordError, StoreLostError
from mnemo.membership import Epoch, Member, Rules, Seal
from mnemo.membership.coordinator import decide
from mnemo.membership.lease import NEVER, Lease
from mnemo.membership.plan import heirs, is_quorum, successors
from mnemo.membership.records import HEAD, KEEPS, Ballot, Beat, Head, Hello, State, beat_key
from mnemo.membership.roll import Moment, Roll, Seen
from mnemo.membership.seat import Seat

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from mnemo.membership.store import Answer, Op

RULES = Rules(nodes=3)
STORE = Ballot(0, "a", "a/0/1")
MEMBERS = tuple(Member(name, "0", store=name) for name in "abcd")


def _epoch(count: int = 4, anchor: str = "") -> Epoch:
    return Epoch(1, Ballot(0, "a"), 1, MEMBERS[:count], anchor)


def _world(names: str, *, nodes: int = 4, arbiter: bool = False, give_up_s: float = 300) -> World:
    rules = Rules(nodes=nodes, arbiter=arbiter, give_up_s=give_up_s)
    world = World(rules, random.Random(0), slowness=0.1)
    for name in names:
        world.start(name)
        world.run(1)
    assert world.run(5, until=world.is_running)
    return world


def _node(world: World, name: str) -> Node:
    return next(node for node in world.living() if node.name == name)


def _names(world: World) -> list[str]:
    assert world.newest is not None
    return [member.node for member in world.newest.members]


def _runs_without(world: World, name: str) -> Callable[[], bool]:
    return lambda: world.is_running() and name not in _names(world)


# --- arithmetic -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("present", "anchor", "lost", "decides"),
    [
        ("abc", "", "", True),
        ("ab", "", "", False),
        ("ab", "a/0", "", True),
        ("cd", "a/0", "", False),
        ("cd", "a/0", "ab", True),
        ("c", "a/0", "ab", False),
        ("", "", "abcd", False),
        ("xyz", "", "", False),
    ],
)
def test_quorum(present: str, anchor: str, lost: str, decides: bool) -> None:
    keys = [f"{name}/0" for name in present]
    assert is_quorum(_epoch(anchor=anchor), keys, {f"{name}/0" for name in lost}) is decides


@pytest.mark.parametrize("count", range(1, 8))
def test_two_quorums_have_a_member_in_common(count: int) -> None:
    members = tuple(Member(str(index), "0") for index in range(count))
    epoch = Epoch(1, Ballot(0, ""), 1, members, members[-1].key)
    quorums = []
    for chosen in range(1 << count):
        keys = {member.key for index, member in enumerate(members) if chosen >> index & 1}
        if is_quorum(epoch, keys):
            quorums.append(keys)
    assert quorums
    assert all(one & other for one in quorums for other in quorums)


def test_who_hosts_next_is_the_next_in_the_list() -> None:
    assert [member.node for member in heirs(_epoch(), "b")] == list("cdab")


def test_survivors_keep_their_places_and_who_comes_back_gets_its_own() -> None:
    back, spare = Member("c", "1"), Member("x", "0")
    living = [spare, MEMBERS[3], back, MEMBERS[0]]
    chosen = successors(_epoch(), living, 4)
    assert chosen is not None
    assert [member.key for member in chosen] == ["a/0", "x/0", "c/1", "d/0"]
    assert successors(_epoch(), living[1:], 4) is None


def test_who_takes_a_place_has_as_many_ranks() -> None:
    epoch = Epoch(1, STORE, 1, (Member("a", "0"), Member("b", "0"), Member("c", "0", ranks=2)))
    one, two, back = Member("x", "0"), Member("y", "0", ranks=2), Member("b", "1", ranks=2)

    def chosen(*living: Member) -> list[str] | None:
        found = successors(epoch, [epoch.members[0], *living], 3)
        return found and [member.key for member in found]

    assert chosen(two, one) == ["a/0", "x/0", "y/0"]
    assert chosen(back, one) == ["a/0", "x/0", "b/1"]
    assert chosen(two, back) is None


def test_a_lease_counts_from_before_the_granted_round_was_there() -> None:
    lease = Lease()
    assert lease.read(1.0, 5, 5) == NEVER
    assert lease.read(2.0, 5, 5) == NEVER
    assert lease.read(3.0, 7, 6) == 2.0
    assert lease.read(4.0, 8, 6) == 2.0
    assert lease.read(5.0, 9, 8) == 3.0


@pytest.mark.parametrize(
    "wrong", [{"nodes": 0}, {"node_loss_s": 4.0}, {"move_s": 4.0}, {"beat_s": 1.0}]
)
def test_times_that_could_let_two_sides_go_on_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        Rules(**{"nodes": 2, **wrong})  # type: ignore[arg-type]


def test_a_record_counts_at_its_key_under_its_secret_alone() -> None:
    raw = SEAL.wrap(beat_key(STORE, 1), Beat(3))
    assert SEAL.unwrap(beat_key(STORE, 1), raw, Beat) == Beat(3)
    other = Seal(b"t" * 32, "run")
    for seal, key, value in [
        (SEAL, beat_key(STORE, 2), raw),
        (other, beat_key(STORE, 1), raw),
        (Seal(b"s" * 32, "other"), beat_key(STORE, 1), raw),
        (SEAL, beat_key(STORE, 1), raw[:-1]),
        (SEAL, beat_key(STORE, 1), b""),
    ]:
        with pytest.raises(MembershipRecordError):
            seal.unwrap(key, value, Beat)
    with pytest.raises(MembershipRecordError, match="same version"):
        SEAL.unwrap(HEAD, SEAL.wrap(HEAD, Beat(3)), Head)
    assert b"ssss" not in raw
    assert msgspec.msgpack.decode(raw[32:])[0] == 3


# --- what is decided ------------------------------------------------------------------------------


def _roll(now: float, *seen: tuple[Hello, Beat, float]) -> Roll:
    roll = Roll(SEAL, STORE, Moment(now), RULES.node_loss_s)
    roll._seen = {slot: Seen(*each, each[2]) for slot, each in enumerate(seen, 1)}
    return roll


def test_who_beat_again_after_it_was_left_out_is_waited_for() -> None:
    ballot, spare = Ballot(0, "a"), Member("x", "0")
    epoch = Epoch(1, ballot, 1, MEMBERS[:3], "a/0")
    state = State(2, epoch, Epoch(2, ballot, 2, (*MEMBERS[:2], spare), "a/0"))
    agreed = [(Hello(member), Beat(9, acked=2), 10.0) for member in (*MEMBERS[:2], spare)]
    left_out = Hello(MEMBERS[2])
    slow = _roll(10.0, *agreed, (left_out, Beat(9), 10.0 - RULES.node_loss_s / 2))
    assert decide(RULES, ballot, state, slow) is None
    for gone in [
        (left_out, Beat(9), 10.0 - RULES.node_loss_s),
        (left_out, Beat(9, acked=2), 10.0),
    ]:
        after = decide(RULES, ballot, state, _roll(10.0, *agreed, gone))
        assert after is not None
        assert after.committed == state.proposed


def test_who_was_lost_is_said_where_somebody_ran_with_it_in_this_launch() -> None:
    def lost(rules: Rules, state: State, *there: Member) -> tuple[Member, ...] | None:
        seen = [(Hello(member), Beat(1), 10.0) for member in there]
        after = decide(rules, STORE, state, _roll(10.0, *seen))
        return after and after.proposed and after.proposed.lost

    spare, gone = Member("x", "0"), MEMBERS[2]
    ran = Epoch(1, STORE, 1, MEMBERS[:3], "a/0")
    again = Epoch(2, STORE, 1, (*MEMBERS[:2], spare), "a/0", lost=(gone,), hollow=True)
    assert lost(RULES, State(1, ran), *MEMBERS[:2], spare) == (gone,)
    assert lost(RULES, State(1, again), *MEMBERS[:2], spare) == (gone,)
    relaunched = [Member(name, "1") for name in "abc"]
    assert lost(Rules(nodes=3, arbiter=True), State(1, ran), *relaunched) == ()


def test_who_was_never_bound_is_no_vote_in_a_new_store() -> None:
    epoch, ballot = Epoch(1, Ballot(0, "z"), 1, MEMBERS[:3]), Ballot(1, "b")
    knows = (Hello(MEMBERS[0], True, epoch), Beat(1), 10.0)
    for bound in (False, True):
        says = (Hello(MEMBERS[1], bound), Beat(1), 10.0)
        opened = decide(RULES, ballot, None, _roll(10.0, knows, says))
        assert (opened is not None) is bound


def test_who_is_still_in_the_store_before_says_nothing_in_the_one_at_its_place() -> None:
    """It was stopped, and its slot is another's by now: that one's acknowledgements are its own."""
    store, moment = MemoryStore(), Moment(0.0)

    def turn(steps: Generator[Op, Answer, object]) -> None:
        op = next(steps)
        with contextlib.suppress(StopIteration):
            while True:
                op = steps.send(store.apply(op))

    def sit(member: Member, ballot: Ballot) -> Seat:
        seat = Seat("a", ballot, member, SEAL, RULES, moment)
        store.values[HEAD] = SEAL.wrap(HEAD, Head(ballot))
        turn(seat.say_hello(Hello(member)))
        return seat

    stopped = sit(MEMBERS[0], STORE)
    stopped.acked = 1
    store.values.clear()
    store.counts.clear()
    newer = Ballot(2, "a", "a/0/2")
    sits = sit(MEMBERS[1], newer)
    with pytest.raises(StoreLostError, match="forgotten a/0"):
        turn(stopped.say_alive(0, ()))
    turn(sits.say_alive(0, ()))
    roll = Roll(SEAL, newer, moment, RULES.node_loss_s)
    turn(roll.refresh("a"))
    assert roll.beats() == {"b/0": Beat(2)}


# --- a run ----------------------------------------------------------------------------------------


def test_nodes_agree_and_a_spare_waits() -> None:
    world = _world("abcde")
    assert _names(world) == list("abcd")
    world.run(60)
    assert world.ran == {1}
    assert _node(world, "e").workers is None


def test_a_lost_node_is_replaced_by_the_spare_within_the_time_that_is_promised() -> None:
    world = _world("abcde")
    lost_at = world.now
    world.kill(_node(world, "c"))
    assert world.run(10, until=_runs_without(world, "c"))
    assert _names(world) == list("abed")
    assert world.now - lost_at < 6


def test_the_lost_host_of_the_store_is_replaced_like_any_other() -> None:
    world = _world("abcde")
    lost_at = world.now
    world.kill(_node(world, "a"))
    assert world.run(20, until=_runs_without(world, "a"))
    assert _names(world) == list("ebcd")
    assert world.now - lost_at < 12
    world.kill(_node(world, "b"))
    world.start("f")
    assert world.run(20, until=_runs_without(world, "b"))


def test_a_second_loss_while_the_first_is_recovered() -> None:
    world = _world("abcdefg")
    world.kill(_node(world, "c"))
    seat = _node(world, "a").machine._seat
    assert world.run(10, until=lambda: bool(seat and seat.state and seat.state.proposed))
    world.kill(_node(world, "e"))  # which was to replace it
    assert world.run(15, until=world.is_running)
    assert set(_names(world)) == set("abdf")


def test_the_next_host_dies_while_the_store_is_moved() -> None:
    world = _world("abcdefg", nodes=5)
    world.kill(_node(world, "a"))
    assert world.run(20, until=lambda: "b" in world.stores)
    world.kill(_node(world, "b"))
    world.run(1)
    assert world.run(40, until=world.is_running)
    assert set(_names(world)) == set("cdefg")


@pytest.mark.parametrize("gap_s", [1, 15])
def test_who_comes_to_where_the_run_began_is_told_where_it_waits(gap_s: float) -> None:
    """Though nobody runs meanwhile, and though it has moved again since somebody was told."""
    world = _world("abc", nodes=3)
    for name in "abc":
        world.kill(_node(world, name))
        world.run(gap_s)
        world.start(name, alone=True)
        assert world.run(30, until=world.is_running), name


def test_a_node_that_comes_back_at_once_is_another_agent() -> None:
    world = _world("abcd")
    world.kill(_node(world, "b"))
    world.start("b")
    assert world.run(10, until=lambda: world.is_running() and len(world.ran) == 2)
    assert world.newest is not None
    assert world.newest.members[1].key == "b/1"


def test_without_a_spare_it_waits_and_then_gives_up() -> None:
    world = _world("abcd", give_up_s=30)
    world.kill(_node(world, "b"))
    world.run(10)
    survivors = world.living()
    assert not any(node.workers for node in survivors)
    assert {node.machine.waits_for for node in survivors} == {
        "node b was lost, and nobody takes its place"
    }
    assert not any(node.machine.has_given_up for node in survivors)
    world.run(30)
    assert all(node.machine.has_given_up for node in survivors)


def test_where_etcd_has_forgotten_the_run_that_is_said() -> None:
    world = _world("abc", nodes=3, arbiter=True, give_up_s=30)
    world.stores[ETCD] = MemoryStore()
    world.run(10)
    assert not any(node.workers for node in world.living())
    said = {node.machine.waits_for for node in world.living()}
    assert said == {f"no Store of this run is left at {ETCD}"}


def test_a_node_whose_workers_fail_gets_a_new_epoch_for_all() -> None:
    world = _world("abcd")
    node = _node(world, "c")
    node.machine.end_epoch(world._local(node))
    world._observe(node)
    assert world.run(5, until=lambda: world.is_running() and world.ran == {1, 2})
    assert _names(world) == list("abcd")


def test_whoever_reaches_the_arbiter_first_after_an_outage_takes_nobody_elses_place() -> None:
    world = _world("abcd", nodes=3, arbiter=True)
    world.cuts = {(name, ETCD) for name in "abcd"}
    world.run(60)
    assert not any(node.workers for node in world.living())
    for name in "dabc":
        world.cuts.discard((name, ETCD))
        world.run(0.8)
    assert world.run(10, until=world.is_running)
    assert _names(world) == list("abc")


def test_half_of_the_nodes_and_the_host_are_lost_with_an_arbiter() -> None:
    world = _world("abcdef", arbiter=True)
    world.kill(_node(world, "a"))
    world.kill(_node(world, "b"))
    assert world.run(10, until=world.is_running)
    assert set(_names(world)) == set("cdef")


def test_half_of_the_nodes_and_the_host_are_lost_without_one_until_the_operator_speaks() -> None:
    world = _world("abcdef")
    world.kill(_node(world, "a"))
    world.kill(_node(world, "b"))
    world.run(60)
    assert world.ran == {1}
    assert not any(node.workers for node in world.living())
    speaks_to = _node(world, "c").machine
    speaks_to.confirm_lost("a/0")
    world.run(30)
    assert world.ran == {1}
    speaks_to.confirm_lost("b/0")
    assert world.run(30, until=world.is_running)
    assert set(_names(world)) == set("cdef")


@pytest.mark.parametrize(
    ("there", "goes_on"),
    [("abxyz", "cdefg"), ("cdefg", "cdefg"), ("abcxy", "abcxy"), ("defgz", "abcxy")],
)
def test_of_two_sides_the_one_with_the_majority_goes_on(there: str, goes_on: str) -> None:
    world = _world("abcdefgxyz", nodes=5)
    others = set("abcdefgxyz") - set(there)
    world.cuts |= {(other, one) for one in there for other in others}
    world.cuts |= {(one, other) for one in there for other in others}
    world.run(40)
    assert {node.name for node in world.living() if node.workers} == set(goes_on)
    world.cuts.clear()
    world.run(20)
    assert set(_names(world)) == set(goes_on)


@pytest.mark.parametrize("deaf", [True, False])
def test_a_host_that_only_hears_or_is_only_heard_does_no_harm(deaf: bool) -> None:
    world = _world("abcdef", nodes=5)
    world.cuts = {(name, "a") if deaf else ("a", name) for name in "bcdef"}
    assert world.run(40, until=_runs_without(world, "a"))


def test_messages_that_take_seconds_do_no_harm() -> None:
    world = _world("abcde")
    world.slowness = 30
    world.run(120)
    world.slowness = 0.1
    assert world.run(30, until=world.is_running)


@pytest.mark.parametrize("delay", [0.1, 0.2, 0.6])
@pytest.mark.parametrize(("name", "arbiter"), [("a", False), ("b", False), ("b", True)])
def test_a_node_on_a_slow_link_stays_or_is_replaced_for_good(
    name: str, arbiter: bool, delay: float
) -> None:
    """It has the Store, or has not. Nodes never stop and begin again and again."""
    world = _world("abcde", arbiter=arbiter)
    world.slowness = 0
    world.latency[name] = delay
    world.run(40)
    before = set(world.ran)
    stays = name in _names(world)
    assert world.is_running()
    assert stays or delay > 0.1
    assert not stays or delay < 0.4
    assert len(before) <= 3
    world.run(40)
    assert world.is_running()
    assert world.ran == before
    world.latency.clear()  # it is a spare, or as the others
    world.kill(_node(world, "c"))
    if stays:
        world.run(1)
        world.start("f")
    assert world.run(20, until=_runs_without(world, "c"))


def test_whoever_keeps_state_has_its_place_again() -> None:
    """A node that came later than one whose address is higher, and took over a lower rank."""
    fresh = [Member(node, "1", ranks=2) for node in ("a", "b", "c")]
    keeps_4 = Member("a", "2", ranks=2, labels=(f"{KEEPS}4",))
    keeps_0 = Member("z", "2", ranks=2, labels=(f"{KEEPS}0",))
    gone = Epoch(7, Ballot(0, ""), 1, (Member("a", "0", ranks=2), Member("z", "0", ranks=2)))
    named = [[m.node for m in found or ()] for found in (
        successors(None, [fresh[2], fresh[0], fresh[1]], 3),
        successors(None, [keeps_4, fresh[1], keeps_0], 3),
        successors(None, [fresh[1], fresh[2], keeps_4, keeps_0], 3),
        successors(None, [keeps_4, keeps_0], 3),
        successors(None, [keeps_4, fresh[1]], 2),
        successors(gone, [fresh[1], keeps_0], 2),
    )]  # fmt: skip
    first = ["z", "b", "a"]
    assert named == [["a", "b", "c"], first, first, [], ["a", "b"], ["z", "b"]]


def test_a_launch_with_spares_waits_a_little_for_those_that_keep_state() -> None:
    ballot = Ballot(0, "a")
    keepers = [Member(name, "1", labels=(f"{KEEPS}{rank}",)) for rank, name in enumerate("abc")]
    spares = [Member(name, "1") for name in "xyz"]

    def begins(spares_expected: int, waited_s: float, *there: Member) -> list[str] | None:
        rules = Rules(nodes=3, spares=spares_expected)
        seen = [(Hello(member), Beat(1), 10.0 - waited_s) for member in there]
        after = decide(rules, ballot, None, _roll(10.0, *seen))
        return after and after.proposed and [m.node for m in after.proposed.members]

    late = RULES.settle_s
    assert begins(1, 0.0, spares[0], *keepers[:2]) is None
    assert begins(1, late, spares[0], *keepers[:2]) == ["a", "b", "x"]
    assert begins(1, 0.0, spares[0], *keepers[1:], keepers[0]) == ["a", "b", "c"]
    assert begins(2, 0.0, *keepers) == ["a", "b", "c"]
    assert begins(3, 0.0, *spares) is None
    assert begins(3, late, *spares) == ["x", "y", "z"]
    assert begins(0, 0.0, *keepers[:2], spares[0]) == ["a", "b", "x"]
