"""Directories above a run's own: those that mnemo made go with it, no others."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mnemo.errors import SmpError
from mnemo.smp.paths import RunPaths


def test_parents_made_for_a_run_go_with_it(tmp_path: Path) -> None:
    paths = RunPaths.of("x", tmp_path / "a" / "b")
    paths.make()
    paths.make()
    paths.secret.touch()
    paths.remove()
    paths.remove()
    assert list(tmp_path.iterdir()) == []


def test_parents_that_were_there_stay(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir(mode=0o700)
    paths = RunPaths.of("x", tmp_path / "a" / "b")
    paths.make()
    paths.remove()
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert list((tmp_path / "a").iterdir()) == []


def test_a_parent_that_is_used_otherwise_stays(tmp_path: Path) -> None:
    paths = RunPaths.of("x", tmp_path / "a" / "b")
    paths.make()
    (tmp_path / "a" / "notes").touch()
    paths.remove()
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["notes"]


def test_a_run_beside_another_leaves_what_the_other_needs(tmp_path: Path) -> None:
    first, second = (RunPaths.of(name, tmp_path / "a") for name in ("x", "y"))
    first.make()
    second.make()
    first.remove()
    assert second.directory.is_dir()


def test_of_what_was_noted_only_parents_are_believed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    paths = RunPaths.of("x", tmp_path / "a")
    paths.make()
    for noted in (str(tmp_path / "elsewhere"), "", "\0", "a"):
        paths.made.write_text(noted)
        paths.remove()
        assert (tmp_path / "a").is_dir()
        assert not paths.directory.exists()
        paths.make()
    assert (tmp_path / "elsewhere").is_dir()


@pytest.mark.parametrize("umask", [0o000, 0o077])
def test_what_is_made_is_private_under_any_umask(tmp_path: Path, umask: int) -> None:
    paths = RunPaths.of("x", tmp_path / "a" / "b")
    before = os.umask(umask)
    try:
        paths.make()
    finally:
        os.umask(before)
    for made in (tmp_path / "a", tmp_path / "a" / "b", paths.directory):
        assert made.stat().st_mode & 0o777 == 0o700
    paths.remove()


@pytest.mark.parametrize(
    ("parent", "said"),
    [
        ("/proc/nothing", "/proc/nothing/x cannot be made"),
        ("/dev/null/y", "/dev/null is not a directory"),
        ("/proc/self/fd", "/fd/x cannot be made"),
    ],
)
def test_a_place_where_nothing_can_be_made_is_named(parent: str, said: str) -> None:
    with pytest.raises(SmpError, match=rf"(?i)the run directory .*{said}.* set run\.dir"):
        RunPaths.of("x", parent).make()


def test_a_parent_that_is_a_link_to_nowhere_is_named(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "none")
    with pytest.raises(SmpError, match="link is not a directory"):
        RunPaths.of("x", tmp_path / "link").make()
