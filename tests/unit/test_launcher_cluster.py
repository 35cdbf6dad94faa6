"""Agents of several nodes in one process, with a Store in memory, or none."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest
from membership_lab import SEAL, MemoryStore

from mnemo.errors import LaunchError, MembershipRecordError
from mnemo.launcher import cluster, operator, rendezvous
from mnemo.launcher.c10d import C10dStores
from mnemo.launcher.cluster import Cluster
from mnemo.launcher.rendezvous import Nodes
from mnemo.launcher.restarts import Ended
from mnemo.launcher.salvage import Salvage, Salvaged
from mnemo.launcher.seat import Seat
from mnemo.launcher.team import Report
from mnemo.membership import Member, Rules, Seal
from mnemo.membership.store import Add, CompareSet, Get, Set
from mnemo.smp.paths import RunPaths
from mnemo.types import EXIT_STATE_SAVED

if TYPE_CHECKING:
    from pathlib import Path

    from mnemo.launcher.stores import AgentStores


class Memory:
    """A Store as agents speak to it, and all that there are."""

    def __init__(self) -> None:
        self._store = MemoryStore()
        self.forgotten = False

    async def get(self, keys: tuple[str, ...]) -> tuple[bytes | None, ...]:
        found = self._store.apply(Get("", keys))
        assert isinstance(found, tuple)
        return found

    async def set(self, key: str, value: bytes) -> None:
        self._store.apply(Set("", key, value))

    async def compare_set(self, key: str, expected: bytes | None, value: bytes) -> bytes | None:
        there = self._store.apply(CompareSet("", key, expected, value))
        assert there is None or isinstance(there, bytes)
        return there

    async def add(self, key: str) -> int:
        number = self._store.apply(Add("", key))
        assert isinstance(number, int)
        return number

    async def store(self, place: str) -> Memory:
        assert place
        return self

    async def host(self, place: str) -> None:
        assert place

    async def warm_up(self) -> None:
        """Nothing."""

    async def forget(self, *_: object) -> None:
        self.forgotten = True

    async def close(self) -> None:
        """Nothing."""


@pytest.fixture(autouse=True)
def apart(monkeypatch: pytest.MonkeyPatch) -> set[tuple[str, str]]:
    """Which agents' addresses do not reach which; no address leads anywhere really."""
    pairs: set[tuple[str, str]] = set()

    async def look(host: str, port: int, me: str) -> str:
        assert port
        return "no route" if (me, host) in pairs else ""

    monkeypatch.setattr(rendezvous, "why_unreached", look)
    return pairs


QUICK: dict[str, float] = {
    "beat_s": 0.05,
    "fence_s": 0.5,
    "stop_s": 0.1,
    "node_loss_s": 1.0,
    "move_s": 1.0,
    "open_s": 0.3,
}


def agent(
    directory: Path,
    name: str,
    stores: AgentStores,
    said: list[str],
    nodes: int = 2,
    /,
    ranks: int = 1,
    seal: Seal = SEAL,
    **rules: float,
) -> Cluster:
    paths = RunPaths.of("run", directory / name)
    paths.make()
    return Cluster(
        Member(name, "0", address=name, store=f"{name}:1", ranks=ranks),
        ("127.0.0.1:1",),
        Nodes(nodes),
        rules=Rules(nodes=nodes, **rules),  # type: ignore[arg-type]
        seal=seal,
        stores=stores,
        paths=paths,
        saves=True,
        say=said.append,
    )


def test_where_no_store_answers_that_is_what_is_said(tmp_path: Path) -> None:
    async def run() -> None:
        team = agent(tmp_path, "a", C10dStores("run"), [], give_up_s=0.3)
        with pytest.raises(LaunchError, match=r"\(recover.no_spare\): no Store answers"):
            await team.take_seat(1)
        await team.close()

    asyncio.run(run())


def test_too_few_nodes_are_counted(tmp_path: Path) -> None:
    async def run() -> None:
        team = agent(tmp_path, "a", Memory(), [], give_up_s=1.0, beat_s=0.05)
        with pytest.raises(LaunchError, match=": 1 of 2 nodes are here"):
            await team.take_seat(1)
        await team.close()

    asyncio.run(run())


def test_the_others_learn_that_somebody_came_with_another_secret(tmp_path: Path) -> None:
    async def run() -> None:
        stores = Memory()
        one = agent(tmp_path, "a", stores, [], give_up_s=4.0, beat_s=0.05)
        waiting = asyncio.create_task(one.take_seat(1))
        await asyncio.sleep(0.5)  # it is the first, and so its secret is the run's
        other = agent(tmp_path, "b", stores, [], seal=Seal(b"t" * 32, "run"), **QUICK)
        with pytest.raises(MembershipRecordError, match="MNEMO_SECRET_FILE"):
            await asyncio.wait_for(other.take_seat(1), 20)
        with pytest.raises(LaunchError, match=r"1 of 2 nodes are here, and .* another secret"):
            await waiting
        await asyncio.gather(one.close(), other.close())

    asyncio.run(run())


