"""Fits that are not a script's main thread: a thread, a notebook, what a notebook forks."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from lightning_client import KILLED, Lab, assert_same, kill_at

from mnemo.faults import Declaration

SCRIPTS = Path(__file__).parents[1] / "scripts"
TRAIN = SCRIPTS / "lightning_train.py"
THREAD = f"""
import sys, threading
sys.path.insert(0, {str(SCRIPTS)!r})
import lightning_train
thread = threading.Thread(target=lightning_train.main)
thread.start()
thread.join()
"""
CELL = f"exec(compile(open({str(TRAIN)!r}).read(), '<cell>', 'exec'), {{'__name__': '__main__'}})"


def start(out: Path, code: str, *words: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """A process without a script file: ``code`` is all that it has."""
    out.mkdir(exist_ok=True)
    path = os.pathsep.join([str(SCRIPTS), *filter(None, [os.environ.get("PYTHONPATH")])])
    own = {"OMP_NUM_THREADS": "1", "OUT": str(out), "MNEMO_RUN_ID": "run", "PYTHONPATH": path}
    own["TMPDIR"] = str(out)  # torch's launchers leave files behind when a rank is killed
    return subprocess.run(
        [sys.executable, "-c", code, *words],
        env={**os.environ, **own, **environ},
        cwd=out,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def undisturbed(lab: Lab, out: Path, ranks: int) -> Path:
    words = ["--strategy=ddp", f"--devices={ranks}"] if ranks > 1 else []
    assert lab.script(out, TRAIN, *words, ranks=ranks, OUT=str(out), PLAIN="1").codes == [0] * ranks
    return out


def final(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "final-0.json").read_text())
    return found


def test_a_fit_in_a_cell(lab: Lab, tmp_path: Path) -> None:
    alone, out = undisturbed(lab, tmp_path / "alone", 1), tmp_path / "out"
    declared = Declaration(kill_at("forward:9"), str(tmp_path / "fired"))
    assert start(out, CELL, **declared.environ()).returncode == KILLED
    ended = start(out, CELL, **declared.environ())
    assert ended.returncode == 0, ended.stderr
    assert "resumed from memory at step" in ended.stderr
    assert "SIGTERM is not noticed" not in ended.stderr
    assert_same(alone, out)


@pytest.mark.parametrize(("kind", "code"), [("sigkill", KILLED), ("sigterm", -15)])
def test_a_fit_in_a_thread(lab: Lab, tmp_path: Path, kind: str, code: int) -> None:
    """SIGTERM ends it at once: Python shows signals to the main thread alone."""
    alone, out = undisturbed(lab, tmp_path / "alone", 1), tmp_path / "out"
    script = tmp_path / "thread.py"
    script.write_text(THREAD)
    declared = Declaration(kill_at("forward:9", kind=kind), str(tmp_path / "fired"))
    live = functools.partial(lab.script, out, script, run_id="run", faults=declared, OUT=str(out))
    assert live().codes == [code]
    life = live()
    assert life.codes == [0], life.said
    assert "resumed from memory at step" in life.said
    assert "SIGTERM is not noticed" in life.said
    assert_same(alone, out)


@pytest.mark.campaign
@pytest.mark.parametrize("rank", [0, 1])
def test_ddp_notebook(lab: Lab, tmp_path: Path, rank: int) -> None:
    """Forks its ranks from the cell."""
    alone, out = undisturbed(lab, tmp_path / "alone", 2), tmp_path / "out"
    declared = Declaration(kill_at("backward:3", rank=rank), str(tmp_path / "fired"))
    words = ("--strategy=ddp_notebook", "--devices=2")
    assert start(out, CELL, *words, **declared.environ()).returncode != 0
    ended = start(out, CELL, *words, **declared.environ())
    assert ended.returncode == 0, ended.stderr
    assert "resumed from memory at step" in ended.stderr
    assert "cannot tell a script's fits apart" in ended.stderr
    assert final(out)["parameters"] == final(alone)["parameters"]
    assert_same(alone, out, ranks=2)


@pytest.mark.campaign
def test_three_ranks(lab: Lab, tmp_path: Path) -> None:
    """An odd number: shares of the state of unequal size."""
    case = "steady_buckets"
    assert lab.life(case, tmp_path / "alone", mnemo=False, ranks=3).codes == [0] * 3
    kills = (*kill_at("backward:1", rank=2), *kill_at("forward:3", rank=0))
    lives = lab.lives(case, tmp_path / "killed", kills, ranks=3)
    assert_same(tmp_path / "alone", tmp_path / "killed", ranks=3)
    assert all("not exact" not in life.said for life in lives)


@pytest.mark.campaign
def test_three_ranks_whose_buckets_change(lab: Lab, tmp_path: Path) -> None:
    """DDP sums the first gradients of a life in another order, which three ranks can see."""
    lives = lab.lives("plain", tmp_path / "killed", kill_at("backward:1", rank=2), ranks=3)
    assert "not exact (DDP adds the gradients of the first step in another order" in lives[1].said


def test_lightnings_checkpoint_of_an_error_is_no_newer(lab: Lab, tmp_path: Path) -> None:
    """`OnExceptionCheckpoint` makes Lightning resume from its file without being asked to."""
    alone, out = tmp_path / "alone", tmp_path / "out"
    alone.mkdir()
    (alone / "failed").touch()
    assert lab.life("on_exception", alone, mnemo=False).codes == [0]
    life = lab.life("on_exception", out, run_id="run")
    assert life.codes == [1]
    assert "a mistake of the user's" in life.said
    assert (out / "on_exception.ckpt").exists()
    life = lab.life("on_exception", out, run_id="run")
    assert life.codes == [0], life.said
    assert "resumed from memory at step 6, 0 steps lost" in life.said
    assert_same(alone, out)
