"""A restarted rank reads the newest snapshot while it sets up, and uses it only if it still is."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import pytest
import smp_lab
import torch
from lightning_client import Lab, kill_at, until_it_ends

from lightning_mnemo import MnemoCallback
from mnemo.config import load_config
from mnemo.recovery.control import JOIN_VARIABLE
from mnemo.session import prefetch
from mnemo.session.identity import RunIdentity
from mnemo.session.keeper import End, Keeper
from mnemo.session.place import Place
from mnemo.smp import lifecycle
from mnemo.smp import messages as m
from mnemo.smp.board import Position
from mnemo.smp.ledger import Ledger
from mnemo.smp.memory import MemoryLimit
from mnemo.smp.paths import RunPaths
from mnemo.smp.segment import PAGE
from mnemo.snapshot import restore

if TYPE_CHECKING:
    from collections.abc import Iterator

AHEAD_SCRIPT = Path(__file__).parents[1] / "scripts" / "lightning_ahead.py"
SIZE = 300_000
"""Elements of the float32 tensor that is the state: more than one chunk."""


AHEAD = "mnemo-prefetch"
HERE = "MainThread"
"""Threads that read."""


@pytest.fixture(autouse=True)
def restarted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """This process has begun no training yet, and a launcher started it as rank 0."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(prefetch, "_begun", [])
    yield
    settle()