def test_a_node_that_wants_another_number_of_nodes_is_refused(tmp_path: Path) -> None:
    async def run() -> None:
        stores, said = Memory(), list[str]()
        one = agent(tmp_path, "a", stores, said, 2, **QUICK)
        taking = asyncio.create_task(one.take_seat(1))
        await asyncio.sleep(0.5)  # it is the first, and so decides
        other = agent(tmp_path, "b", stores, said, 3, **QUICK)
        with pytest.raises(LaunchError, match="--nnodes=3, but the others run with 2 nodes"):
            await asyncio.wait_for(other.take_seat(1), 20)
        await other.close()
        taking.cancel()
        await one.close()

    asyncio.run(run())


def test_ranks_that_fail_on_two_nodes_at_once_end_the_job_with_one_code(tmp_path: Path) -> None:
    """Whoever wanted to go on learns of it, too."""

    async def run() -> None:
        stores, said = Memory(), list[str]()
        agents = [agent(tmp_path, name, stores, said, 3, **QUICK) for name in "abc"]
        await asyncio.gather(*(each.take_seat(1) for each in agents))
        reports = [Report(cause="it failed", code=code) for code in (None, 5, 7)]
        codes = [await each.report(report) for each, report in zip(agents, reports, strict=True)]
        assert codes == [None, 5, 5]
        assert await asyncio.wait_for(agents[0].take_seat(1), 20) == Ended(5)
        await asyncio.gather(*(each.close() for each in agents))

    asyncio.run(run())


def test_a_spare_that_could_take_no_place_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "_SILENCE_S", 1.5)

    async def run() -> None:
        stores, said = Memory(), list[str]()
        agents = [agent(tmp_path, name, stores, said, **QUICK) for name in "ab"]
        await asyncio.gather(*(each.take_seat(1) for each in agents))
        wrong = {
            "--nproc-per-node=2, but .* they have 1": agent(
                tmp_path, "c", stores, said, ranks=2, **QUICK
            ),
            "--nnodes=3, but the others run with 2": agent(tmp_path, "d", stores, said, 3, **QUICK),
        }
        for words, spare in wrong.items():
            with pytest.raises(LaunchError, match=words):
                await asyncio.wait_for(spare.take_seat(1), 20)
        await asyncio.gather(*(each.close() for each in (*wrong.values(), *agents)))

    asyncio.run(run())


def test_who_took_a_lost_nodes_place_and_is_refused_leaves_and_the_others_go_on(
    tmp_path: Path,
) -> None:
    async def run() -> None:
        stores = Memory()
        one, other, new = await with_a_newcomer(tmp_path, stores)
        refused = Report(cause="a wrong setting", code=2, refused=True)
        assert await one.report(refused) is None
        assert await new.report(refused) == 2
        assert (await new.why(), await other.why()) == (
            Report(cause="a wrong setting", code=2),
            Report(cause="a wrong setting", leaves=True),
        )
        await new.close()
        better = agent(tmp_path, "e", stores, [], 3, **QUICK, arbiter=True)
        seats = await asyncio.gather(*(each.take_seat(1) for each in (one, other, better)))
        assert all(isinstance(seat, Seat) and seat.cause == "node d was lost" for seat in seats)
        assert await one.report(refused) is None
        await asyncio.gather(*(each.close() for each in (one, other, better)))

    asyncio.run(run())


async def die(*agents: Cluster) -> None:
    """They are not heard of any more."""
    for each in agents:
        assert each._driving is not None
        each._driving.cancel()
        each._idle.set()
        await asyncio.wait({each._driving})


def test_nothing_stays_in_etcd_though_the_first_node_was_lost(tmp_path: Path) -> None:
    async def run() -> None:
        stores, rules = Memory(), {**QUICK, "arbiter": True, "give_up_s": 3.0}
        first, other = (agent(tmp_path, name, stores, [], **rules) for name in "ab")
        await asyncio.gather(first.take_seat(1), other.take_seat(1))
        await die(first)
        assert isinstance(await asyncio.wait_for(other.take_seat(1), 20), Ended)
        await other.close()
        assert stores.forgotten

    asyncio.run(run())


