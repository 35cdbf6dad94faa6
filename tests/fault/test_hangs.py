"""A rank of a real training that hangs is replaced, and no bit differs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from launching import Result, launch

from mnemo.faults import Declaration, Fault, Hook

SESSION = Path(__file__).parents[1] / "scripts" / "session_replaced.py"


def _train(out: Path, *words: str, faults: tuple[Fault, ...] = ()) -> Result:
    out.mkdir()
    declared = Declaration(faults, record=str(out / "fired"))
    ended = launch(
        *words,
        "--nproc-per-node=2",
        str(SESSION),
        str(out),
        cwd=out,
        MNEMO_RUN_ID=out.name,
        MNEMO_RUN__JOURNAL=str(out / "journal"),
        **declared.environ(),
    )
    assert ended.code == 0, ended.err
    declared.assert_fired()
    return ended


def _end(out: Path) -> Any:
    return json.loads((out / "0.json").read_text())


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (Fault("hang", 1, Hook("between", 5)), r"hangs in main \(session_replaced.py:\d+\)"),
        pytest.param(
            Fault("sigstop", 1, Hook("backward", 5)), "is stopped", marks=pytest.mark.campaign
        ),
        pytest.param(
            Fault("hang", 0, Hook("backward", 5)),
            r"hangs in .*\(session_replaced.py:\d+\)",
            marks=pytest.mark.campaign,
        ),
    ],
)
def test_a_rank_that_hangs(tmp_path: Path, fault: Fault, words: str) -> None:
    calm, struck = tmp_path / "calm", tmp_path / "struck"
    _train(calm)
    ended = _train(struck, "recover.hang=3s", faults=(fault,))
    assert _end(struck) == _end(calm)
    said = re.search(
        rf"rank {fault.rank} {words}: no progress for \d+ s \(limit 3s; stacks in (\S+)\) → .*"
        r" s, 0 steps lost, exact",
        ended.err,
    )
    assert said, ended.err
    other = (Path(said[1]) / f"rank-{1 - fault.rank}.txt").read_text()
    assert "is MainThread\n" in other
    assert "session_replaced.py" in other  # where the other one waits
