"""The few lines that people see."""

from __future__ import annotations

import sys


def say(text: str) -> None:
    """One line to standard error, marked as mnemo's."""
    print(f"mnemo: {text}", file=sys.stderr, flush=True)


def gib(size: float) -> str:
    """A size in words."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"


def seconds(value: float) -> str:
    """A duration in words."""
    return f"{value:.2f} s" if value < 10 else f"{value:.0f} s"


def count(number: int, thing: str) -> str:
    """``1 step``, ``2 steps``."""
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"