def test_a_spare_ends_as_the_others_do_where_the_job_does_not_go_on(tmp_path: Path) -> None:
    async def run() -> None:
        stores, rules = Memory(), {**QUICK, "arbiter": True}
        agents = [agent(tmp_path, name, stores, [], **rules) for name in "ab"]
        await asyncio.gather(*(each.take_seat(1) for each in agents))
        spare = agent(tmp_path, "c", stores, [], **rules, give_up_s=3.0)
        waiting = asyncio.create_task(spare.take_seat(1))
        while not spare._machine.is_spare:
            await asyncio.sleep(0.05)
        await die(*agents)
        ended = await asyncio.wait_for(waiting, 20)
        assert isinstance(ended, Ended)
        assert ended.code == EXIT_STATE_SAVED
        assert "waited 3s (recover.no_spare): 1 of 2 nodes are here" in ended.words
        await spare.close()

    asyncio.run(run())


def test_the_operator_is_asked_once_a_store_that_only_moves_would_be_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run() -> None:
        stores, said = Memory(), list[str]()
        one, other = (agent(tmp_path, name, stores, said, **QUICK) for name in "ab")
        await asyncio.gather(one.take_seat(1), other.take_seat(1))
        await die(one)
        while not other._machine.is_stuck:
            await asyncio.sleep(0.05)
        other._operator.hear()
        assert not other._operator.advice
        monkeypatch.setattr(operator, "_ADVISES_S", 0.0)
        assert "the others are a). If some are surely dead" in other._operator.advice
        await die(other)

    asyncio.run(run())


async def with_a_newcomer(tmp_path: Path, stores: Memory) -> tuple[Cluster, Cluster, Cluster]:
    """Agents of three nodes that run, the last of them in a lost one's place."""
    rules = {**QUICK, "arbiter": True}
    one, other, lost = (agent(tmp_path, name, stores, [], 3, **rules) for name in "abc")
    await asyncio.gather(*(each.take_seat(1) for each in (one, other, lost)))
    assert not any(each.is_newcomer for each in (one, other, lost))
    await lost.close()
    new = agent(tmp_path, "d", stores, [], 3, **rules)
    await asyncio.gather(*(each.take_seat(1) for each in (one, other, new)))
    assert [each.is_newcomer for each in (one, other, new)] == [False, False, True]
    return one, other, new


FAILED = Report(cause="it failed", code=5, leaves=True)


def test_who_took_a_lost_nodes_place_and_fails_before_it_trains_leaves_alone(
    tmp_path: Path,
) -> None:
    async def run() -> None:
        stores = Memory()
        one, other, new = await with_a_newcomer(tmp_path, stores)
        assert not await new.is_elsewhere(5, ())
        assert await new.report(FAILED) == 5
        for each in (one, other):
            assert await each.why() == Report(cause="it failed", leaves=True)
        waiting = [asyncio.create_task(each.take_seat(1)) for each in (one, other)]
        await asyncio.sleep(0.5)  # it has not left yet, and agrees to nothing
        assert not any(each.done() for each in waiting)
        await new.close()
        better = agent(tmp_path, "e", stores, [], 3, **QUICK, arbiter=True)
        seats = await asyncio.gather(better.take_seat(1), *waiting)
        assert all(isinstance(seat, Seat) and seat.cause == "node d was lost" for seat in seats)
        await asyncio.gather(*(each.close() for each in (one, other, better)))

    asyncio.run(run())


def test_who_took_a_lost_nodes_place_stays_where_another_failed_before(tmp_path: Path) -> None:
    async def run() -> None:
        one, other, new = await with_a_newcomer(tmp_path, Memory())
        assert await one.report(Report(cause="it was killed")) is None
        assert await new.report(FAILED) is None
        seats = await asyncio.gather(*(each.take_seat(1) for each in (one, other, new)))
        assert all(isinstance(seat, Seat) and not seat.cause for seat in seats)
        assert not new.is_newcomer
        await asyncio.gather(*(each.close() for each in (one, other, new)))

    asyncio.run(run())


def unreached(me: str, first: str) -> str:
    return (
        f"node {me} cannot reach node {first}, where rank 0 is (no route): set network.interface "
        "there to the interface that others reach it by"
    )


def test_a_launch_ends_where_rank_0_cannot_be_reached(
    tmp_path: Path, apart: set[tuple[str, str]]
) -> None:
    async def run() -> None:
        apart.add(("b", "a"))
        stores = Memory()
        one, other = (agent(tmp_path, name, stores, [], **QUICK) for name in "ab")
        await asyncio.gather(one.take_seat(1), other.take_seat(1))
        for each in (one, other):
            assert await each.why() == Report(cause=unreached("b", "a"), code=2)
        await asyncio.gather(one.close(), other.close())

    asyncio.run(run())


