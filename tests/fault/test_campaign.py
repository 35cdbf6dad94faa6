"""SIGKILLs at random phases and instants of a real run; each ends bit-identical."""

from __future__ import annotations

from pathlib import Path

import pytest
from campaign import assert_same, by_phase, hooks, train

from mnemo.faults import PHASES, Declaration, Fault, random_faults, random_instants
from mnemo.recovery.journal import read

STEPS = 30  # of 3 epochs, 20 batches per rank and epoch, accumulated over 2


def run_campaign(tmp_path: Path, faults: list[Fault], *, strikes: bool) -> Declaration:
    train(tmp_path / "undisturbed")
    declared = Declaration(tuple(faults), record=str(tmp_path / "fired"))
    train(tmp_path / "disturbed", declared=declared, strikes=strikes)
    declared.assert_fired()
    assert_same(tmp_path / "undisturbed", tmp_path / "disturbed")
    return declared


def recoveries(journal: Path) -> list[dict[str, object]]:
    """Records of all journals in a directory."""
    return [r for file in journal.glob("*.jsonl") for r in read(file) if r["event"] == "recovery"]


def test_killed_in_each_phase(tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The short campaign: one SIGKILL in each named phase."""
    monkeypatch.setenv("MNEMO_RUN__JOURNAL", str(tmp_path / "journal"))
    faults = hooks(random_faults(seed, len(PHASES), ranks=2, steps=range(2, STEPS - 6)))
    declared = run_campaign(tmp_path, faults, strikes=False)
    assert set(by_phase(declared.fired())) == set(PHASES)
    kept = [r for r in recoveries(tmp_path / "journal") if r["rung"] == "snapshot"]
    assert len(kept) == len(PHASES)
    assert all(int(str(r["steps_lost"])) <= 1 and r["exact"] for r in kept)


@pytest.mark.campaign
@pytest.mark.timeout(3600)
def test_fifty_kills(tmp_path: Path, seed: int, capsys: pytest.CaptureFixture[str]) -> None:
    """28 kills bound to phases and 22 at random instants, over five runs."""
    train(tmp_path / "undisturbed")
    fired = []
    for number in range(5):
        bound = random_faults(seed + number, 6, ranks=2, steps=range(1, STEPS - 2))
        free = random_instants(seed + number, 4, ranks=2, within_s=(4.0, 12.0))
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
    assert len(fired) >= 50
    assert all(counts[phase] >= 3 for phase in PHASES), counts
