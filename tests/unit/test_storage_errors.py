"""Stores that refuse, fill up, lie or do not exist: a `StorageError` that says what to do."""

from __future__ import annotations

import os
import socket
import subprocess
import traceback
from typing import TYPE_CHECKING, Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem
from storage_suite import Place, content, read, source, steps, write

from mnemo.errors import ConfigError, StorageError
from mnemo.storage import CheckpointStore

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a 1 MiB file system on a new directory; called again, changes its options."""
    target = tmp_path / "mount"
    target.mkdir()

    def call(options: str) -> Path:
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(target)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"mounting is not allowed here: {done.stderr.strip()}")
        return target

    yield call
    while target.is_mount():
        subprocess.run(["umount", str(target)], check=True)


def test_a_full_disk_loses_nothing_and_recovers(mount: Callable[[str], Path]) -> None:
    place = Place(str(mount("size=1m")), {})
    store = place.open(keep=5)
    write(store, 10, size=400_000)
    with pytest.raises(StorageError, match=r"No space left.*free space there.*persist\.keep"):
        write(store, 20, size=900_000)
    assert steps(store) == [10]
    assert read(store, store.get(10)) == content(10, 400_000)
    write(store, 30, size=400_000)  # what the failed attempt took was given back
    assert steps(store) == [30, 10]


def test_a_read_only_file_system_can_be_read_and_says_so_on_writing(
    mount: Callable[[str], Path],
) -> None:
    place = Place(str(mount("size=1m")), {})
    store = place.open(keep=1)
    write(store, 10)
    mount("remount,ro")
    with pytest.raises(StorageError, match=r"Read-only file system; let this user"):
        write(store, 20)
    assert read(store, store.get(10)) == content(10)


@pytest.fixture
def as_another_user(tmp_path: Path) -> Iterator[None]:
    """The superuser may write anywhere, so that it takes another's identity meanwhile."""
    tmp_path.chmod(0o500)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    yield
    os.seteuid(user)
    tmp_path.chmod(0o700)


@pytest.mark.usefixtures("as_another_user")
def test_a_directory_of_someone_else(tmp_path: Path) -> None:
    store = CheckpointStore(str(tmp_path), run_id="r")
    with pytest.raises(StorageError, match="Permission denied; let this user"):
        write(store, 10)


def test_a_failing_prune_does_not_fail_the_write(
    mount: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    path = mount("size=1m")
    store = Place(str(path), {}).open(keep=1)
    write(store, 10)
    held = path / "run-7" / f"step-{10:012d}"
    subprocess.run(["mount", "--bind", str(held), str(held)], check=True)  # busy: no rmdir
    try:
        write(store, 20)
    finally:
        subprocess.run(["umount", str(held)], check=True)
    assert steps(store) == [20]
    assert "checkpoint of step 20 is stored, old ones are not pruned" in caplog.text


def test_a_file_where_the_store_should_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    store = CheckpointStore(str(tmp_path / "file"), run_id="r")
    with pytest.raises(StorageError, match="Not a directory"):
        write(store, 10)


class ForgetfulFile(MemoryFile):
    """Drops what comes after the first 100 bytes and reports success."""

    def write(self, data: Any) -> int:
        super().write(bytes(data)[: max(0, 100 - self.tell())])
        return len(data)


class ForgetfulFileSystem(MemoryFileSystem):
    """A store that truncates without an error, as some object stores have done."""

    protocol = "forgetful"
    store: dict[str, Any] = {}  # noqa: RUF012 - the base class shares it too

    def _open(self, path: str, mode: str = "rb", **kwargs: Any) -> Any:
        if mode != "wb":
            return super()._open(path, mode, **kwargs)
        file = ForgetfulFile(self, path)
        file.commit()
        return file


def test_a_store_that_truncates_silently_is_caught_before_the_marker() -> None:
    fsspec.register_implementation("forgetful", ForgetfulFileSystem, clobber=True)
    store = CheckpointStore("forgetful://x", run_id="r")
    with pytest.raises(StorageError, match=r"holds 100 of the 1000 bytes written"):
        write(store, 10)
    assert store.checkpoints() == []
    assert not ForgetfulFileSystem.store


def test_an_unknown_protocol() -> None:
    with pytest.raises(StorageError, match=r"Protocol not known: nowhere; use .* s3://"):
        CheckpointStore("nowhere://x", run_id="r")


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "adlfs", None)
    with pytest.raises(StorageError, match="pip install adlfs"):
        CheckpointStore("abfs://container/x", run_id="r")


@pytest.mark.parametrize("account", ["ann:pa/ss", "token"])
def test_credentials_in_a_url_are_never_shown(account: str) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        url = f"ftp://{account.replace('/', '%2F')}@127.0.0.1:{port}/x"
        with pytest.raises(
            StorageError, match=r"ftp://\*\*\*@127.0.0.1.*check the address"
        ) as info:
            CheckpointStore(url, run_id="r")
    shown = "".join(traceback.format_exception(info.value))
    for secret in account.split(":"):
        assert secret.replace("/", "%2F") not in shown


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("memory://id:se/cr/et@bucket/x", "memory://***@bucket/x"),
        ("memory://bucket/x?sig=secret", "memory://bucket/x?***"),
        ("memory://bucket/a@b", "memory://bucket/a@b"),
        ("/data/a@b?c", "/data/a@b?c"),
    ],
)
def test_the_url_for_logs(url: str, shown: str) -> None:
    assert CheckpointStore(url, run_id="r").url == shown


def test_errors_of_a_store_with_credentials_hide_them() -> None:
    store = CheckpointStore("memory://id:secret@bucket", run_id="r")
    with pytest.raises(Exception, match=r"\*\*\*@bucket") as info:
        store.get(10)
    assert "secret" not in "".join(traceback.format_exception(info.value))


@pytest.mark.parametrize(
    "run_id", ["", ".", "..", "../x", "a/b", "/a", "a\n", "-a", "ü", "x" * 201]
)
def test_run_ids_that_are_no_directory_names(run_id: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be a directory name"):
        CheckpointStore(str(tmp_path), run_id=run_id)


def test_settings_out_of_bounds(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"persist\.keep is 0"):
        CheckpointStore(str(tmp_path), run_id="r", keep=0)
    with pytest.raises(ConfigError, match=r"persist\.to"):
        CheckpointStore("", run_id="r")


def test_an_unreadable_marker_is_an_error_not_an_absence(tmp_path: Path) -> None:
    store = CheckpointStore(str(tmp_path), run_id="r")
    write(store, 10)
    (tmp_path / "r" / f"step-{20:012d}" / "COMMITTED.json").mkdir(parents=True)
    with pytest.raises(StorageError, match="could not read"):
        store.checkpoints()
    assert store.write(30, {"a": source(b"")}).step == 30  # pruning fails, and is only logged
