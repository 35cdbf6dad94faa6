"""Run directories: private, and refused where somebody else could tamper with them."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from mnemo.errors import ConfigError, SmpError
from mnemo.smp.paths import RunPaths, SmpRecord, check_run_id, default_parent

needs_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can give a file away")


@pytest.mark.parametrize(
    "run_id", ["gpt-7b-8412", "a", "A.b_c-1", "x" * 128, "a.node-b", "a.fit-1x", "node-1"]
)
def test_run_ids_that_name_a_directory(run_id: str) -> None:
    assert check_run_id(run_id) == run_id


@pytest.mark.parametrize("run_id", ["", ".", "..", ".x", "a/b", "a b", "é", "x" * 129, "a\n"])
def test_run_ids_that_do_not(run_id: str) -> None:
    with pytest.raises(ConfigError, match="cannot name a directory: use up to 128 letters"):
        RunPaths.of(run_id)


@pytest.mark.parametrize("part", [".node-0", ".fit-12"])
def test_run_ids_that_would_share_anothers_checkpoints(part: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"ends in '{part}', as .* a run 'gpt' are named: use gpt-2"
    ):
        RunPaths.of(f"gpt{part}")


def test_the_default_place_is_this_users_own() -> None:
    assert default_parent() == Path(tempfile.gettempdir()) / f"mnemo-{os.getuid()}"
    assert RunPaths.of("x").directory == default_parent() / "x"


def test_made_private_with_its_parents(tmp_path: Path) -> None:
    paths = RunPaths.of("x", tmp_path / "a" / "b")
    paths.make()
    paths.make()
    assert paths.directory.stat().st_mode & 0o777 == 0o700


def test_an_open_one_is_closed(tmp_path: Path) -> None:
    paths = RunPaths.of("x", tmp_path)
    paths.directory.mkdir(mode=0o755)
    paths.make()
    assert paths.directory.stat().st_mode & 0o777 == 0o700


def test_the_parent_may_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir(mode=0o755)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    RunPaths.of("x", tmp_path / "link").make()
    assert (tmp_path / "real" / "x").is_dir()


def test_the_directory_may_not_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "x").symlink_to(tmp_path / "real")
    with pytest.raises(SmpError, match=r"is not a directory \(links are not followed here\)"):
        RunPaths.of("x", tmp_path).make()
    (tmp_path / "broken").symlink_to(tmp_path / "none")
    with pytest.raises(SmpError, match="is not a directory"):
        RunPaths.of("broken", tmp_path).make()


def test_a_file_in_its_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x").touch()
    with pytest.raises(SmpError, match=r"is not a directory: remove it or set run\.dir"):
        RunPaths.of("x", tmp_path).make()
    with pytest.raises(SmpError, match=r"run\.dir"):
        RunPaths.of("y", tmp_path / "x").make()


@needs_root
def test_another_users_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    os.chown(tmp_path / "x", 65534, 65534)
    with pytest.raises(SmpError, match=r"belongs to uid 65534, not to uid 0: set run\.dir"):
        RunPaths.of("x", tmp_path).make()


@needs_root
def test_another_users_parent_is_refused(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    os.chown(tmp_path / "theirs", 65534, 65534)
    with pytest.raises(SmpError, match="theirs belongs to uid 65534"):
        RunPaths.of("x", tmp_path / "theirs").make()
    (tmp_path / "link").symlink_to(tmp_path)
    os.lchown(tmp_path / "link", 65534, 65534)
    with pytest.raises(SmpError, match="link belongs to uid 65534"):
        RunPaths.of("x", tmp_path / "link").make()


def test_a_parent_that_others_can_write_is_refused_unless_sticky(tmp_path: Path) -> None:
    parent = tmp_path / "open"
    parent.mkdir()
    parent.chmod(0o777)
    with pytest.raises(SmpError, match=r"others may replace what is in .*open \(mode 777\)"):
        RunPaths.of("x", parent).make()
    parent.chmod(0o1777)
    RunPaths.of("x", parent).make()


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'{"pid": "x"}', b"\xff\xfe", b'{"\xff": 1}']
)
def test_a_record_that_cannot_be_read_counts_as_none(tmp_path: Path, content: bytes) -> None:
    paths = RunPaths(tmp_path)
    assert paths.read_record() is None
    paths.record.write_bytes(content)
    assert paths.read_record() is None


def test_a_record(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    paths.record.write_text('{"pid": 7, "socket": "/x/smp.sock", "started": 1.5}')
    assert paths.read_record() == SmpRecord(7, "/x/smp.sock", 1.5)


def test_removed_with_the_default_parent_only() -> None:
    ours = RunPaths.of("x")
    ours.make()
    ours.secret.touch()
    ours.remove()
    assert not default_parent().exists()
    with tempfile.TemporaryDirectory() as given:
        paths = RunPaths.of("x", given)
        paths.make()
        paths.remove()
        paths.remove()
        assert list(Path(given).iterdir()) == []
