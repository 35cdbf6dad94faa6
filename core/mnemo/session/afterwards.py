"""What a program does behind its training: until that has ended well, too, the state is kept.

The last save may find the disk full, an export may fail: a restart then goes on from the newest
snapshot of the finished training instead of beginning it anew. The snapshots are given back when

- ``mnemo run`` has seen every rank exit with 0;
- without it, this process ends by itself, and not by an exception that nobody caught;
- this process begins its next training.
"""

from __future__ import annotations

import contextlib
import os
import sys
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Final

from mnemo.smp.link import Link

_BEHIND_CHILDREN: Final = -100
"""Priority of what is done at exit: negative is after the children of `multiprocessing` ended."""

_kept: list[tuple[Link, Finalize]] = []
_files: list[Path] = []


def keep(link: Link) -> None:
    """The training behind ``link`` ended well: its newest snapshot stays until the program has."""
    link.finish()
    # Unlike those of atexit, these also run in processes that multiprocessing has made.
    at_exit = Finalize(None, _program_ends, (link,), exitpriority=_BEHIND_CHILDREN)
    _kept.append((link, at_exit))


def remove_when_over(file: Path) -> None:
    """``file`` is of use to a restart alone: it goes when the state goes."""
    _files.append(file)


def give_back() -> None:
    """This process begins its next training: what is kept of those before is given back."""
    while _kept:
        link, at_exit = _kept.pop()
        at_exit.cancel()
        link.leave(finished=True)
    _remove_files()


def _remove_files() -> None:
    while _files:
        with contextlib.suppress(OSError):
            _files.pop().unlink()


def _program_ends(link: Link) -> None:
    if _ended_well():
        link.say_over()
        _remove_files()
    else:
        link.close()


def _ended_well() -> bool:
    """Asked at exit: whether this process ends without an error, as far as that can be seen here.

    A ``sys.exit(1)`` of the main process cannot: only its parent sees that.
    """
    error = sys.exc_info()[1]  # what a child made by multiprocessing is just ending with
    if isinstance(error, SystemExit):
        return not error.code
    # Set before any sys.excepthook is called. At a prompt it is an error that ended no program.
    uncaught = hasattr(sys, "last_type") and not hasattr(sys, "ps1")
    return error is None and not uncaught


def _in_forked_child() -> None:
    """What the parent keeps is no matter of a child: neither to end, nor to hold a line to."""
    while _kept:
        _kept.pop()[0].close()
    _files.clear()


os.register_at_fork(after_in_child=_in_forked_child)
