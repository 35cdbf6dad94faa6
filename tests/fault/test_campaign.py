"""SIGKILLs at random phases and instants of a real run; each ends bit-identical."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
from campaign import FLAGS, SCRIPT, assert_same, by_phase, hooks, train
from lightning_client import Lab, records, until_it_ends

from mnemo.faults import PHASES, Declaration, Fired, random_faults, random_instants

STEPS = 30  # of 3 epochs, 20 batches per rank and epoch, accumulated over 2


def test_killed_in_each_phase(lab: Lab, tmp_path: Path, seed: int) -> None:
    """The short campaign: one SIGKILL in each named phase."""
    undisturbed, disturbed = tmp_path / "undisturbed", tmp_path / "disturbed"
    live = functools.partial(lab.script, ranks=2)
    words = [SCRIPT, "--ranks=2", "--out=.", *FLAGS]
    assert live(undisturbed, *words).codes == [0, 0]
    faults = hooks(random_faults(seed, len(PHASES), ranks=2, steps=range(2, STEPS - 6)))
    lives = until_it_ends(functools.partial(live, disturbed, *words), disturbed, tuple(faults))
    assert len(lives) == len(PHASES) + 1
    assert_same(undisturbed, disturbed)
    kept = [r for r in records("disturbed") if r["event"] == "recovery"]
    assert [r["rung"] for r in kept] == ["snapshot"] * len(PHASES)
    assert all(r["exact"] for r in kept)
    assert all(r["steps_lost"] <= 2 for r in kept)  # a copy that is done may not be sealed yet


@pytest.mark.campaign
@pytest.mark.timeout(3600)
def test_fifty_kills(tmp_path: Path, seed: int, capsys: pytest.CaptureFixture[str]) -> None:
    """In each run seven kills in a phase of a random step and three at random instants.

    A run that is through before an instant comes has one less; there are runs until it is fifty.
    """
    train(tmp_path / "undisturbed")
    fired: list[Fired] = []
    number = -1
    while len(fired) < 50:
        number += 1
        assert number < 10, f"{len(fired)} kills in ten runs"
        bound = random_faults(seed + number, len(PHASES), ranks=2, steps=range(1, STEPS - 2))
        free = random_instants(seed + number, 3, ranks=2, within_s=(6.0, 20.0))
        out = tmp_path / f"disturbed-{number}"
        declared = Declaration((*hooks(bound), *free), record=str(tmp_path / f"fired-{number}"))
        train(out, declared=declared, strikes=True)
        assert_same(tmp_path / "undisturbed", out)
        fired += declared.fired()
    counts = by_phase(fired)
    with capsys.disabled():
        print(f"\n{len(fired)} kills (seed {seed}):")
        for phase, count in counts.most_common():
            print(f"  {phase:12} {count}")
    assert all(counts[phase] >= 3 for phase in PHASES), counts
