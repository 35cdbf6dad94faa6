"""A ledger keeps the last thing that was written whole."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from typing import TYPE_CHECKING

import pytest

from mnemo.errors import IntegrityError
from mnemo.smp import ledger
from mnemo.smp.ledger import Ledger

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def book() -> Iterator[Ledger]:
    made = Ledger("test")
    yield made
    made.close()


def _content(tick: int) -> bytes:
    """Other bytes, and another length, at each tick."""
    return random.Random(tick).randbytes(20_000 + tick % 1000)


def test_nothing_is_read_where_nothing_was_written(book: Ledger) -> None:
    with pytest.raises(IntegrityError, match="nothing"):
        ledger.read(book.fd)


def test_the_newest_is_read(book: Ledger) -> None:
    for tick in range(2, 12, 2):
        book.write(tick, _content(tick))
        assert ledger.read(book.fd) == ledger.Entry(tick, _content(tick))


def test_a_torn_one_gives_the_one_before(book: Ledger) -> None:
    for tick in (2, 4, 6):
        book.write(tick, _content(tick))
    # The slot of 6 was the first again.
    os.pwrite(book.fd, b"torn", 4096 + 10_000)
    assert ledger.read(book.fd) == ledger.Entry(4, _content(4))


def test_a_torn_description_gives_the_one_before(book: Ledger) -> None:
    book.write(2, _content(2))
    book.write(4, _content(4))
    os.pwrite(book.fd, (1 << 60).to_bytes(8, "little"), 128 + 16)  # its length
    assert ledger.read(book.fd).tick == 2


def test_what_is_empty_can_be_kept(book: Ledger) -> None:
    book.write(2, b"")
    assert ledger.read(book.fd) == ledger.Entry(2, b"")


def test_what_does_not_fit_is_told(book: Ledger) -> None:
    assert book.fits(64 << 10)
    assert not book.fits(10 << 20)
    larger = Ledger("test", 10 << 20)
    try:
        assert larger.fits(10 << 20)
    finally:
        larger.close()


def test_another_memory_is_refused() -> None:
    fd = os.memfd_create("other")
    try:
        with pytest.raises(IntegrityError, match="no ledger"):
            ledger.read(fd)
        os.truncate(fd, 1 << 20)
        with pytest.raises(IntegrityError, match="no ledger"):
            ledger.read(fd)
    finally:
        os.close(fd)


def _write_for_ever(book: Ledger) -> None:
    tick = 0
    while True:
        tick += 2
        book.write(tick, _content(tick))


def test_a_writer_killed_at_any_instant_leaves_one_that_is_whole() -> None:
    context = multiprocessing.get_context("fork")
    choice = random.Random()
    for _ in range(20):
        book = Ledger("test")
        try:
            writer = context.Process(target=_write_for_ever, args=(book,))
            writer.start()
            while not _has_begun(book):
                assert writer.is_alive()
                time.sleep(0.001)
            time.sleep(choice.uniform(0, 0.01))  # any instant
            os.kill(writer.pid or 0, signal.SIGKILL)
            writer.join()
            writer.close()
            entry = ledger.read(book.fd)
            assert entry.content == _content(entry.tick)
        finally:
            book.close()


def _has_begun(book: Ledger) -> bool:
    try:
        return ledger.read(book.fd).tick >= 4
    except IntegrityError:
        return False
