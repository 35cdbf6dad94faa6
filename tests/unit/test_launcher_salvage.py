"""Agents that store what is left: they wait for each other, and end when asked to."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from mnemo.errors import SalvageError, StoreLostError
from mnemo.launcher import company
from mnemo.launcher.company import Company
from mnemo.launcher.salvage import Kept, Salvage, There
from mnemo.membership import Epoch, Member
from mnemo.membership.records import Ballot
from mnemo.smp import lifecycle
from mnemo.smp import messages as m
from mnemo.smp.paths import RunPaths
from mnemo.transport.local import ConnectionLostError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from mnemo.launcher.said import Said


class Word(msgspec.Struct, frozen=True, array_like=True):
    """Something to say."""

    text: str = ""


class Records:
    """`Said` in memory, whose Store answers as long as it is ``there``."""

    def __init__(self) -> None:
        self.there = True
        self.asked = 0
        self._found: dict[str, msgspec.Struct] = {}

    async def put(self, key: str, record: msgspec.Struct) -> None:
        self._look()
        self._found.setdefault(key, record)

    async def set(self, key: str, record: msgspec.Struct) -> None:
        self._look()
        self._found[key] = record

    async def read_all(self, keys: Iterable[str], kind: type[Any]) -> list[Any]:
        del kind
        self._look()
        self.asked += 1
        return [self._found.get(key) for key in keys]

    def _look(self) -> None:
        if not self.there:
            raise StoreLostError("no answer")


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(company, "_POLL_S", 0.01)
    monkeypatch.setattr(company, "_BEAT_S", 0.02)
    monkeypatch.setattr(company, "_SILENCE_S", 0.4)
    monkeypatch.setattr(company, "_COMES_S", 0.8)


def of(said: Records, rank: int, patience_s: float = 60.0) -> Company:
    given: Said = said  # type: ignore[assignment]
    return Company(given, ("node-a", "node-b"), rank, patience_s=patience_s)


def test_one_that_lives_is_waited_for_and_one_that_was_lost_is_not() -> None:
    async def other(said: Records) -> None:
        async with of(said, 1).living():
            await asyncio.sleep(1.5)  # longer than a silence, and than a coming
            await of(said, 1).tell("kept/1", Word("mine"))

    async def run() -> None:
        said = Records()
        lives = asyncio.create_task(other(said))
        one = of(said, 0)
        assert await one.all("kept", Word, [1]) == [Word("mine")]
        await lives
        with pytest.raises(SalvageError, match="node node-b is lost, too"):
            await asyncio.wait_for(one.all("stored", Word, [1]), 10)

    asyncio.run(run())


def test_one_that_does_not_come_or_takes_too_long_is_not_waited_for() -> None:
    async def run() -> None:
        said = Records()
        with pytest.raises(SalvageError, match="node node-b is lost, too"):
            await asyncio.wait_for(of(said, 0).all("kept", Word, [1]), 10)
        with pytest.raises(SalvageError, match="who is left"):
            await asyncio.wait_for(of(said, 0).first("there", Word), 10)
        async with of(said, 1).living():
            with pytest.raises(SalvageError, match=r"node-b is not through after 0\.1 s"):
                await asyncio.wait_for(of(said, 0, 0.1).all("kept", Word, [1]), 10)

    asyncio.run(run())


def test_a_store_may_be_silent_for_a_while_only() -> None:
    async def run() -> None:
        said = Records()
        one = of(said, 0)
        said.there = False
        telling = asyncio.create_task(one.tell("kept/0", Word("mine")))
        await asyncio.sleep(0.1)
        said.there = True
        await telling
        assert await one.all("kept", Word, [0]) == [Word("mine")]
        said.there = False
        with pytest.raises(StoreLostError):
            await asyncio.wait_for(one.all("kept", Word, [0]), 10)

    asyncio.run(run())


def test_who_is_asked_to_end_is_named_and_all_are_asked_after_at_once() -> None:
    async def run() -> None:
        said = Records()
        given: Said = said  # type: ignore[assignment]
        many = [Company(given, list("abcdefgh"), rank, patience_s=60.0) for rank in range(8)]
        waiting = asyncio.create_task(many[0].all("kept", Word, range(8)))
        while not said.asked:
            await asyncio.sleep(0.01)
        before = said.asked
        await many[5].say_gone()
        with pytest.raises(SalvageError, match="node f was asked to end"):
            await asyncio.wait_for(waiting, 10)
        assert said.asked - before < 16

    asyncio.run(run())


class Silent:
    """A connection to a snapshot process that gives no answer."""

    def __init__(self) -> None:
        self.asked = threading.Event()
        self._ended = threading.Event()

    def ask(self, *_: object, **__: object) -> None:
        self.asked.set()
        assert self._ended.wait(60)
        raise ConnectionLostError("hung up")

    def hang_up(self) -> None:
        self._ended.set()

    def close(self) -> None:
        """As closing a socket: whoever waits there goes on waiting."""


class StoredError(Exception):
    """Something would be."""


class Looks:
    """A connection to a snapshot process that keeps something."""

    def __init__(self, looked: m.Looked) -> None:
        self._looked = looked

    def ask(self, request: m.Message, *_: object, **__: object) -> tuple[m.Looked, list[int]]:
        if isinstance(request, m.Flush):
            msg = f"generation {request.tick}"
            raise StoredError(msg)
        return self._looked, []

    def hang_up(self) -> None:
        """It asks nothing that takes time."""

    def close(self) -> None:
        """Nothing is open."""


@pytest.mark.timeout(30)
def test_who_is_asked_to_end_does_though_the_snapshot_process_hangs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = Silent()
    monkeypatch.setattr(lifecycle, "find", lambda *_: client)
    epoch = Epoch(1, Ballot(0, ""), 1, (Member("a", "0"), Member("b", "0")))
    said: Any = Records()

    async def run() -> None:
        salvage = Salvage(RunPaths.of("run", tmp_path), epoch, 0, said, print)
        storing = asyncio.create_task(salvage.run((0,)))
        await asyncio.to_thread(client.asked.wait)
        storing.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await storing

    before = set(threading.enumerate())
    asyncio.run(run())
    assert set(threading.enumerate()) == before


def test_who_was_not_seen_by_the_others_ends_with_words(tmp_path: Path) -> None:
    members = (Member("a", "0", address="a"), Member("b", "0", address="b"))
    epoch = Epoch(1, Ballot(0, ""), 1, members)
    said: Any = Records()

    async def run() -> None:
        await Company(said, ("a", "b"), 0, patience_s=60.0).tell("there", There((0,)))
        with pytest.raises(SalvageError, match="node b was not seen by the others any more"):
            await Salvage(RunPaths.of("run", tmp_path), epoch, 1, said, print).run(None)

    asyncio.run(run())


@pytest.mark.timeout(60)
def test_nothing_stays_in_a_lost_nodes_name_where_it_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = ("node-0", "node-1")
    protect = m.ProtectSettings("node-0", (group,), 1, dict.fromkeys(group, ("127.0.0.1", 1)))
    own = Looks(m.Looked(0, {2: 1}, m.PersistSettings(str(tmp_path / "to"), 1.0, 1), protect))
    started, ended = threading.Event(), threading.Event()
    ensure, find = lifecycle.ensure, lifecycle.find
    paths = RunPaths.of("run", tmp_path)

    def slowly(at: RunPaths) -> Any:
        started.set()
        assert ended.wait(60)
        return ensure(at)

    monkeypatch.setattr(lifecycle, "ensure", slowly)
    monkeypatch.setattr(
        lifecycle, "find", lambda at, *words: own if at == paths else find(at, *words)
    )
    epoch = Epoch(1, Ballot(0, ""), 1, (Member("a", "0"), Member("b", "0")))
    said: Any = Records()

    async def run() -> None:
        storing = asyncio.create_task(Salvage(paths, epoch, 0, said, print).run((0,)))
        await asyncio.to_thread(started.wait)
        storing.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await storing
        ended.set()

    asyncio.run(run())
    assert find(RunPaths.of("run", paths.directory / "node-1"), 1.0) is None


def test_between_two_trainings_there_is_nothing_to_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lifecycle, "find", lambda *_: Looks(m.Looked()))
    epoch = Epoch(1, Ballot(0, ""), 1, (Member("a", "0", "node-a"), Member("b", "0")))
    said: Any = Records()
    words: list[str] = []
    salvage = Salvage(RunPaths.of("run", tmp_path), epoch, 0, said, words.append)
    with pytest.raises(SalvageError, match="no training was under way on node node-a"):
        asyncio.run(salvage.run((0,)))
    assert not words  # nothing was begun


def test_snapshots_of_different_lives_have_nothing_in_common(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a node has them that was away: the same step, and yet another training."""
    group = ("node-0", "node-1")
    protect = m.ProtectSettings("node-0", (group,), 1, dict.fromkeys(group, ("127.0.0.1", 1)))
    persist = m.PersistSettings(str(tmp_path / "to"), 1.0, 1)
    own = Looks(m.Looked(0, {2: 1, 4: 2}, persist, protect, {2: "a", 4: "a"}))
    monkeypatch.setattr(lifecycle, "find", lambda *_: own)
    epoch = Epoch(1, Ballot(0, ""), 1, (Member("a", "0"), Member("b", "0")))

    def common(other: dict[int, tuple[int, str]]) -> None:
        said: Any = Records()

        async def run() -> None:
            await said.put("kept/1", Kept((1,), other))
            await Salvage(RunPaths.of("run", tmp_path), epoch, 0, said, print).run((0, 1))

        asyncio.run(run())

    with pytest.raises(SalvageError, match="no snapshot in common"):
        common({2: (1, "b"), 4: (2, "b")})
    with pytest.raises(StoredError, match="generation 2"):
        common({2: (1, "a"), 4: (2, "b")})
