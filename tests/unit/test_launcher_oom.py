from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from mnemo.launcher.oom import OomWatch

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize(
    ("groups", "counter"),
    [
        ("0::/slurm/job7\n", "slurm/job7/memory.events"),
        ("0::/hidden/by/namespace\n", "memory.events"),
        ("5:cpu:/a\n4:memory:/a/b\n0::/\n", "memory/a/b/memory.oom_control"),
        ("4:memory,misc:/docker/1\n", "memory/memory.oom_control"),
    ],
)
def test_a_kill_for_want_of_memory_is_noticed_once(
    tmp_path: Path, groups: str, counter: str
) -> None:
    (tmp_path / "groups").write_text(groups)
    file = tmp_path / "cgroup" / counter
    file.parent.mkdir(parents=True)
    file.write_text("low 0\noom 9\noom_kill 2\n")
    watch = OomWatch(tmp_path / "groups", tmp_path / "cgroup")
    assert not watch.struck()
    file.write_text("low 0\noom 9\noom_kill 3\n")
    assert watch.struck()
    assert not watch.struck()


@pytest.mark.parametrize("groups", [None, "", "4:cpu:/x\n", "0::/\n"])
def test_without_a_counter_nothing_is_claimed(tmp_path: Path, groups: str | None) -> None:
    if groups is not None:
        (tmp_path / "groups").write_text(groups)
    assert not OomWatch(tmp_path / "groups", tmp_path / "cgroup").struck()
