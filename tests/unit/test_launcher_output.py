from __future__ import annotations

import asyncio
import fcntl
import os
import pty
import select
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from mnemo.launcher.output import RankLog, RankStream, Terminal

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@contextmanager
def piped() -> Iterator[tuple[int, int]]:
    """A pipe: what is written to the second end is read from the first."""
    read_end, write_end = os.pipe()
    fcntl.fcntl(write_end, fcntl.F_SETPIPE_SZ, 1 << 20)
    os.set_blocking(read_end, False)
    try:
        yield read_end, write_end
    finally:
        os.close(read_end)
        os.close(write_end)


@contextmanager
def screen() -> Iterator[tuple[int, int]]:
    """A pseudo-terminal, likewise."""
    master, slave = pty.openpty()
    os.set_blocking(master, False)
    try:
        yield master, slave
    finally:
        os.close(master)
        os.close(slave)


def read_screen(master: int, slave: int) -> bytes:
    """All that was written: the kernel passes it on in pieces, when it has time to."""
    mark = b"<end>"
    os.write(slave, mark)
    found = b""
    while not found.endswith(mark):
        assert select.select([master], [], [], 10.0)[0], found
        found += os.read(master, 1 << 20)
    return found.removesuffix(mark).replace(b"\r\n", b"\n")


def read(fd: int) -> bytes:
    try:
        return os.read(fd, 1 << 20).replace(b"\r\n", b"\n")
    except BlockingIOError:
        return b""


def show(
    chunks: list[tuple[int, bytes]],
    terminal: Terminal,
    tmp_path: Path,
    *,
    ranks: int = 2,
    hidden: bool = False,
) -> list[RankLog]:
    """Let ranks write chunks to their stderr, one after the other."""

    async def run() -> list[RankLog]:
        logs = [RankLog(tmp_path / f"rank-{rank}.log", terminal) for rank in range(ranks)]
        pipes = [os.pipe() for _ in range(ranks)]
        streams = [
            RankStream(
                pipes[rank][0],
                "stderr",
                log=logs[rank],
                terminal=None if hidden else terminal,
                rank=None if ranks == 1 else rank,
            )
            for rank in range(ranks)
        ]
        for rank, data in chunks:
            os.write(pipes[rank][1], data)
            streams[rank]._read()
        for rank in range(ranks):
            streams[rank].close()
            os.close(pipes[rank][1])
            logs[rank].close()
        return logs

    return asyncio.run(run())


def test_lines_of_two_ranks_do_not_mix(tmp_path: Path) -> None:
    with piped() as (shown, fd):
        terminal = Terminal((fd, fd))
        chunks = [(0, b"one "), (1, b"uno\ndo"), (0, b"line\n"), (1, b"s\n"), (0, b"end")]
        logs = show(chunks, terminal, tmp_path)
        assert read(shown) == (b"[rank 1] uno\n[rank 0] one line\n[rank 1] dos\n[rank 0] end\n")
    assert logs[0].path.read_bytes() == b"one line\nend"
    assert list(logs[1].tail) == ["uno", "dos"]


def test_a_single_rank_is_passed_on_as_it_is(tmp_path: Path) -> None:
    with piped() as (shown, fd):
        terminal = Terminal((fd, fd))
        logs = show([(0, b"\r 10%"), (0, b"\r 20%"), (0, b"\xff")], terminal, tmp_path, ranks=1)
        terminal.say("over")
        assert read(shown) == b"\r 10%\r 20%\xff\nmnemo: over\n"
    assert list(logs[0].tail) == [" 20%\ufffd"]


def test_of_a_progress_bar_only_the_end_is_written_to_a_file(tmp_path: Path) -> None:
    with piped() as (shown, fd):
        chunks = [(0, b"\r 10%"), (1, b"hello\n"), (0, b"\r 20%"), (0, b"\r100%\n"), (1, b"a\r\n")]
        show(chunks, Terminal((fd, fd)), tmp_path)
        assert read(shown) == b"[rank 1] hello\n[rank 0] 100%\n[rank 1] a\n"


def test_a_progress_bar_on_a_terminal_stays_below_the_lines(tmp_path: Path) -> None:
    with screen() as (shown, fd):
        terminal = Terminal((fd, fd), colour=False)
        clear = b"\r\x1b[K"
        show([(0, b"\r 10%"), (1, b"hello\n"), (0, b"\r 20%"), (0, b"\n")], terminal, tmp_path)
        assert read_screen(shown, fd) == (
            clear + b"[rank 0]  10%"
            + clear + b"[rank 1] hello\n" + b"[rank 0]  10%"
            + clear + b"[rank 0]  20%"
            + clear + b"[rank 0]  20%\n"
        )  # fmt: skip


def test_ranks_are_coloured_on_a_terminal_only() -> None:
    with screen() as (_, fd), piped() as (_, plain):
        assert Terminal((fd, plain)).prefix(1, "stdout") == b"\x1b[33m[rank 1]\x1b[0m "
        assert Terminal((fd, plain)).prefix(1, "stderr") == b"[rank 1] "


def test_hidden_output_goes_to_the_file_only(tmp_path: Path) -> None:
    with piped() as (shown, fd):
        logs = show([(1, b"secret\n")], Terminal((fd, fd)), tmp_path, hidden=True)
        assert read(shown) == b""
    assert logs[1].path.read_text() == "secret\n"


def test_a_line_without_end_does_not_fill_the_memory(tmp_path: Path) -> None:
    with piped() as (shown, fd):
        show([(0, b"x" * 50_000), (0, b"x" * 20_000), (0, b"y\n")], Terminal((fd, fd)), tmp_path)
        assert read(shown) == b"[rank 0] " + b"x" * 70_000 + b"\n[rank 0] y\n"


def test_the_terminal_may_go_away(tmp_path: Path) -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    try:
        terminal = Terminal((write_end, write_end))
        logs = show([(0, b"a\n"), (0, b"b\n")], terminal, tmp_path)
    finally:
        os.close(write_end)
    assert logs[0].path.read_text() == "a\nb\n"


def test_a_full_disk_is_said_once_and_the_terminal_goes_on(tmp_path: Path) -> None:
    with piped() as (shown, fd):
        (tmp_path / "rank-0.log").symlink_to("/dev/full")
        show([(0, b"a\n"), (0, b"b\n")], Terminal((fd, fd)), tmp_path)
        said = read(shown).decode().splitlines()
    assert said[0].startswith("mnemo: the log ")
    assert "No space left" in said[0]
    assert said[1:] == ["[rank 0] a", "[rank 0] b"]


@pytest.mark.parametrize("blocking", [True, False])
def test_a_slow_reader_gets_everything(tmp_path: Path, blocking: bool) -> None:
    total = 300_000  # more than a pipe holds
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, blocking)
    pid = os.fork()
    if pid == 0:
        os.close(write_end)
        size = 0
        while data := os.read(read_end, 4096):
            size += len(data)
        os._exit(0 if size == total + 1 else 1)
    os.close(read_end)
    Terminal((write_end, write_end)).line("stdout", b"z" * total)
    os.close(write_end)
    assert os.waitpid(pid, 0)[1] == 0
