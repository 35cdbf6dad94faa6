"""Random faults of all kinds in a training whose ranks are replaced: no bit differs."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path

import campaign
import pytest
import random_losses
from lightning_client import Lab
from random_losses import WAYS

SHORT = ("backward", "validation")
ALL = 200


def test_a_few(lab: Lab, tmp_path: Path, seed: int) -> None:
    """Of each of these one, in one run of two ranks."""
    plan = random_losses.draw(seed, 2, SHORT)
    words = [campaign.SCRIPT, "--ranks=2", "--out=.", *campaign.FLAGS, *plan.flags]
    calm = lab.script(tmp_path / "calm", *words, ranks=2)
    assert calm.codes == [0, 0]
    assert "replacing a single rank is off: needs mnemo run" in calm.said
    outcome = random_losses.strike(plan, tmp_path / "struck")
    outcome.check(tmp_path / "calm", tmp_path / "struck")
    assert outcome.rungs() == {"replaced in the running job": len(SHORT)}


@pytest.mark.campaign
@pytest.mark.timeout(3600)
def test_two_hundred(tmp_path: Path, seed: int, capsys: pytest.CaptureFixture[str]) -> None:
    """In each run one fault of each way, at two, three and four ranks in turn."""
    ways: Counter[str] = Counter()
    rungs: Counter[str] = Counter()
    calm: dict[int, Path] = {}
    for number, ranks in enumerate(itertools.cycle((2, 3, 4))):
        plan = random_losses.draw(seed + number, ranks, tuple(WAYS))
        out = tmp_path / f"struck-{number}"
        outcome = random_losses.strike(plan, out)
        if ranks not in calm:
            calm[ranks] = tmp_path / f"calm-{ranks}"
            random_losses.undisturbed(calm[ranks], plan)
        outcome.check(calm[ranks], out)
        ways += outcome.ways()
        rungs += outcome.rungs()
        with capsys.disabled():
            print(f"{ways.total()} faults, the last {len(outcome.fired)} at {ranks} ranks")
        if ways.total() >= ALL:
            break
    with capsys.disabled():
        print(f"\n{ways.total()} faults (seed {seed}):")
        for title, counts in (("survived", ways), ("by", rungs)):
            for what, count in counts.most_common():
                print(f"  {title:9} {count:4}  {what}")
    assert set(ways) == set(WAYS)
