from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from mnemo.launcher.cause import OomWatch, describe, is_refusal

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


@pytest.mark.parametrize(
    ("code", "out_of_memory", "last_line", "said"),
    [
        (-9, False, "", "killed by SIGKILL"),
        (-9, True, "", "killed (out of host memory)"),
        (-11, True, "", "killed by SIGSEGV"),
        (-63, False, "", "killed by signal 63"),
        (1, False, "ValueError: bad batch", "exited with code 1 (ValueError: bad batch)"),
        (1, False, "torch.OutOfMemoryError: CUDA out of memory.",
         "exited with code 1 (torch.OutOfMemoryError: CUDA out of memory.)"),
        (1, False, "[rank3]: ValueError: bad batch", "exited with code 1 (ValueError: bad batch)"),
        (3, False, "epoch 1 loss 2.5", "exited with code 3"),
        (1, True, "KeyboardInterrupt", "exited with code 1 (KeyboardInterrupt)"),
    ],
)  # fmt: skip
def test_the_end_of_a_rank_in_words(
    code: int, out_of_memory: bool, last_line: str, said: str
) -> None:
    assert describe(code, out_of_memory=out_of_memory, last_line=last_line) == said


@pytest.mark.parametrize(
    ("code", "line", "refuses"),
    [
        (1, "mnemo.errors.IdentityError: of 3 ranks", True),
        (1, "[rank11]: mnemo.errors.IdentityError: of 3 ranks", True),
        (1, "mnemo.errors.StorageError: it is full", False),
        (1, "says mnemo.errors.IdentityError: of 3 ranks", False),
        (2, "train.py: error: no such flag", True),
        (1, "train.py: error: no such flag", False),
    ],
)
def test_what_a_restart_would_not_mend(code: int, line: str, refuses: bool) -> None:
    assert is_refusal(code, ["", line, ""]) is refuses


def test_a_long_message_is_cut() -> None:
    said = describe(1, out_of_memory=False, last_line="ValueError: " + "x" * 5000)
    assert len(said) < 250
