"""What the start of a plain loop says of what it found, after each way for the last life to end."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest
from commands import mnemo, status_of
from launching import launch
from lightning_client import KILLED, records
from smp_lab import damage, wait_for_exit

if TYPE_CHECKING:
    import subprocess

    from warm import Zygote

SCRIPT = Path(__file__).parents[1] / "scripts" / "session_starts.py"

Live = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def live(zygote: Zygote, tmp_path: Path) -> Live:
    """One life of run ``gpt``, in the ways given."""
    return functools.partial(zygote.run, SCRIPT, tmp_path / "batches", MNEMO_RUN_ID="gpt")


def batches(tmp_path: Path) -> list[int]:
    """Those that the loop's body has seen, repeated ones too."""
    return [int(line) for line in (tmp_path / "batches").read_text().split()]


def test_nobody_knows_how_far_a_run_had_come_whose_node_is_gone(live: Live, tmp_path: Path) -> None:
    stored = {"MNEMO_PERSIST__TO": str(tmp_path / "store"), "MNEMO_PERSIST__EVERY": "1ms"}
    assert live("killed", **stored).returncode == KILLED
    assert mnemo("rollback", "gpt", "--to", 6).code == 0  # waits for a checkpoint on its way
    smp = psutil.Process(status_of("gpt")["smp"]["pid"])
    smp.kill()
    wait_for_exit(smp.pid)
    ended = live(**stored)
    assert ended.returncode == 0, ended.stderr
    assert "resumed from storage at step" in ended.stderr
    assert ", an unknown number of steps lost, " in ended.stderr
    [start] = [r for r in records("gpt") if r["event"] == "start" and r["resumed"]]
    assert start["steps_lost"] is None


def test_damaged_snapshots_are_no_missing_ones(live: Live, tmp_path: Path) -> None:
    assert live("killed").returncode == KILLED
    assert damage(status_of("gpt")["smp"]["pid"]) == 2
    ended = live()
    assert ended.returncode == 0, ended.stderr
    assert "run gpt · fresh (2 snapshots found, none of which can be used) · " in ended.stderr
    assert "the snapshot of step 6 is not used: chunk 0 of rank 0's" in ended.stderr
    assert "the snapshot of step 5 is not used: chunk 0 of rank 0's" in ended.stderr
    assert batches(tmp_path) == [*range(7), *range(10)]


def test_a_loop_that_is_left_by_break_goes_on_with_that_batch(live: Live, tmp_path: Path) -> None:
    """Its step had been made; what else the body would have done had not."""
    assert live("leaves").returncode == 0
    assert status_of("gpt")["fits"][0]["newest"]["step"] == 3
    ended = live()
    assert "run gpt · an earlier life ended → resumed from memory at step 3, 1 step lost, " in (
        ended.stderr
    )
    assert batches(tmp_path) == [0, 1, 2, 3, *range(3, 10)]


def test_another_learning_rate_in_the_program_is_said(live: Live) -> None:
    assert live("killed").returncode == KILLED
    ended = live("faster")
    assert ended.returncode == 0, ended.stderr
    assert "resumed although these changed since the snapshot: optimizer\n" in ended.stderr
    assert "not exact (changed: optimizer)" in ended.stderr


def test_a_layer_that_is_still_lazy_is_resumed(live: Live) -> None:
    assert live("lazy", "killed").returncode == KILLED
    ended = live("lazy")
    assert ended.returncode == 0, ended.stderr
    assert "resumed from memory at step 6, 0 steps lost" in ended.stderr
    assert ", exact" in ended.stderr


def test_a_buffer_that_cannot_be_loaded_is_refused(live: Live) -> None:
    assert live("buffer", "killed").returncode == KILLED
    refused = live("buffer", "wider")
    assert refused.returncode == 1
    assert "mnemo.errors.ModelChangedError: the snapshot of step 6 of run gpt cannot be" in (
        refused.stderr
    )
    assert "resumed from memory at step 6, 0 steps lost" in live("buffer").stderr


def test_a_setting_of_one_group_is_compared_as_it_was_before_training(live: Live) -> None:
    assert live("decaying", "killed").returncode == KILLED
    ended = live("killed")
    assert ended.returncode == KILLED
    assert "resumed although these changed since the snapshot: parameter group 0\n" in ended.stderr
    ended = live("decaying")
    assert ended.returncode == 0, ended.stderr
    assert "changed" not in ended.stderr
    assert ", exact" in ended.stderr


def test_groups_that_were_added_later_have_to_be_there_before_the_loop(live: Live) -> None:
    assert live("adds", "killed").returncode == KILLED
    refused = live("adds")
    assert refused.returncode == 1
    assert "mnemo.errors.ModelChangedError: the snapshot's optimizer state does not fit SGD" in (
        refused.stderr
    )
    assert "(groups that were added later: before batches())" in refused.stderr
    ended = live("added")
    assert ended.returncode == 0, ended.stderr
    assert "resumed from memory at step 6, 0 steps lost" in ended.stderr
    assert "changed" not in ended.stderr


def test_who_failed_is_known_behind_the_end_of_its_launch(tmp_path: Path) -> None:
    words = ["run.id=gpt", "--max-restarts=0", str(SCRIPT), str(tmp_path / "batches")]
    assert launch(*words, "killed", cwd=tmp_path).code == 128 - KILLED
    events = [record["event"] for record in records("gpt")]
    assert events[-2:] == ["failure", "end"]
    ended = launch(*words, cwd=tmp_path)
    assert ended.code == 0, ended.err
    assert "run gpt · rank 0 killed by SIGKILL → resumed from memory at step 6, 0 steps lost" in (
        ended.err
    )
