"""What membership needs of a Store, of each that there is: torch's, etcd's and the simulation's."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import subprocess
from typing import TYPE_CHECKING

import pytest
from membership_lab import MemoryStore
from ports import held_port

from mnemo.errors import StoreLostError
from mnemo.launcher.c10d import C10dStores
from mnemo.launcher.etcd import EtcdStores
from mnemo.membership.store import Add, CompareSet, Get, Op, Set

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
    from pathlib import Path

    from mnemo.membership import Store
    from mnemo.membership.store import Answer

    Ask = Callable[[Op], Awaitable[Answer]]
    Process = subprocess.Popen[bytes]


async def _ask(store: Store, op: Op) -> Answer:
    if isinstance(op, Get):
        return await store.get(op.keys)
    if isinstance(op, Set):
        await store.set(op.key, op.value)
        return None
    if isinstance(op, CompareSet):
        return await store.compare_set(op.key, op.expected, op.value)
    assert isinstance(op, Add)
    return await store.add(op.key)


@contextlib.asynccontextmanager
async def _c10d(path: Path) -> AsyncIterator[tuple[Ask, Ask]]:
    del path
    one, other = C10dStores("r"), C10dStores("r")
    with held_port() as port:
        place = f"127.0.0.1:{port}"
        stores = [await each.store(place) for each in (one, other)]
        with pytest.raises(StoreLostError, match="no answer"):
            await stores[0].get(("a",))
        await one.host(place)
        try:
            yield (lambda op: _ask(stores[0], op), lambda op: _ask(stores[1], op))
            await one.host(place)
            with pytest.raises(StoreLostError):
                await stores[1].get(("a",))
            assert await stores[1].get(("a",)) == (None,)
        finally:
            await other.close()
            await one.close()


@contextlib.contextmanager
def _etcd_process(path: Path) -> Iterator[tuple[str, Process]]:
    """Where it is, and what."""
    if not shutil.which("etcd"):
        pytest.skip("there is no etcd (apt-get install etcd-server)")
    with held_port() as port, held_port() as peers:
        url, peer_url = f"http://127.0.0.1:{port}", f"http://127.0.0.1:{peers}"
    flags = {
        "--data-dir": str(path / "etcd"),
        "--listen-client-urls": url,
        "--advertise-client-urls": url,
        "--listen-peer-urls": peer_url,
        "--initial-advertise-peer-urls": peer_url,
        "--initial-cluster": f"default={peer_url}",
    }
    command = ["etcd", *(f"{flag}={value}" for flag, value in flags.items())]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield url, process
    finally:
        process.kill()
        process.wait()


@contextlib.asynccontextmanager
async def _etcd(path: Path) -> AsyncIterator[tuple[Ask, Ask]]:
    one, other = EtcdStores("r"), EtcdStores("r")
    with _etcd_process(path) as (url, _):
        stores = [await each.store(url) for each in (one, other)]
        await asyncio.wait_for(_answers(stores[0]), 60)
        yield (lambda op: _ask(stores[0], op), lambda op: _ask(stores[1], op))
    with pytest.raises(StoreLostError):
        await stores[0].get(("a",))
    await one.close()
    await other.close()


async def _answers(store: Store) -> None:
    """Return once ``store`` does."""
    while True:
        with contextlib.suppress(StoreLostError):
            await store.get(("a",))
            return
        await asyncio.sleep(0.1)


@contextlib.asynccontextmanager
async def _memory(path: Path) -> AsyncIterator[tuple[Ask, Ask]]:
    del path
    store = MemoryStore()

    async def ask(op: Op) -> Answer:
        return store.apply(op)

    yield ask, ask


@pytest.mark.parametrize("made", [_c10d, _etcd, _memory])
def test_a_store_does_what_membership_needs(
    made: Callable[[Path], contextlib.AbstractAsyncContextManager[tuple[Ask, Ask]]], tmp_path: Path
) -> None:
    async def check() -> None:
        async with made(tmp_path) as (one, other):
            assert await one(Get("", ("a", "b"))) == (None, None)
            assert await one(CompareSet("", "a", b"x", b"y")) is None
            assert await one(Get("", ("a",))) == (None,)
            assert await one(CompareSet("", "a", None, b"\x00\xff")) == b"\x00\xff"
            assert await other(CompareSet("", "a", None, b"z")) == b"\x00\xff"
            assert await other(CompareSet("", "a", b"q", b"z")) == b"\x00\xff"
            assert await other(CompareSet("", "a", b"\x00\xff", b"z")) == b"z"
            assert await other(CompareSet("", "a", b"z", b"z")) == b"z"
            await one(Set("", "b", b"B" * 500_000))
            assert await other(Get("", ("b", "none", "a"))) == (b"B" * 500_000, None, b"z")
            assert [await ask(Add("", "n")) for ask in (one, other, one)] == [1, 2, 3]
            assert await other(Get("", ("n",))) == (b"3",)
            many = tuple(f"k{index}" for index in range(300))
            assert await one(Get("", (*many, "a"))) == (*(None for _ in many), b"z")

    asyncio.run(check())


def test_what_a_run_has_in_etcd_is_removed_unless_another_agent_has_come(tmp_path: Path) -> None:
    async def check(url: str) -> None:
        stores, others = EtcdStores("r"), EtcdStores("r1")
        store, other = await stores.store(url), await others.store(url)
        await asyncio.wait_for(_answers(store), 60)
        await other.set("head", b"another run's")
        await store.set("head", b"h")
        assert [await store.add("joined") for _ in range(2)] == [1, 2]
        await stores.forget(url, "joined", 1)
        assert await store.get(("head", "joined")) == (b"h", b"2")
        await stores.forget(url, "joined", 2)
        assert await store.get(("head", "joined")) == (None, None)
        assert await other.get(("head",)) == (b"another run's",)
        await stores.close()
        await others.close()

    with _etcd_process(tmp_path) as (url, _):
        asyncio.run(check(url))


def test_the_next_member_of_etcd_is_asked_when_one_does_not_answer(tmp_path: Path) -> None:
    """But none of another etcd, in which other nodes might meet."""

    async def check(gone: str, url: str, process: Process, another: str) -> None:
        stores = EtcdStores("r")
        for each in (url, another):
            await asyncio.wait_for(_answers(await stores.store(each)), 60)
        store = await stores.store(f"{gone},{url},{another}")
        with pytest.raises(StoreLostError, match=gone):
            await store.get(("a",))
        assert await store.get(("a",)) == (None,)
        process.kill()
        process.wait()
        with pytest.raises(StoreLostError, match=url):
            await store.get(("a",))
        with pytest.raises(StoreLostError, match=f"{another} .* belongs to cluster"):
            await store.get(("a",))
        await stores.close()

    others = (tmp_path / "one", tmp_path / "another")
    with held_port() as port, _etcd_process(others[0]) as one, _etcd_process(others[1]) as another:
        asyncio.run(check(f"http://127.0.0.1:{port}", one[0], one[1], another[0]))
