"""The snapshot process holds each rank's ledger for whoever comes in that rank's place."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING

import pytest
import smp_lab
from smp_lab import Rank, run_directory

from mnemo.errors import ProtocolError
from mnemo.smp import ledger
from mnemo.smp import messages as m
from mnemo.smp.ledger import Ledger
from mnemo.smp.link import Link

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mnemo.smp.client import SmpClient
    from mnemo.smp.paths import RunPaths


@pytest.fixture
def paths() -> Iterator[RunPaths]:
    with run_directory() as made:
        yield made


@pytest.fixture
def book() -> Iterator[Ledger]:
    made = Ledger("mnemo:test")
    yield made
    made.close()


def _fetched(client: SmpClient, rank: int = 0, fit: int = 0) -> ledger.Entry | None:
    _, fds = client.ask(m.FetchLedger(fit, rank), m.Ledgers)
    try:
        return ledger.read(fds[0]) if fds else None
    finally:
        for fd in fds:
            os.close(fd)


def test_it_outlives_its_rank_without_a_message_for_what_was_written(
    paths: RunPaths, book: Ledger
) -> None:
    other, rank = Rank.join(paths, 1, 2), Rank.join(paths, 0, 2)
    rank.client.tell(m.KeepLedger(), [book.fd])
    book.write(2, b"two")
    book.write(4, b"four")
    rank.close()
    assert _fetched(other.client) == ledger.Entry(4, b"four")
    assert _fetched(other.client, rank=1) is None
    assert _fetched(other.client, fit=1) is None
    successor = Rank.join(paths, 0, 2)
    assert _fetched(successor.client) == ledger.Entry(4, b"four")
    successor.close()
    other.close()


def test_a_larger_one_takes_its_place(paths: RunPaths, book: Ledger) -> None:
    rank = Rank.join(paths)
    rank.client.tell(m.KeepLedger(), [book.fd])
    book.write(2, b"two")
    larger = Ledger("mnemo:test", 1 << 20)
    try:
        larger.write(4, b"four")
        rank.client.tell(m.KeepLedger(), [larger.fd])
    finally:
        larger.close()
    assert _fetched(rank.client) == ledger.Entry(4, b"four")
    rank.close()


def test_it_goes_with_what_is_begun_anew(paths: RunPaths, book: Ledger) -> None:
    rank = Rank.join(paths)
    rank.client.tell(m.KeepLedger(), [book.fd])
    book.write(2, b"two")
    rank.client.tell(m.Resume(2))
    assert _fetched(rank.client) == ledger.Entry(2, b"two")  # it goes on
    rank.client.tell(m.Resume(-1))
    assert _fetched(rank.client) is None
    rank.close()


def test_a_descriptor_has_to_come_along(paths: RunPaths) -> None:
    rank = Rank.join(paths)
    with pytest.raises(ProtocolError, match="0 descriptors"):
        rank.client.tell(m.KeepLedger())
    rank.close()


def test_the_next_snapshot_process_gets_it(paths: RunPaths, book: Ledger) -> None:
    link = Link(paths, m.Join(0, 0, 1, 60.0))
    link.keep_ledger(book.fd)
    book.write(2, b"two")
    os.kill(link.smp_pid, signal.SIGKILL)
    smp_lab.wait_for_exit(link.smp_pid)
    link.look()
    with smp_lab.connect(paths) as tool:
        assert _fetched(tool) == ledger.Entry(2, b"two")
    link.leave(finished=True)


def test_its_memory_is_given_back(paths: RunPaths, book: Ledger) -> None:
    rank = Rank.join(paths)
    before = smp_lab.memory_of(rank.client.pid)
    rank.client.tell(m.KeepLedger(), [book.fd])
    assert smp_lab.memory_of(rank.client.pid) > before
    rank.client.tell(m.Leave(finished=True))
    assert smp_lab.memory_of(rank.client.pid) == 0
    rank.close()
