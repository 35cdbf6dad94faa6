"""The few lines that people see."""

from __future__ import annotations

import sys
from typing import Final

_MINUTES_FROM: Final = 600
_HOURS_FROM: Final = 2 * 3600


def say(text: str) -> None:
    """One line to standard error, marked as mnemo's."""
    print(f"mnemo: {text}", file=sys.stderr, flush=True)


def size(number: float) -> str:
    """Bytes in words, in the largest unit of which there is one."""
    for unit, exponent in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if number >= 2**exponent:
            return f"{number / 2**exponent:.1f} {unit}"
    return f"{number:.0f} bytes"


def seconds(value: float) -> str:
    """A duration in words."""
    if value < _MINUTES_FROM:
        return f"{value:.2f} s" if value < 10 else f"{value:.0f} s"
    return f"{value / 60:.0f} min" if value < _HOURS_FROM else f"{value / 3600:.1f} h"


def count(number: int, thing: str) -> str:
    """``1 step``, ``2 steps``."""
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"
