"""A training that is asked to stop finishes its step, keeps its state, and leaves with 75."""

from __future__ import annotations

from pathlib import Path

import pytest
from lightning_client import Lab, assert_same, kill_at, records

from mnemo.faults import Declaration
from mnemo.types import EXIT_STATE_SAVED

EVERY_1000 = {"snapshot": {"every": 1000}}


@pytest.mark.parametrize("phase", ["forward", "update", "validation"])
def test_sigterm_loses_no_step(lab: Lab, tmp_path: Path, phase: str) -> None:
    """Not even where no snapshot would have been due for long."""
    lab.life("plain", tmp_path / "alone", mnemo=False)
    out = tmp_path / "stopped"
    faults = Declaration(kill_at(f"{phase}:4", kind="sigterm"), str(tmp_path / "fired"))
    life = lab.life("plain", out, run_id="run", faults=faults, settings=EVERY_1000)
    assert life.codes == [EXIT_STATE_SAVED], life.said
    assert "is saved (kept in memory for 60 min); exit code 75 asks to be started" in life.said
    life = lab.life("plain", out, run_id="run", faults=faults, settings=EVERY_1000)
    assert life.codes == [0], life.said
    assert "0 steps lost" in life.said
    assert_same(tmp_path / "alone", out)
    faults.assert_fired()


def test_state_is_persisted_where_that_is_configured(lab: Lab, tmp_path: Path) -> None:
    settings = {**EVERY_1000, "persist": {"to": str(tmp_path / "store"), "every": "1h"}}
    faults = Declaration(kill_at("forward:4", kind="sigterm"), str(tmp_path / "fired"))
    life = lab.life("plain", tmp_path / "a", run_id="run", faults=faults, settings=settings)
    assert life.codes == [EXIT_STATE_SAVED]
    assert "asked to stop: step 5 is saved (persisted up to step 5)" in life.said
    assert list((tmp_path / "store").rglob("COMMITTED*"))
    assert lab.life("plain", tmp_path / "a", run_id="run", settings=settings).codes == [0]


def test_one_ranks_signal_stops_all_after_the_same_step(lab: Lab, tmp_path: Path) -> None:
    lab.life("plain", tmp_path / "alone", mnemo=False, ranks=2)
    out = tmp_path / "stopped"
    faults = Declaration(kill_at("forward:3", kind="sigterm", rank=1), str(tmp_path / "fired"))
    options = {"run_id": "run", "faults": faults, "settings": EVERY_1000, "ranks": 2}
    life = lab.life("plain", out, **options)  # type: ignore[arg-type]
    assert life.codes == [EXIT_STATE_SAVED] * 2, life.said
    life = lab.life("plain", out, **options)  # type: ignore[arg-type]
    assert life.codes == [0, 0], life.said
    assert_same(tmp_path / "alone", out, ranks=2)
    [resumed] = [r for r in records("run") if r["event"] == "start" and r["resumed"]]
    assert resumed["steps_lost"] == 0
