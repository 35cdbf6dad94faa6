"""The run's secret: proofs, and the file it lies in."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mnemo.errors import SmpError
from mnemo.transport import auth

if TYPE_CHECKING:
    from collections.abc import Callable

SECRET = bytes(range(32))


def test_a_proof_convinces_the_other_side_only() -> None:
    mine, theirs = auth.new_nonce(), auth.new_nonce()
    proof = auth.proof(SECRET, "client", mine, theirs)
    assert auth.verify(SECRET, "client", mine, theirs, proof)
    assert not auth.verify(SECRET, "server", mine, theirs, proof), "it could be reflected"
    assert not auth.verify(SECRET, "server", theirs, mine, proof), "it could be reflected"
    assert not auth.verify(SECRET, "client", mine, auth.new_nonce(), proof), "it could be replayed"
    assert not auth.verify(bytes(32), "client", mine, theirs, proof)
    for wrong in (b"", proof[:-1], proof + b"\0", bytes(32)):
        assert not auth.verify(SECRET, "client", mine, theirs, wrong)


@given(st.lists(st.binary(max_size=4), max_size=4), st.lists(st.binary(max_size=4), max_size=4))
def test_a_mac_tells_apart_where_parts_end(one: list[bytes], other: list[bytes]) -> None:
    same = auth.mac(SECRET, "p", *one) == auth.mac(SECRET, "p", *other)
    assert same == (one == other)


def test_a_mac_is_of_one_purpose() -> None:
    assert auth.mac(SECRET, "one", b"x") != auth.mac(SECRET, "other", b"x")


def test_the_secret_is_made_once(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    first = auth.load_or_create_secret(path)
    assert len(first) == auth.SECRET_BYTES
    assert path.stat().st_mode & 0o777 == 0o600
    assert auth.load_or_create_secret(path) == first
    assert [p.name for p in tmp_path.iterdir()] == ["secret"]


def test_of_many_that_make_it_at_once_all_get_the_same(tmp_path: Path) -> None:
    found: list[bytes] = []
    barrier = threading.Barrier(8)

    def make() -> None:
        barrier.wait()
        found.append(auth.load_or_create_secret(tmp_path / "secret"))

    threads = [threading.Thread(target=make) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len(set(found)) == 1


def test_one_that_a_crash_left_empty_is_filled(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.touch(0o600)
    assert len(auth.load_or_create_secret(path)) == auth.SECRET_BYTES


def test_open_to_others_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    auth.load_or_create_secret(path)
    path.chmod(0o640)
    with pytest.raises(SmpError, match=r"open to others \(mode 640\): chmod 600"):
        auth.load_or_create_secret(path)


def test_too_short_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.write_bytes(b"abc")
    path.chmod(0o600)
    with pytest.raises(SmpError, match="holds 3 bytes; at least 16"):
        auth.load_or_create_secret(path)


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo], ids=["directory", "pipe"])
def test_what_is_no_file_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[Path], None]
) -> None:
    monkeypatch.setenv("MNEMO_SECRET_FILE", str(tmp_path / "given"))
    make(tmp_path / "given")
    (tmp_path / "given").chmod(0o700)
    with pytest.raises(SmpError, match="given is no file"):
        auth.load_or_create_secret(tmp_path / "secret")


def test_a_link_in_place_of_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "other").write_bytes(SECRET)
    (tmp_path / "secret").symlink_to(tmp_path / "other")
    with pytest.raises(SmpError, match="cannot be read"):
        auth.load_or_create_secret(tmp_path / "secret")


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a file to another user")
def test_another_users_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    auth.load_or_create_secret(path)
    os.chown(path, 65534, 65534)
    with pytest.raises(SmpError, match="belongs to uid 65534"):
        auth.load_or_create_secret(path)


def test_a_given_file_is_used_and_never_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = tmp_path / "given"
    monkeypatch.setenv("MNEMO_SECRET_FILE", str(given))
    with pytest.raises(SmpError, match="cannot be read: No such file"):
        auth.load_or_create_secret(tmp_path / "secret")
    given.write_bytes(SECRET)
    given.chmod(0o400)
    assert auth.load_or_create_secret(tmp_path / "secret") == SECRET
    assert not (tmp_path / "secret").exists()


def test_a_directory_that_is_gone_is_told_apart(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        auth.load_or_create_secret(tmp_path / "gone" / "secret")