@pytest.fixture
def readers(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the threads that read a snapshot's tensors, in order."""
    found: list[str] = []
    original = restore.read_tensors

    def read_tensors(*args: Any) -> Any:
        found.append(threading.current_thread().name)
        return original(*args)

    monkeypatch.setattr(restore, "read_tensors", read_tensors)
    monkeypatch.setattr(prefetch, "read_tensors", read_tensors)
    return found


def settle() -> None:
    """Wait until nothing is read ahead any more."""
    for thread in threading.enumerate():
        if thread.name == AHEAD:
            thread.join(30.0)


def begin(**run: str) -> None:
    prefetch.begin(load_config(run={"id": "lab", **run}, snapshot={"every": 1}))
    settle()


def keeper() -> Keeper:
    config = load_config(run={"id": "lab"}, snapshot={"every": 1})
    return Keeper(config, RunIdentity("lab", stable=True, source="run.id"), Place())


def state(step: int) -> dict[str, torch.Tensor]:
    return {"w": torch.full((SIZE,), float(step))}


def train(steps: int) -> None:
    """One life, which goes on from the newest snapshot and is interrupted."""
    one = keeper()
    found = one.find()
    done = 0 if found is None else found.step
    if found is None:
        one.forget()
    else:
        one.accept(found, {}, [])
    one.begin({})
    for step in range(done + 1, done + steps + 1):
        one.boundary(Position(2 * step, step, 0, step, time.time()), lambda s=step: state(s))  # type: ignore[misc]
        assert one.settle()
    one.close(End.INTERRUPTED)


@contextlib.contextmanager
def left_by(steps: int) -> Iterator[None]:
    """An earlier life took ``steps`` snapshots and was interrupted."""
    with smp_lab.run_directory():
        train(steps)
        prefetch._begun.clear()
        yield


def found() -> tuple[int, int]:
    """Step that the next life goes on from, and how many damaged snapshots it passed over."""
    one = keeper()
    try:
        restored = one.find()
        assert restored is not None
        assert torch.equal(restored.state["w"], state(restored.step)["w"])
        return restored.step, one._finder.damaged
    finally:
        one.close(End.INTERRUPTED)


def damage() -> None:
    """Flip a byte of the newest snapshot."""
    one = keeper()
    _, fds = one._link.ask(m.Fetch(), m.Fetched)
    before = os.pread(fds[0], 1, PAGE + 1000)
    os.pwrite(fds[0], bytes([before[0] ^ 1]), PAGE + 1000)
    os.close(fds[0])
    one.close(End.INTERRUPTED)


def test_what_was_read_ahead_is_not_read_again(readers: list[str]) -> None:
    with left_by(2):
        begin()
        assert readers == [AHEAD]
        assert found() == (2, 0)
        assert readers == [AHEAD]


@pytest.mark.parametrize(("lost_at", "reads"), [(4, [AHEAD]), (2, [])])
def test_for_a_lost_rank_only_what_was_taken_where_it_was_lost(
    monkeypatch: pytest.MonkeyPatch, readers: list[str], lost_at: int, reads: list[str]
) -> None:
    with left_by(2):
        book, one = Ledger("mnemo:test"), keeper()
        book.write(lost_at, b"its own")
        one._link.keep_ledger(book.fd)
        one.close(End.INTERRUPTED)
        book.close()
        monkeypatch.setenv(JOIN_VARIABLE, "1")
        readers.clear()
        prefetch._begun.clear()
        begin()
        assert readers == reads


def test_it_is_waited_for(monkeypatch: pytest.MonkeyPatch, readers: list[str]) -> None:
    with left_by(2):
        asked = threading.Event()
        original = prefetch.read_tensors

        def slow(*args: Any) -> Any:
            assert asked.wait(30.0)
            return original(*args)

        monkeypatch.setattr(prefetch, "read_tensors", slow)
        prefetch.begin(load_config(run={"id": "lab"}))
        take = prefetch.take

        def taken(*args: Any) -> Any:
            asked.set()
            return take(*args)

        monkeypatch.setattr(prefetch, "take", taken)
        assert found() == (2, 0)
        assert readers == [AHEAD]


def test_only_the_first_training_of_a_process_uses_it(readers: list[str]) -> None:
    with left_by(2):
        begin()
        assert found() == (2, 0)
        begin()
        assert found() == (2, 0)
        assert readers == [AHEAD, HERE]


def test_a_newer_snapshot_is_read_instead(readers: list[str]) -> None:
    with left_by(2):
        begin()
        ahead = list(prefetch._begun)
        prefetch._begun.clear()
        train(1)
        prefetch._begun[:] = ahead
        assert found() == (3, 0)
        assert readers == [AHEAD, HERE, HERE]


def test_another_snapshot_of_the_same_number_is_read_instead(readers: list[str]) -> None:
    """The run was begun anew meanwhile: same tick, same step, other bytes."""
    with left_by(2):
        begin()
        ahead = list(prefetch._begun)
        one = keeper()
        one.forget()
        one.begin({"script": "another"})
        for step in (1, 2):
            position = Position(2 * step, step, 0, step, time.time())
            one.boundary(position, lambda: {"w": -torch.ones(SIZE)})
            assert one.settle()
        one.close(End.INTERRUPTED)
        prefetch._begun[:] = ahead
        one = keeper()
        restored = one.find()
        one.close(End.INTERRUPTED)
        assert restored is not None
        assert restored.step == 2
        assert torch.equal(restored.state["w"], -torch.ones(SIZE))
        assert readers == [AHEAD, HERE]


def test_one_that_was_given_up_is_not_used(readers: list[str]) -> None:
    with left_by(2):
        begin()
        ahead = list(prefetch._begun)
        one = keeper()
        one.forget()
        one.close(End.INTERRUPTED)
        prefetch._begun[:] = ahead
        one = keeper()
        assert one.find() is None
        one.close(End.INTERRUPTED)
        assert prefetch._begun == [None], "what was read is held for nothing"
        assert readers == [AHEAD]


def test_a_damaged_one_is_refused_as_ever(
    readers: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    with left_by(2):
        damage()
        with caplog.at_level(logging.WARNING, "mnemo"):
            begin()
            assert caplog.messages == []
            assert found() == (1, 1)
        assert readers == [AHEAD, HERE, HERE]
        assert [r for r in caplog.messages if "the snapshot of step 2 is not used" in r]


def test_one_that_is_damaged_after_it_was_read_is_used(readers: list[str]) -> None:
    """The bytes here have been checked, whatever became of those they were read from."""
    with left_by(2):
        begin()
        damage()
        assert found() == (2, 0)
        assert readers == [AHEAD]


@pytest.mark.parametrize("why", ["never", "rank", "run", "other rank", "memory"])
def test_nothing_is_read_ahead_without_need(
    monkeypatch: pytest.MonkeyPatch, readers: list[str], why: str
) -> None:
    run: dict[str, str] = {}
    if why == "never":
        run = {"resume": "never"}
    elif why == "rank":
        monkeypatch.delenv("RANK")
    elif why == "other rank":
        monkeypatch.setenv("RANK", "1")
    elif why == "run":
        run = {"id": "another"}
    else:
        monkeypatch.setattr(
            prefetch, "memory_limit", lambda: MemoryLimit(2 * 4 * SIZE - 1, 1 << 40, "host")
        )
    with left_by(2):
        begin(**run)
        assert readers == []
        assert found() == (2, 0)
        assert readers == [HERE]


def test_it_does_not_start_a_snapshot_process(tmp_path: Path, readers: list[str]) -> None:
    begin(dir=str(tmp_path))
    assert list(tmp_path.iterdir()) == []
    assert readers == []


def test_a_dead_snapshot_process_is_no_error(readers: list[str]) -> None:
    with smp_lab.run_directory() as paths:
        smp_lab.Rank.join(paths).close()
        record = paths.record.read_bytes()
        smp_lab.end(paths)
        paths.make()
        paths.record.write_bytes(record)
        begin()
        assert readers == []


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_a_process_forked_meanwhile_reads_for_itself(
    monkeypatch: pytest.MonkeyPatch, readers: list[str]
) -> None:
    """The thread that reads is not there in the child: nobody waits for it."""
    with left_by(2):
        forked = threading.Event()
        original = prefetch.read_tensors

        def slow(*args: Any) -> Any:
            assert forked.wait(30.0)
            return original(*args)

        monkeypatch.setattr(prefetch, "read_tensors", slow)
        prefetch.begin(load_config(run={"id": "lab"}))
        child = os.fork()
        if not child:
            code = 1
            try:
                code = 0 if prefetch.take({}, 0) is None else 2
            finally:
                os._exit(code)
        assert os.waitpid(child, 0)[1] == 0
        forked.set()
        assert found() == (2, 0)
        assert readers == [AHEAD]


def test_a_process_forked_meanwhile_does_not_keep_it(
    monkeypatch: pytest.MonkeyPatch, readers: list[str]
) -> None:
    """A loader's worker holds a copy of the connection for as long as it lives."""
    reading, forked = threading.Event(), threading.Event()
    original = prefetch.read_tensors

    def read_tensors(*args: Any) -> Any:
        reading.set()
        assert forked.wait(30.0)
        return original(*args)

    monkeypatch.setattr(prefetch, "read_tensors", read_tensors)
    with left_by(2):
        prefetch.begin(load_config(run={"id": "lab"}, snapshot={"every": 1}))
        assert reading.wait(30.0)
        here, there = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(there)
            os.read(here, 1)
            os._exit(0)
        forked.set()
        settle()
        assert readers == [AHEAD]
        client = lifecycle.find(RunPaths.of("lab", os.environ["MNEMO_RUN__DIR"]))
        assert client is not None
        with client:
            deadline = time.monotonic() + 20.0
            while client.status()["clients"] > 1:  # this one is one
                assert time.monotonic() < deadline
        os.close(here)
        os.close(there)
        os.waitpid(child, 0)


def test_a_callback_that_does_not_train_lets_go(readers: list[str]) -> None:
    with left_by(2):
        callback = MnemoCallback(run={"id": "lab"})
        settle()
        assert readers == [AHEAD]
        callback.setup(pl.Trainer(accelerator="cpu", logger=False), pl.LightningModule(), "test")
        assert prefetch._begun == [None]


def test_ranks_that_train_with_lightning_read_ahead(lab: Lab, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [AHEAD_SCRIPT, "--strategy=ddp", "--devices=2"]
    live = functools.partial(lab.script, out, *command, ranks=2, OUT=str(out))
    until_it_ends(live, out, kill_at("forward:3", rank=1))
    for rank in (0, 1):
        assert (out / f"readers-{rank}").read_text().split() == [AHEAD]
