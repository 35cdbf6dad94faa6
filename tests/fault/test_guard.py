"""What goes wrong in one rank of a real training, apart from its death."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from commands import mnemo
from launching import Result, launch

from mnemo.faults import Declaration, Fault, Hook

SESSION = Path(__file__).parents[1] / "scripts" / "session_replaced.py"


def _train(out: Path, *words: str, faults: tuple[Fault, ...] = (), code: int = 0) -> Result:
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
    assert ended.code == code, ended.err
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


@pytest.mark.campaign
def test_the_same_exception_twice_at_one_step(tmp_path: Path) -> None:
    """Where that is, the snapshot process knows."""
    fails = Fault("exception", 1, Hook("forward", 5))
    ended = _train(tmp_path / "fails", faults=(fails, fails), code=1)
    assert re.search(r"rank 1 exited with code 1 \(RuntimeError: injected .* → .* exact", ended.err)
    assert ended.err.count("0 steps lost, exact") == 1
    end = ended.err.partition("mnemo: 2 failures in a row at epoch 0, batch ")[2]
    assert "its last lines the first time:\n" in end
    assert "Traceback (most recent call last):" in end
    assert "RuntimeError: injected fault" in end
    assert mnemo("clean", "fails").code == 0  # a start goes on from there
