"""Members of a group as processes, killed with their memory."""

from __future__ import annotations

import random

import protect_lab as lab
import pytest

SHAPES = [(4, 1), (4, 2), (8, 2)]


def sizes_of(number: int, chance: random.Random) -> dict[str, list[int]]:
    """Bytes of every rank's bulk, by node; they differ."""
    return {
        str(position): [chance.randrange(1, 2_000_000) for _ in range(2)]
        for position in range(number)
    }


@pytest.mark.parametrize(("number", "parities"), SHAPES[:2])
def test_killed_members_come_back_equal(number: int, parities: int, seed: int) -> None:
    chance = random.Random(seed)
    with lab.processes(number, parities, chunk=64 << 10) as nodes:
        lab.everybody(nodes, "commit", tick=3, sizes=sizes_of(number, chance), seed=seed)
        lab.everybody(nodes, "start")
        lab.everybody(nodes, "protected", tick=3)
        lost = chance.sample(range(number), parities)
        before = {position: nodes[position].ask("hashes", tick=3) for position in lost}
        for position in lost:
            nodes[position].kill()
        for position in lost:
            nodes[position] = lab.NodeProcess(position, number, parities, chunk=64 << 10)
        lab.introduce(nodes)
        replaced = [nodes[position] for position in lost]
        assert lab.everybody(replaced, "rebuild") == [3] * parities
        assert {node.position: node.ask("hashes", tick=3) for node in replaced} == before


@pytest.mark.parametrize(("number", "parities"), SHAPES[:2])
def test_killed_at_a_random_instant_of_an_attempt(number: int, parities: int, seed: int) -> None:
    """Whatever instant it is, one protected generation is whole: the last or the one before."""
    once_killed_at_random(number, parities, seed)


@pytest.mark.parametrize(("number", "parities"), SHAPES[:2])
def test_killed_while_differences_travel(number: int, parities: int, seed: int) -> None:
    """The last protected generation, which is what they are differences to, is not touched."""
    once_killed_at_random(number, parities, seed, frozen=0.5)


@pytest.mark.campaign
@pytest.mark.parametrize("frozen", [0, 0.5])
@pytest.mark.parametrize(("number", "parities"), SHAPES)
@pytest.mark.parametrize("attempt", range(30))
def test_campaign_of_kills(
    number: int, parities: int, attempt: int, frozen: float, seed: int
) -> None:
    once_killed_at_random(number, parities, seed + attempt, frozen)


def once_killed_at_random(number: int, parities: int, seed: int, frozen: float = 0) -> None:
    """Protect generations, kill while the last is under way, and bring back what was lost.

    The instant is that at which a member has sent a random part of what it will send. Where much of
    each generation is ever the same, the last is the second that travels as differences.
    """
    chance = random.Random(seed)
    with lab.processes(number, parities, chunk=64 << 10, bytes_per_s=20e6) as nodes:
        sizes = sizes_of(number, chance)
        lab.everybody(nodes, "start")
        last = 4 if frozen else 2
        for tick in range(1, last):
            lab.everybody(nodes, "commit", tick=tick, sizes=sizes, seed=seed, frozen=frozen)
            lab.everybody(nodes, "protected", tick=tick)
        if not frozen:
            sizes = sizes_of(number, chance)
        lab.everybody(nodes, "commit", tick=last, sizes=sizes, seed=seed, frozen=frozen)
        lost = chance.sample(range(number), parities)
        kept = {
            tick: [node.ask("hashes", tick=tick) for node in nodes] for tick in (last - 1, last)
        }

        sent = nodes[lost[0]].ask("status")["sent"]
        instant = sent + chance.uniform(0, 1.1) * (1 - frozen) * sum(sizes[str(lost[0])])
        while True:
            status = nodes[lost[0]].ask("status")
            if status["sent"] >= instant or status["tick"] == last:
                break
        for position in lost:
            nodes[position].kill()
        for position in lost:
            nodes[position] = lab.NodeProcess(position, number, parities, chunk=64 << 10)
        lab.introduce(nodes)
        replaced = [nodes[position] for position in lost]
        ticks = set(lab.everybody(replaced, "rebuild"))
        assert len(ticks) == 1
        tick = ticks.pop()
        assert tick in (last - 1, last)
        assert status["tick"] <= tick
        for node in replaced:
            assert node.ask("hashes", tick=tick) == kept[tick][node.position]

        lab.everybody(replaced, "start")
        for tick in (5, 6, 7):
            lab.everybody(nodes, "commit", tick=tick, sizes=sizes, seed=seed, frozen=frozen)
            lab.everybody(nodes, "protected", tick=tick)
