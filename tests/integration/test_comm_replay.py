"""A rank is killed; what the others asked for waits until another process has begun again."""

from __future__ import annotations

import random
import signal
from typing import TYPE_CHECKING

import comm_lab
import pytest
import replay_lab
from replay_lab import STEPS, Agent, Death

if TYPE_CHECKING:
    from pathlib import Path

INNER = 25
"""Inner operations of a step or two, each of which a rank may not survive."""
PLACES = ("loading", "forward", "backward", "before the update", "boundary", "validation")


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("lost", [0, 2])
def test_nothing_is_done_twice_by_those_that_are_left(
    place: str, lost: int, tmp_path: Path
) -> None:
    size, tick = 3, 3
    expected = replay_lab.undisturbed(size, tmp_path)
    with comm_lab.world() as world:
        agent = Agent(world, size, tmp_path, deaths={lost: Death(tick, place)})
        assert agent.replace([lost]) == ["back"] * size
        found = agent.results()
    replay_lab.same(found, expected)
    assert [each.passes for each in found] == [
        STEPS - tick if rank == lost else STEPS for rank in range(size)
    ]


@pytest.mark.parametrize("variant", replay_lab.VARIANTS)
@pytest.mark.parametrize("tick", [1, 3])
def test_each_way_of_ddp(variant: str, tick: int, tmp_path: Path) -> None:
    size, lost = 3, 1
    expected = replay_lab.undisturbed(size, tmp_path, variant)
    with comm_lab.world() as world:
        agent = Agent(world, size, tmp_path, variant, {lost: Death(tick, "backward")})
        assert agent.replace([lost]) == ["back"] * size
        replay_lab.same(agent.results(), expected)


@pytest.mark.parametrize("lost", [[0, 1], [1, 2, 3]])
def test_several_at_once(lost: list[int], tmp_path: Path) -> None:
    size = 4
    expected = replay_lab.undisturbed(size, tmp_path)
    with comm_lab.world() as world:
        places = ("backward", "forward", "loading")
        deaths = {rank: Death(3, place) for rank, place in zip(lost, places, strict=False)}
        agent = Agent(world, size, tmp_path, deaths=deaths)
        assert agent.replace(lost) == ["back"] * size
        replay_lab.same(agent.results(), expected)


def test_an_update_that_was_begun_is_not_replayed(tmp_path: Path) -> None:
    with comm_lab.world() as world:
        agent = Agent(world, 3, tmp_path, deaths={1: Death(3, "in the update")})
        said = agent.replace([1])
        assert len(set(said)) == 1
        assert "has begun the update after boundary 3" in said[0]


@pytest.mark.parametrize("place", ["in the update", "behind the update"])
@pytest.mark.parametrize("lost", [[1], [0, 2]])
def test_who_has_all_of_its_boundary_repeats_an_update(
    lost: list[int], place: str, tmp_path: Path
) -> None:
    size = 3
    expected = replay_lab.undisturbed(size, tmp_path, "keeps all")
    with comm_lab.world() as world:
        deaths = {rank: Death(3, place) for rank in lost}
        agent = Agent(world, size, tmp_path, "keeps all", deaths)
        assert agent.replace(lost) == ["back"] * size
        replay_lab.same(agent.results(), expected)


def test_another_is_lost_while_one_joins(tmp_path: Path) -> None:
    size = 3
    expected = replay_lab.undisturbed(size, tmp_path)
    with comm_lab.world() as world:
        agent = Agent(world, size, tmp_path, deaths={1: Death(3, "backward")})
        agent.ranks[1].join()
        agent.hold([1])
        agent.start(1)
        agent.ranks[2].signal(signal.SIGSTOP)  # it does not come to the reconfiguration
        agent.join()
        agent.ranks[2].signal(signal.SIGKILL)
        agent.hold([2])
        assert agent.answers(absent=[2]) == ["aborted"] * 2
        agent.start(2)
        agent.join()
        assert agent.answers() == ["back"] * size
        replay_lab.same(agent.results(), expected)


@pytest.mark.parametrize("place", ["forward", "backward"])
def test_a_new_process_is_lost_in_its_first_step(place: str, tmp_path: Path) -> None:
    size = 3
    expected = replay_lab.undisturbed(size, tmp_path)
    with comm_lab.world() as world:
        agent = Agent(world, size, tmp_path, deaths={1: Death(3, "backward")})
        agent.ranks[1].join()
        agent.hold([1])
        agent.start(1, Death(3, place))
        agent.join()
        assert agent.answers() == ["back"] * size
        assert agent.replace([1]) == ["back"] * size
        replay_lab.same(agent.results(), expected)


@pytest.mark.parametrize("size", [2, 3])
def test_killed_within_any_operation(size: int, tmp_path: Path, seed: int) -> None:
    """Also in the middle of one that others have completed."""
    draw = random.Random(seed)
    lost = draw.randrange(size)
    expected = replay_lab.undisturbed(size, tmp_path, "buffers broadcast")
    for after in sorted(draw.sample(range(INNER), 4)):
        death = Death(2, "inner", after)
        with comm_lab.world() as world:
            agent = Agent(world, size, tmp_path, "buffers broadcast", {lost: death})
            said = agent.replace([lost])
            if said == ["back"] * size:
                replay_lab.same(agent.results(), expected)
            else:
                assert len(set(said)) == 1
                assert "has begun the update" in said[0]


@pytest.mark.parametrize("place", ["forward", "backward", "validation"])
def test_a_cut_link_costs_nobody_anything(place: str, tmp_path: Path) -> None:
    size = 3
    expected = replay_lab.undisturbed(size, tmp_path)
    with comm_lab.world() as world:
        agent = Agent(world, size, tmp_path, deaths={1: Death(3, place, end=None)})
        assert agent.ranks[1].hear() == "cut"
        agent.epoch = 1
        agent.join()
        assert agent.answers() == ["back"] * size
        found = agent.results()
        replay_lab.same(found, expected)
        assert [each.passes for each in found] == [each.passes for each in expected]


def test_a_stopped_rank_that_goes_on_touches_nothing(tmp_path: Path) -> None:
    size = 3
    expected = replay_lab.undisturbed(size, tmp_path)
    with comm_lab.world() as world:
        agent = Agent(world, size, tmp_path, deaths={1: Death(3, "backward", end=signal.SIGSTOP)})
        stopped = agent.ranks[1]
        comm_lab.wait_for_state(stopped.pid, "T")
        assert agent.replace([1], gone=False) == ["back"] * size
        stopped.signal(signal.SIGCONT)
        replay_lab.same(agent.results(), expected)
