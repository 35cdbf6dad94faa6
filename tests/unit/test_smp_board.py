"""The shared page: schedule, stop, positions; readable after a rank's death."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from mnemo.errors import ProtocolError
from mnemo.smp.board import Board, Position

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def board() -> Iterator[Board]:
    made = Board.create(3)
    yield made
    made.close()
    made.close()


def test_two_generations_stay_scheduled(board: Board) -> None:
    assert not board.is_scheduled(0)
    for tick in (3, 7, 9):
        board.schedule(tick)
    assert [tick for tick in range(12) if board.is_scheduled(tick)] == [7, 9]


def test_stop(board: Board) -> None:
    assert (board.stop_requested(), board.stop_at()) == (False, -1)
    board.request_stop()
    board.set_stop(12)
    assert (board.stop_requested(), board.stop_at()) == (True, 12)
    board.schedule(3)
    board.reset()
    assert (board.stop_requested(), board.stop_at(), board.is_scheduled(3)) == (False, -1, False)


def test_positions_of_another_process_outlive_it(board: Board) -> None:
    code = (
        "import sys; from mnemo.smp.board import Board, Position\n"
        "Board(int(sys.argv[1])).report(2, Position(34, 17, 1, 5, 99.5))\n"
        "import os; os.kill(os.getpid(), 9)"
    )
    fd = os.dup(board.fd)
    subprocess.run([sys.executable, "-c", code, str(fd)], pass_fds=[fd], check=False)
    os.close(fd)
    assert board.position(2) == Position(34, 17, 1, 5, 99.5)
    assert board.positions() == [
        {"slot": 2, "tick": 34, "step": 17, "epoch": 1, "batch": 5, "time": 99.5}
    ]


def test_the_last_of_many_ranks_has_room() -> None:
    board = Board.create(200)
    board.report(199, Position(1, 1, 1, 1, 1.0))
    assert len(board.positions()) == 1
    board.close()


def test_taken_over_it_is_the_same_page(board: Board) -> None:
    other = Board.taken_over(board.fd, 3)
    board.schedule(5)
    assert other.is_scheduled(5)
    other.close()
    board.schedule(6)


def test_anything_else_is_not_taken_over(board: Board) -> None:
    with pytest.raises(ProtocolError, match="no board of 500 ranks"):
        Board.taken_over(board.fd, 500)
    growing = os.memfd_create("mnemo:x")
    os.ftruncate(growing, 4096)
    reader, writer = os.pipe()
    for fd in (growing, reader):
        with pytest.raises(ProtocolError, match="no board"):
            Board.taken_over(fd, 3)
    for fd in (growing, reader, writer):
        os.close(fd)
