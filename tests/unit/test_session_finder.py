"""What is begun with where two nodes have snapshots in memory, but none in common."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from mnemo.config import load_config
from mnemo.errors import IdentityError
from mnemo.session.finder import Finder
from mnemo.session.identity import RunIdentity
from mnemo.session.place import Place
from mnemo.session.sources import Candidate


class Memory:
    """Answers as `MemorySource` does where a node has these ticks."""

    def __init__(self, *ticks: int, life: str = "a7", damaged: int = 0) -> None:
        identity = {"life": life, "world": "2"}
        state: dict[str, Any] = {"state": {}, "rng": {}, "base": None}
        self._made = [Candidate(t, t // 2, state, (), identity, "memory") for t in ticks]
        self.held, self.world_size, self.life, self.damaged = True, 2, int(life, 16), damaged

    def newest(self, below: int | None, newer_than: int) -> Candidate | None:
        fits = [c for c in self._made if newer_than < c.tick and (below is None or c.tick < below)]
        return max(fits, key=lambda c: c.tick, default=None)


def find(*memories: Memory) -> list[Any]:
    """What each node finds, or the error, and whether the nodes are apart."""
    barrier, told = threading.Barrier(len(memories), timeout=10.0), [0] * len(memories)

    def node(rank: int) -> Any:
        def agree(value: int) -> tuple[int, int]:
            told[rank] = value
            barrier.wait()
            answer = min(told), max(told)
            barrier.wait()
            return answer

        place = Place(rank, len(memories), leaders=(0, 1), node=rank, agree=agree)
        identity = RunIdentity("run", stable=True, source="test")
        link: Any = None
        finder = Finder(load_config(environ={}), identity, place, link, b"", None, 0, "")
        finder.memory = memories[rank]  # type: ignore[assignment]
        try:
            found = finder.find()
        except IdentityError as error:
            return error
        return (found.step if found else None), finder.apart

    with ThreadPoolExecutor(len(memories)) as pool:
        return list(pool.map(node, range(len(memories))))


def test_the_newest_in_common_is_gone_on_from() -> None:
    assert find(Memory(10, 12), Memory(12, 14)) == [(6, False)] * 2


def test_snapshots_of_one_life_without_any_in_common_are_begun_anew_from() -> None:
    """Killed before anything was protected, and one node had left out what the other had."""
    assert find(Memory(10, 12), Memory(14, 16)) == [(None, True)] * 2


@pytest.mark.parametrize(
    "there", [Memory(14, 16, life="b8"), Memory(14, 16, damaged=1)], ids=["away", "damaged"]
)
def test_what_another_node_may_bring_back_is_not_given_up(there: Memory) -> None:
    for answer in find(Memory(10, 12), there):
        assert isinstance(answer, IdentityError)
        assert "none that all of them have" in str(answer)
