"""Numbers as people say them."""

from __future__ import annotations

from collections.abc import Iterable


def size(count: int) -> str:
    """Bytes in the unit that leaves few digits."""
    if count >= 2**30:
        return f"{count / 2**30:.1f} GiB"
    return f"{count / 2**20:.1f} MiB"


def span(seconds: float) -> str:
    """A duration, to two units."""
    if seconds < 10:
        return f"{max(0.0, seconds):.1f} s"
    whole = round(seconds)
    if whole < 120:
        return f"{whole} s"
    minutes = whole // 60
    if minutes < 120:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min" if minutes else f"{hours} h"
    return f"{hours // 24} d {hours % 24} h"


def steps(count: int) -> str:
    """``1 step``, ``2 steps``."""
    return "1 step" if count == 1 else f"{count} steps"


def listed(numbers: Iterable[int]) -> str:
    """``3``, ``3 and 5``, ``3, 5 and 8``."""
    *most, last = map(str, numbers)
    return f"{', '.join(most)} and {last}" if most else last
