"""Two jobs with one run id: the second is refused, and leaves the first one's state alone."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from launching import all_records, finish, launch, started

if TYPE_CHECKING:
    import subprocess

SCRIPT = Path(__file__).parents[1] / "scripts" / "session_twice.py"


@pytest.fixture
def pipes(tmp_path: Path) -> Path:
    """By which the jobs wait for each other."""
    for name in ("told", "said"):
        os.mkfifo(tmp_path / name)
    return tmp_path


def ends_well(job: subprocess.Popen[str], pipes: Path) -> None:
    """The first job goes on as if nothing had been, and its journal knows of no failure."""
    (pipes / "told").write_text("end")
    ended = finish(job)
    assert ended.code == 0, ended.err
    assert "trained" in ended.out
    events = [record["event"] for record in all_records()]
    assert "failure" not in events
    assert events[-1] == "end"
    assert [record.get("code") for record in all_records() if record["event"] == "end"][-1] == 0


def test_a_run_that_trains_is_refused_before_anything_is_started(pipes: Path) -> None:
    words = ["run.id=gpt", str(SCRIPT), "first", str(pipes)]
    with started(*words, cwd=pipes) as first:
        (pipes / "told").write_text("begin")
        assert (pipes / "said").read_text() == "trains"
        second = launch(*words, cwd=pipes)
        assert second.code != 0
        assert "mnemo: run gpt is in use: process " in second.err
        assert "is training it. Give this job another run.id, or end the other one" in second.err
        assert "Traceback" not in second.err
        assert "stays in memory" not in second.err
        ends_well(first, pipes)


@pytest.mark.campaign
def test_a_run_that_begins_to_train_meanwhile_is_refused_once(pipes: Path) -> None:
    with started("run.id=gpt", str(SCRIPT), "first", str(pipes), cwd=pipes) as first:
        second = launch("run.id=gpt", str(SCRIPT), "second", str(pipes), cwd=pipes)
        assert second.code == 2, second.err
        assert second.err.count("mnemo: run gpt is in use: its rank 0 is process ") == 1
        assert "Traceback" not in second.err
        assert "restart" not in second.err.split("\n", 1)[1]
        assert "stays in memory" not in second.err
        ends_well(first, pipes)