@pytest.mark.parametrize("lost", [0, 2], ids=["rank 0's node is new", "it cannot reach rank 0"])
def test_a_newcomer_between_whom_and_rank_0_is_no_way_leaves(
    tmp_path: Path, apart: set[tuple[str, str]], lost: int
) -> None:
    async def run() -> None:
        apart.update([("b", "d"), ("c", "d"), ("d", "a")])
        stores, rules = Memory(), {**QUICK, "arbiter": True}
        agents = [agent(tmp_path, name, stores, [], 3, **rules) for name in "abc"]
        seats = await asyncio.gather(*(each.take_seat(1) for each in agents))
        assert [seat.node_rank for seat in seats if isinstance(seat, Seat)] == [0, 1, 2]
        await agents.pop(lost).close()
        new = agent(tmp_path, "d", stores, [], 3, **rules)
        await asyncio.gather(*(each.take_seat(1) for each in (*agents, new)))
        cause = unreached("d", "a") if lost else (await new.why()).cause
        assert cause in {unreached("b", "d"), unreached("c", "d"), unreached("d", "a")}
        assert await new.why() == Report(cause=cause, code=2)
        for each in agents:
            assert await each.why() == Report(cause=cause, leaves=True)
        await asyncio.gather(*(each.close() for each in (*agents, new)))

    asyncio.run(run())


def test_a_way_to_rank_0_that_is_gone_for_a_while_is_waited_for(
    tmp_path: Path, apart: set[tuple[str, str]]
) -> None:
    async def run() -> None:
        stores, said = Memory(), list[str]()
        one, other = (agent(tmp_path, name, stores, said, **QUICK) for name in "ab")
        await asyncio.gather(one.take_seat(1), other.take_seat(1))
        apart.add(("b", "a"))
        assert await one.report(Report(cause="it failed")) is None
        again = asyncio.create_task(other.take_seat(1))
        assert isinstance(await one.take_seat(1), Seat)
        await asyncio.sleep(0.5)
        assert not again.done()
        apart.clear()
        assert isinstance(await again, Seat)
        assert said == [unreached("b", "a")]
        await asyncio.gather(one.close(), other.close())

    asyncio.run(run())


def test_who_is_refused_at_a_launch_ends_the_job(tmp_path: Path) -> None:
    async def run() -> None:
        stores, said = Memory(), list[str]()
        one, other = (agent(tmp_path, name, stores, said, **QUICK) for name in "ab")
        await asyncio.gather(one.take_seat(1), other.take_seat(1))
        refused = Report(cause="a wrong setting", code=2, refused=True)
        assert await one.report(refused) == 2
        assert await other.why() == Report(cause="a wrong setting", code=2)
        await asyncio.gather(one.close(), other.close())

    asyncio.run(run())


def test_the_operators_word_of_a_node_that_lives_is_not_taken(tmp_path: Path) -> None:
    """It was given while nobody waited; then a rank fails, and all nodes go on."""

    async def run() -> None:
        stores, said = Memory(), list[str]()
        one, other = (agent(tmp_path, name, stores, said, **QUICK) for name in "ab")
        for _ in range(2):
            seats = await asyncio.gather(one.take_seat(1), other.take_seat(1))
            assert all(isinstance(seat, Seat) for seat in seats)
            RunPaths.of("run", tmp_path / "a").verdicts.write_text("b\n")
            await one.report(Report(cause="it failed"))
        await asyncio.gather(one.close(), other.close())
        assert "that b is lost was said before this node waited for it: not taken" in said

    asyncio.run(run())


@pytest.mark.parametrize("stored", [True, False], ids=["stored", "not stored"])
def test_what_the_end_says_where_nobody_takes_a_lost_nodes_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stored: bool
) -> None:
    """Who has come, though it was not enough, ends as well then."""

    async def store(*_: object) -> Salvaged:
        return Salvaged(5, "url")

    async def run() -> None:
        stores, said = Memory(), list[str]()

        def make(name: str, give_up_s: float) -> Cluster:
            rules = {**QUICK, "give_up_s": give_up_s, "arbiter": True}
            return agent(tmp_path, name, stores, said, 3, **rules)

        one, *others = (make(name, 3.0) for name in "abc")
        await asyncio.gather(*(each.take_seat(1) for each in (one, *others)))
        for other in others:  # as if they were dead: they are not heard of any more
            await other.close()
        late = make("d", 60.0)
        waiting = asyncio.create_task(late.take_seat(1))
        ended = await one.take_seat(1)
        assert isinstance(ended, Ended)
        assert ended.code == EXIT_STATE_SAVED
        assert ("in the memory of these nodes alone" in ended.words) != stored
        assert ("step 5 of all ranks is in url" in said) == stored
        assert any("has no snapshot process" in line for line in said) != stored
        if stored:
            assert await asyncio.wait_for(waiting, 20) == Ended(EXIT_STATE_SAVED)
        else:
            waiting.cancel()
        await asyncio.gather(late.close(), one.close())

    if stored:
        monkeypatch.setattr(Salvage, "run", store)
    asyncio.run(run())
