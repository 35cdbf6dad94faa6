"""`mnemo clean` on what dead runs left; living ones are in the integration tests."""

from __future__ import annotations

import fcntl
import json
import os
import tempfile
from pathlib import Path

import pytest
from commands import mnemo

from mnemo.cli.runs import connect
from mnemo.errors import SmpError
from mnemo.smp.paths import RunPaths, SmpRecord


def left_over(parent: Path, run_id: str = "gpt", socket: Path | None = None) -> RunPaths:
    """What an SMP that was killed leaves."""
    paths = RunPaths.of(run_id, parent)
    paths.make()
    for file in (paths.lock, paths.secret, paths.log, paths.socket):
        file.touch(mode=0o600)
    dead = SmpRecord(2**22 - 1, str(socket or paths.socket), 1.0)
    paths.record.write_text(json.dumps({k: getattr(dead, k) for k in dead.__struct_fields__}))
    return paths


def test_a_left_over_directory_is_removed(tmp_path: Path) -> None:
    paths = left_over(tmp_path)
    answer = mnemo("clean", "gpt", "--dir", tmp_path)
    assert (answer.code, answer.err) == (0, "")
    assert answer.out == f"gpt: removed {paths.directory}, which a dead run had left\n"
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_ends_meanwhile_is_said_to_have_ended(tmp_path: Path) -> None:
    with pytest.raises(SmpError, match="run gpt has just ended"):
        connect(RunPaths.of("gpt", tmp_path))


def test_all_of_them_are_removed(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        left_over(tmp_path, name)
    answer = mnemo("clean", "--all", "--dir", tmp_path)
    assert answer.code == 0
    assert [line.partition(":")[0] for line in answer.out.splitlines()] == ["a", "b", "c"]
    assert list(tmp_path.iterdir()) == []
    assert mnemo("clean", "--all", "--dir", tmp_path).out == f"no runs in {tmp_path}\n"


def test_the_socket_beside_the_temporary_files_goes_too(tmp_path: Path) -> None:
    place = Path(tempfile.mkdtemp(prefix=f"mnemo-{os.getuid()}-sock-"))
    (place / "smp.sock").touch()
    left_over(tmp_path, socket=place / "smp.sock")
    assert mnemo("clean", "gpt", "--dir", tmp_path).code == 0
    assert not place.exists()


def test_a_forged_record_removes_nothing_else(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "smp.sock").touch()
    left_over(tmp_path / "runs", socket=precious / "smp.sock")
    assert mnemo("clean", "gpt", "--dir", tmp_path / "runs").code == 0
    assert (precious / "smp.sock").exists()


def test_what_is_not_mnemos_stays(tmp_path: Path) -> None:
    paths = left_over(tmp_path)
    (paths.directory / "thesis.tex").touch()
    answer = mnemo("clean", "gpt", "--dir", tmp_path)
    assert answer.code == 1
    assert "holds what mnemo did not put there: thesis.tex" in answer.err
    assert [path.name for path in paths.directory.iterdir()] == ["thesis.tex"]


def test_links_are_not_followed(tmp_path: Path) -> None:
    paths = left_over(tmp_path / "elsewhere")
    parent = tmp_path / "runs"
    parent.mkdir()
    (parent / "gpt").symlink_to(paths.directory)
    before = sorted(paths.directory.iterdir())
    answer = mnemo("clean", "gpt", "--dir", parent)
    assert (answer.code, answer.out) == (1, "")
    assert "no run gpt" in answer.err
    assert sorted(paths.directory.iterdir()) == before != []


def test_a_linked_lock_is_not_followed(tmp_path: Path) -> None:
    paths = left_over(tmp_path)
    target = tmp_path / "target"
    target.touch()
    paths.lock.unlink()
    paths.lock.symlink_to(target)
    answer = mnemo("clean", "gpt", "--dir", tmp_path)
    assert answer.code == 1
    assert "smp.lock" in answer.err
    assert paths.secret.exists()


def test_a_run_that_is_just_starting_is_left_alone(tmp_path: Path) -> None:
    paths = left_over(tmp_path)
    with paths.lock.open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        left_over(tmp_path, "other")
        answer = mnemo("clean", "--all", "--dir", tmp_path)
    assert answer.code == 1
    assert answer.err == "mnemo: run gpt is just starting: it is left alone\n"
    assert answer.out.startswith("other: removed")
    assert paths.secret.exists()


@pytest.mark.parametrize("words", [(), ("gpt", "--all")])
def test_one_run_or_all(words: tuple[str, ...]) -> None:
    answer = mnemo("clean", *words)
    assert (answer.code, answer.out) == (2, "")
    assert "name one run, or --all" in answer.err


def test_a_run_that_is_not_there(tmp_path: Path) -> None:
    answer = mnemo("clean", "gpt", "--dir", tmp_path)
    assert answer.code == 1
    assert "there is no run at all" in answer.err
