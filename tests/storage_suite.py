"""What every store must do: run against each file system that mnemo is tested on."""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING, Any

import fsspec
import numpy as np
import pytest

from mnemo.errors import IntegrityError, StorageError, WriteCancelledError
from mnemo.storage import Checkpoint, CheckpointStore

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

KEY = b"0123456789abcdef0123456789abcdef"
RUN = "run-7"
MARKER = "COMMITTED.json"
CHUNK = 4 << 20


class FrozenClock:
    """Always the same instant."""

    def monotonic(self) -> float:
        return 5.0

    def time(self) -> float:
        return 1_700_000_000.25


class Place:
    """One empty place on a store, with a view past mnemo to break things."""

    def __init__(self, url: str, options: Mapping[str, Any]) -> None:
        self.url = url
        self.options = dict(options)
        self.fs, self.path = fsspec.core.url_to_fs(url, **self.options)

    def open(self, run_id: str = RUN, **kwargs: Any) -> CheckpointStore:
        return CheckpointStore(self.url, run_id=run_id, storage_options=self.options, **kwargs)

    def file(self, step: int, name: str, run_id: str = RUN) -> str:
        return f"{self.path}/{run_id}/step-{step:012d}/{name}"

    def names(self, run_id: str = RUN) -> list[str]:
        """Names of all files of a run, relative to it."""
        self.fs.invalidate_cache()
        root = f"{self.path}/{run_id}"
        try:
            return sorted(found.rpartition(f"/{run_id}/")[2] for found in self.fs.find(root))
        except FileNotFoundError:
            return []

    def get(self, path: str) -> bytes:
        return self.fs.cat_file(path)

    def put(self, path: str, content: bytes) -> None:
        if self.fs.protocol == ("file", "local"):
            self.fs.makedirs(path.rpartition("/")[0], exist_ok=True)
        self.fs.pipe_file(path, content)


def content(step: int, size: int = 1000) -> bytes:
    return np.random.default_rng(step).bytes(size)


def source(*chunks: Any) -> Callable[[], Iterable[Any]]:
    return lambda: iter(chunks)


def write(store: CheckpointStore, step: int, size: int = 1000) -> Checkpoint:
    return store.write(step, {"rank-0.bin": source(content(step, size))}, {"step": step})


def read(store: CheckpointStore, checkpoint: Checkpoint, name: str = "rank-0.bin") -> bytes:
    buffer = bytearray(checkpoint.part(name).size)
    store.read_into(checkpoint, name, buffer)
    return bytes(buffer)


def steps(store: CheckpointStore) -> list[int]:
    return [checkpoint.step for checkpoint in store.checkpoints()]


