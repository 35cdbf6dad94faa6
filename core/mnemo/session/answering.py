"""What a rank answers when it is asked what it does, while its training thread may be anywhere."""

from __future__ import annotations

import contextlib
import faulthandler
import itertools
import sys
import sysconfig
import threading
from pathlib import Path
from types import FrameType
from typing import Final

from mnemo.comm.group import groups
from mnemo.comm.kept import boundary
from mnemo.recovery.control import Ask, Doing, InGroup

_MOST_GROUPS: Final = 256
"""An answer has to fit into one message."""
_LIBRARIES: Final = tuple({sysconfig.get_path(n) for n in ("stdlib", "purelib", "platlib")})
_OURS: Final = frozenset({"mnemo", "lightning_mnemo", "accelerate_mnemo"})
_DEBUGGERS: Final = frozenset({"bdb", "pdb", "ipdb", "pudb", "debugpy", "pydevd"})


def answer(ask: Ask) -> Doing:
    """What this process does; its stacks are written down first, if that is asked for."""
    if ask.stacks:
        with contextlib.suppress(OSError):  # nobody gets to read them then
            _write_stacks(Path(ask.stacks))
    known = {
        name: InGroup(group.ranks, group.asked, kept.known)
        for name, group in itertools.islice(list(groups.items()), _MOST_GROUPS)
        if (kept := group.kept) is not None  # it may just be given up
    }
    messages = sum(g.sent.total() + g.received.total() for g in list(groups.values()))
    frames = _frames(sys._current_frames().get(threading.main_thread().ident or 0))
    debugged = any(_package(frame) in _DEBUGGERS for frame in frames)
    return Doing(ask.number, boundary.latest, known, messages, _place(frames), debugged)


def _frames(frame: FrameType | None) -> list[FrameType]:
    """The innermost first."""
    found = []
    while frame is not None:
        found.append(frame)
        frame = frame.f_back
    return found


def _package(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", "")).partition(".")[0]


def _place(frames: list[FrameType]) -> str:
    """The innermost place in the program itself, or else at all."""
    own = [each for each in frames if _is_programs(each)]
    for frame in (*own, *frames)[:1]:
        code = frame.f_code
        return f"{code.co_name} ({Path(code.co_filename).name}:{frame.f_lineno})"
    return ""


def _is_programs(frame: FrameType) -> bool:
    file = frame.f_code.co_filename
    return not file.startswith(("<", *_LIBRARIES)) and _package(frame) not in _OURS


def _write_stacks(path: Path) -> None:
    with path.open("w") as file:
        for thread in threading.enumerate():
            print(f"Thread 0x{thread.ident or 0:016x} is {thread.name}", file=file)
        file.flush()
        faulthandler.dump_traceback(file)
