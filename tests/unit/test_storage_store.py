"""The store on a local directory and in memory."""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING

import pytest
from storage_suite import Place, StoreSuite, read, read_while_pruning, steps, write

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


class TestLocal(StoreSuite):
    @pytest.fixture
    def place(self, tmp_path: Path) -> Place:
        return Place(str(tmp_path / "not" / "yet" / "made"), {})

    def test_a_reader_while_the_writer_prunes(self, place: Place) -> None:
        read_while_pruning(place, rounds=150)

    def test_foreign_entries_are_passed_over(self, place: Place, tmp_path: Path) -> None:
        store = place.open(keep=1)
        write(store, 10)
        root = tmp_path / "not" / "yet" / "made" / "run-7"
        for name in ("README", "step-10", "step-000000000005.tmp"):
            (root / name).write_text("a user's own")
        (root / "step-000000000007").write_text("a file where a directory is expected")
        assert steps(store) == [10]
        write(store, 20)
        assert steps(store) == [20]
        assert {entry.name for entry in root.iterdir()} == {
            "README",
            "step-10",
            "step-000000000005.tmp",
            "step-000000000020",
        }

    def test_a_relative_path_and_a_file_url_are_the_same_place(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        write(Place("ckpt", {}).open(), 10)
        store = Place(f"file://{tmp_path}/ckpt/", {}).open()
        assert read(store, store.get(10))
        assert (tmp_path / "ckpt" / "run-7" / "step-000000000010" / "COMMITTED.json").is_file()


class TestMemory(StoreSuite):
    @pytest.fixture
    def place(self) -> Iterator[Place]:
        place = Place(f"memory://{uuid.uuid4().hex}", {})
        yield place
        if place.fs.exists(place.path):
            place.fs.rm(place.path, recursive=True)
