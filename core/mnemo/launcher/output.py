"""What the ranks print: to the terminal with the rank in front, and to a file each.

Lines of several ranks do not mix. A progress bar, which returns to the start of its line instead
of ending it, is shown on a terminal until the next line comes, and put back below that. Where
the output is no terminal, only its last state is written, once its line ends.
"""

from __future__ import annotations

import asyncio
import os
import select
from collections import deque
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

_CLEAR: Final = b"\r\x1b[K"
_MAX_LINE: Final = 1 << 16
_READ: Final = 1 << 16
_COLOURS: Final = (36, 33, 35, 32, 34, 31)
TAIL_LINES: Final = 100
"""How many of a rank's last lines are kept in memory."""


class Terminal:
    """The agent's own standard output and error.

    Args:
        fds: File descriptors for ``stdout`` and ``stderr``.
        colour: Colour the rank on a terminal.
    """

    def __init__(self, fds: Sequence[int] = (1, 2), *, colour: bool = True) -> None:
        self._fds: dict[str, int] = dict(zip(("stdout", "stderr"), fds, strict=True))
        self._live = {stream: os.isatty(fd) for stream, fd in self._fds.items()}
        self._colour = colour
        self._gone: set[str] = set()
        self._progress: tuple[str, bytes] | None = None
        self._unfinished = False

    def prefix(self, rank: int, stream: str) -> bytes:
        """What stands before each line of a rank."""
        text = f"[rank {rank}]"
        if self._live[stream] and self._colour:
            text = f"\x1b[{_COLOURS[rank % len(_COLOURS)]}m{text}\x1b[0m"
        return text.encode() + b" "

    def line(self, stream: str, text: bytes) -> None:
        """Write one whole line; ``text`` is without its end."""
        if self._unfinished:  # raw output stopped in mid-line
            self._write(stream, b"\n")
            self._unfinished = False
        if not (self._progress and self._live[stream]):
            self._write(stream, text + b"\n")
            return
        shown_on, progress = self._progress
        self._write(stream, _CLEAR + text + b"\n")
        self._write(shown_on, progress)

    def progress(self, stream: str, text: bytes | None) -> None:
        """Show an unfinished line until there is another; None removes it."""
        if not self._live[stream] or (text is None and self._progress is None):
            return
        self._progress = (stream, text) if text else None
        self._write(stream, _CLEAR + (text or b""))

    def raw(self, stream: str, data: bytes) -> None:
        """Pass on the output of a rank that has the terminal to itself."""
        self._write(stream, data)
        self._unfinished = not data.endswith((b"\n", b"\r"))

    def say(self, text: str) -> None:
        """Write a line of the agent's own."""
        self.line("stderr", f"mnemo: {text}".encode())

    def _write(self, stream: str, data: bytes) -> None:
        if stream in self._gone:
            return
        view = memoryview(data)
        while view:
            try:
                view = view[os.write(self._fds[stream], view) :]
            except BlockingIOError:
                select.select([], [self._fds[stream]], [])
            except OSError:
                # The reader is gone (``mnemo run … | head``), the disk full: train on.
                self._gone.add(stream)
                return


class RankLog:
    """One rank's file, and its last lines.

    Args:
        path: The file, which is appended to.
        terminal: Told once if the file cannot be written.
    """

    def __init__(self, path: Path, terminal: Terminal) -> None:
        self.path = path
        self.tail: deque[str] = deque(maxlen=TAIL_LINES)
        self._terminal = terminal
        self._file = path.open("ab", buffering=0)

    def write(self, data: bytes) -> None:
        """Append bytes as they came."""
        if self._file.closed:
            return
        try:
            self._file.write(data)
        except OSError as error:
            self._file.close()
            self._terminal.say(f"the log {self.path} is not written any further: {error}")

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class RankStream:
    """Reads one stream of one rank from a pipe.

    Args:
        fd: The pipe's end to read from, owned from here on.
        stream: ``stdout`` or ``stderr``.
        log: Gets every byte.
        terminal: Gets the lines; None keeps them off it.
        rank: Shown before each line; None passes the bytes on as they are.
    """

    def __init__(
        self, fd: int, stream: str, *, log: RankLog, terminal: Terminal | None, rank: int | None
    ) -> None:
        self._fd = fd
        self._stream = stream
        self._log = log
        self._terminal = terminal
        self._prefix = None if rank is None or not terminal else terminal.prefix(rank, stream)
        self._rest = b""
        os.set_blocking(fd, False)
        asyncio.get_running_loop().add_reader(fd, self._read)

    def _read(self) -> bool:
        """Take what is there; False at the end or when there is nothing."""
        try:
            data = os.read(self._fd, _READ)
        except BlockingIOError:
            return False
        if not data:
            asyncio.get_running_loop().remove_reader(self._fd)
            return False
        self._log.write(data)
        if self._terminal and self._prefix is None:
            self._terminal.raw(self._stream, data)
        *lines, rest = (self._rest + data).split(b"\n")
        for line in lines:
            self._line(line)
        if len(rest) > _MAX_LINE:
            self._line(rest)
            rest = b""
        self._rest = rest
        if self._terminal and self._prefix is not None and rest:
            self._terminal.progress(self._stream, self._prefix + _visible(rest))
        return True

    def _line(self, line: bytes) -> None:
        text = _visible(line)
        self._log.tail.append(text.decode(errors="replace"))
        if self._terminal and self._prefix is not None:
            if self._rest:  # this line's beginning was shown as progress
                self._terminal.progress(self._stream, None)
                self._rest = b""
            self._terminal.line(self._stream, self._prefix + text)

    def close(self) -> None:
        """Read what the rank left in the pipe, and close it.

        A process that the rank started may hold the other end for ever: its end is not awaited.
        """
        asyncio.get_running_loop().remove_reader(self._fd)
        while self._read():
            pass
        if self._rest:
            self._line(self._rest)
        os.close(self._fd)


def _visible(line: bytes) -> bytes:
    """What a terminal would show of a line that returns to its start: the last thing written."""
    return next((part for part in reversed(line.split(b"\r")) if part), b"")


def count(number: int, thing: str) -> str:
    """So many of them, in words."""
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"