class StoreSuite:
    """Subclasses give a fixture ``place``."""

    def test_what_was_written_is_listed_and_read(self, place: Place) -> None:
        store = place.open(clock=FrozenClock())
        matrix = np.arange(12, dtype=np.float32).reshape(3, 4)
        big = content(1, CHUNK + 3)
        written = store.write(
            1841,
            {
                "rank-0.bin": source(big[:10], memoryview(big)[10:]),
                "rank-1.bin": source(matrix, np.zeros((0, 4))),
                "empty": source(),
            },
            {"loss": 1.5, "note": "é", "exact": True, "epoch": 2, "none": None},
        )
        assert [(part.name, part.size) for part in written.parts] == [
            ("rank-0.bin", CHUNK + 3),
            ("rank-1.bin", 48),
            ("empty", 0),
        ]
        assert written.created == 1_700_000_000.25
        assert place.open().checkpoints() == [written]
        assert place.open().get(1841) == written
        assert read(store, written) == big
        assert read(store, written, "empty") == b""
        back = np.empty((3, 4), np.float32)
        store.read_into(written, "rank-1.bin", back)
        np.testing.assert_array_equal(back, matrix)

    def test_an_empty_store_lists_nothing(self, place: Place) -> None:
        assert place.open().checkpoints() == []
        with pytest.raises(IntegrityError, match="no complete checkpoint"):
            place.open().get(3)

    def test_a_trial_leaves_nothing(self, place: Place) -> None:
        store = place.open()
        store.try_write()
        assert place.names() == []
        written = write(store, 5)
        store.try_write()
        assert store.checkpoints() == [written]

    def test_newest_first_and_runs_are_apart(self, place: Place) -> None:
        store, other = place.open(keep=9), place.open("other")
        for step in (5, 1000, 30):
            write(store, step)
        write(other, 7)
        assert steps(store) == [1000, 30, 5]
        assert steps(other) == [7]

    def test_pruning_keeps_the_newest(self, place: Place) -> None:
        store = place.open(keep=2)
        for step in (10, 20, 30):
            write(store, step)
        assert steps(store) == [30, 20]
        assert place.names() == [
            f"step-{step:012d}/{name}" for step in (20, 30) for name in (MARKER, "rank-0.bin")
        ]

    def test_pruning_removes_older_leftovers_only(self, place: Place) -> None:
        store = place.open(keep=1)
        place.put(place.file(10, "rank-0.bin"), b"left by a crash")
        place.put(place.file(11, MARKER), b"")
        place.put(place.file(40, "rank-0.bin"), b"of a later attempt")
        write(store, 30)
        assert place.names() == [
            f"step-{30:012d}/{MARKER}",
            f"step-{30:012d}/rank-0.bin",
            f"step-{40:012d}/rank-0.bin",
        ]

    def test_pruning_after_a_rollback_spares_what_was_just_written(self, place: Place) -> None:
        store = place.open(keep=2)
        for step in (100, 200):
            write(store, step)
        for step in (50, 60, 70):
            write(store, step)
        assert steps(store) == [200, 100, 70, 60]

    def test_pruning_leaves_what_it_cannot_judge(self, place: Place) -> None:
        write(place.open(key=b"another key"), 10)
        store = place.open(keep=1, key=KEY)
        write(store, 20)
        assert steps(store) == [20]
        assert steps(place.open()) == [20, 10]

    def test_the_same_step_again_replaces_all_of_it(self, place: Place) -> None:
        store = place.open()
        store.write(10, {"old.bin": source(b"old"), "rank-0.bin": source(b"longer than new")})
        again = store.write(10, {"rank-0.bin": source(b"new")})
        assert store.checkpoints() == [again]
        assert read(store, again) == b"new"
        assert place.names() == [f"step-{10:012d}/{MARKER}", f"step-{10:012d}/rank-0.bin"]

    def test_a_failing_source_leaves_nothing(self, place: Place) -> None:
        def broken() -> Iterator[bytes]:
            yield b"x" * 100
            raise IntegrityError("segment damaged")

        store = place.open()
        write(store, 10)
        with pytest.raises(IntegrityError, match="segment damaged"):
            store.write(20, {"a.bin": source(b"whole"), "rank-0.bin": broken})
        assert steps(store) == [10]
        assert read(store, store.get(10)) == content(10)
        assert not [name for name in place.names() if "20" in name]

    @pytest.mark.parametrize("after_bytes", [0, 1, CHUNK, 2 * CHUNK])
    def test_cancelling_leaves_no_checkpoint(self, place: Place, after_bytes: int) -> None:
        cancel = threading.Event()

        def chunks() -> Iterator[bytes]:
            yield b"x" * after_bytes
            cancel.set()
            yield b"never stored"

        store = place.open()
        write(store, 10)
        with pytest.raises(WriteCancelledError):
            store.write(20, {"rank-0.bin": chunks}, cancel=cancel)
        assert steps(store) == [10]
        assert not [name for name in place.names() if "20" in name]
        assert steps(place.open()) == [10]
        write(store, 20)
        assert steps(store) == [20, 10]

    def test_deleting(self, place: Place) -> None:
        store = place.open()
        write(store, 10)
        write(store, 20)
        store.delete(10)
        store.delete(10)
        store.delete(999)
        assert steps(store) == [20]

    @pytest.mark.parametrize("at", [0, 500, 999])
    def test_a_flipped_byte_is_noticed(self, place: Place, at: int) -> None:
        store = place.open()
        checkpoint = write(store, 10)
        stored = bytearray(place.get(place.file(10, "rank-0.bin")))
        stored[at] ^= 1
        place.put(place.file(10, "rank-0.bin"), bytes(stored))
        with pytest.raises(IntegrityError, match=r"rank-0.bin.*step-0+10 is not what was written"):
            read(store, checkpoint)

    @pytest.mark.parametrize("change", [lambda b: b[:-1], lambda b: b"", lambda b: b + b"x"])
    def test_another_length_is_noticed(
        self, place: Place, change: Callable[[bytes], bytes]
    ) -> None:
        store = place.open()
        checkpoint = write(store, 10)
        stored = place.get(place.file(10, "rank-0.bin"))
        place.put(place.file(10, "rank-0.bin"), change(stored))
        with pytest.raises(IntegrityError, match="truncated or damaged"):
            read(store, checkpoint)

    def test_a_missing_part_is_noticed(self, place: Place) -> None:
        store = place.open()
        checkpoint = write(store, 10)
        place.fs.rm_file(place.file(10, "rank-0.bin"))
        with pytest.raises(IntegrityError, match="missing"):
            read(store, checkpoint)

    def test_a_damaged_marker_is_left_out_with_a_warning(
        self, place: Place, caplog: pytest.LogCaptureFixture
    ) -> None:
        store = place.open()
        write(store, 10)
        write(store, 20)
        whole = place.get(place.file(20, MARKER))
        for damaged in (whole[:-1], whole.replace(b"1000", b"1001"), b"{}", b"\xff\x00", b"null"):
            place.put(place.file(20, MARKER), damaged)
            caplog.clear()
            with caplog.at_level(logging.WARNING):
                assert steps(store) == [10]
            assert "step-000000000020 cannot be used: the marker" in caplog.text
            with pytest.raises(IntegrityError, match=r"step-0+20 cannot be used"):
                store.get(20)

    def test_a_newer_format_is_refused_by_name(
        self, place: Place, caplog: pytest.LogCaptureFixture
    ) -> None:
        store = place.open()
        write(store, 10)
        newer = b'{"body":{"format":"mnemo-checkpoint","version":2,"x":[]},"xxh3_128":"?"}'
        place.put(place.file(20, MARKER), newer)
        with pytest.raises(IntegrityError, match=r"version 2 is newer than 1.*upgrade"):
            store.get(20)
        assert steps(store) == [10]
        assert "version 2 is newer" in caplog.text

    def test_a_marker_of_another_run_or_step_does_not_count(self, place: Place) -> None:
        write(place.open("theirs"), 10)
        marker = place.get(place.file(10, MARKER, "theirs"))
        place.put(place.file(10, MARKER), marker)
        place.put(place.file(11, MARKER, "theirs"), marker)
        with pytest.raises(IntegrityError, match="belongs to run 'theirs', step 10"):
            place.open().get(10)
        assert steps(place.open()) == []
        assert steps(place.open("theirs")) == [10]

    def test_a_key_demands_its_own_signature(self, place: Place) -> None:
        write(place.open(key=KEY), 10)
        assert steps(place.open(key=KEY)) == [10]
        assert steps(place.open()) == [10]
        with pytest.raises(IntegrityError, match="another key"):
            place.open(key=b"wrong").get(10)
        write(place.open(), 20)
        with pytest.raises(IntegrityError, match="no MAC"):
            place.open(key=KEY).get(20)
        assert steps(place.open(key=KEY)) == [10]

    def test_bad_arguments_touch_nothing(self, place: Place) -> None:
        store = place.open()
        checkpoint = write(store, 10)
        before = place.names()
        for step in (-1, 10**12):
            with pytest.raises(ValueError, match=f"step is {step}"):
                store.write(step, {"a": source(b"")})
        for name in ("", "../a", "a/b", ".a", "a\n", "a b", "x" * 201, MARKER, "committed.JSON"):
            with pytest.raises(ValueError, match="part name"):
                store.write(10, {name: source(b"")})
        for meta in ({"a": [1]}, {"a": float("nan")}, {"a": float("inf")}, {"a": object()}, {1: 2}):
            with pytest.raises(ValueError, match="meta must"):
                store.write(10, {"a": source(b"")}, meta)
        with pytest.raises(ValueError, match=r"no part 'b'; it has: rank-0.bin"):
            store.read_into(checkpoint, "b", bytearray(1))
        with pytest.raises(ValueError, match="1000 bytes, got a writable one of 999"):
            store.read_into(checkpoint, "rank-0.bin", bytearray(999))
        with pytest.raises(ValueError, match="a read-only one"):
            store.read_into(checkpoint, "rank-0.bin", bytes(1000))
        assert place.names() == before
        assert read(store, checkpoint) == content(10)


def read_or_pruned(store: CheckpointStore, checkpoint: Checkpoint) -> int | None:
    """Reads a checkpoint that may be deleted meanwhile; returns its step if it was all there."""
    try:
        assert read(store, checkpoint) == content(checkpoint.step)
    except IntegrityError as err:
        if "missing" not in str(err):
            raise
        return None
    return checkpoint.step


def read_while_pruning(place: Place, rounds: int) -> None:
    """A reader that lists and reads the newest, while a writer keeps only one checkpoint."""
    done = threading.Event()
    refused: list[Exception] = []
    writer = place.open(keep=1)
    write(writer, 1)

    def keep_writing() -> None:
        try:
            for step in range(2, rounds):
                write(writer, step)
        except StorageError as err:
            refused.append(err)
        finally:
            done.set()

    thread = threading.Thread(target=keep_writing)
    thread.start()
    reader, seen = place.open(), set()
    try:
        while not done.is_set():
            seen.update(read_or_pruned(reader, found) for found in reader.checkpoints())
    finally:
        thread.join()
    assert refused == []
    assert seen - {None}, "the reader never got a whole checkpoint"
    assert steps(reader) == [rounds - 1]
