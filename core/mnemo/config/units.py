"""Durations, shares and sizes as people write them.

Each pair of functions is exact: parsing what was formatted gives the same value back.
"""

from __future__ import annotations

import math
import re
from typing import Final

_NUMBER: Final = r"(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:e[+-]?[0-9]+)?"

_SECONDS: Final = {"d": 86400, "h": 3600, "min": 60, "s": 1, "ms": 0.001}
_TIME_ALIASES: Final = {
    **dict.fromkeys(("day", "days"), "d"),
    **dict.fromkeys(("hr", "hour", "hours"), "h"),
    **dict.fromkeys(("m", "minute", "minutes"), "min"),
    **dict.fromkeys(("sec", "second", "seconds"), "s"),
}
_TIME_PART: Final = re.compile(rf"\s*({_NUMBER})\s*([a-z]+)\s*")

_BYTES: Final[dict[str, int]] = {
    "B": 1,
    **{f"{prefix}B": 1000**power for power, prefix in enumerate("kMGTP", start=1)},
    **{f"{prefix}iB": 1024**power for power, prefix in enumerate("KMGTP", start=1)},
}
_SIZE: Final = re.compile(rf"\s*({_NUMBER})\s*([a-z]*)\s*", re.IGNORECASE)


def parse_duration(text: str) -> float:
    """Read a duration such as ``10min``, ``1h30m``, ``500ms``; a bare number is seconds.

    Args:
        text: Numbers with the units d, h, min (or m), s, ms, the longest unit first.

    Returns:
        Seconds, finite and at least 0.

    Raises:
        ValueError: The text is not a duration.
    """
    lowered = text.strip().lower()
    if re.fullmatch(_NUMBER, lowered):
        return _finite(float(lowered), text)
    parts: list[float] = []
    shortest = math.inf
    position = 0
    while position < len(lowered):
        match = _TIME_PART.match(lowered, position)
        factor = _SECONDS.get(_TIME_ALIASES.get(match[2], match[2])) if match else None
        if match is None or factor is None or factor >= shortest:
            raise ValueError(f"{text!r} is not a duration such as 90s, 10min or 1h30min")
        number = float(match[1])
        # 0.001 is not a binary fraction; dividing keeps 500ms exactly half a second.
        parts.append(number / 1000 if factor < 1 else number * factor)
        shortest = factor
        position = match.end()
    if not parts:
        raise ValueError("an empty text is not a duration")
    return _finite(math.fsum(parts), text)


def format_duration(seconds: float) -> str:
    """Write seconds in the form that `parse_duration` reads."""
    if seconds != int(seconds):
        milliseconds = seconds * 1000
        whole = milliseconds == int(milliseconds) and milliseconds / 1000 == seconds
        return f"{int(milliseconds)}ms" if whole and seconds < 1 else f"{seconds!r}s"
    rest = int(seconds)
    text = ""
    for unit in ("d", "h", "min", "s"):
        count, rest = divmod(rest, int(_SECONDS[unit]))
        text += f"{count}{unit}" if count else ""
    return text or "0s"


def parse_fraction(text: str) -> float:
    """Read a share such as ``1%`` or ``0.01``.

    Args:
        text: A percentage up to ``100%``, or a number below 1. A bare 1 is refused, since it
            may be meant as 1 %.

    Returns:
        A number from 0 to 1.

    Raises:
        ValueError: The text is not a share.
    """
    match = re.fullmatch(rf"({_NUMBER})\s*(%?)", text.strip().lower())
    if match is None:
        raise ValueError(f"{text!r} is not a share such as 1% or 0.01")
    value = float(match[1]) / 100 if match[2] else float(match[1])
    if value > 1 or (value == 1 and not match[2]):
        raise ValueError(f"{text!r} is not a share from 0% to 100%, or a number below 1")
    return value


def format_fraction(value: float) -> str:
    """Write a share in the form that `parse_fraction` reads, as a percentage where exact."""
    text = f"{value * 100:.12g}%"
    return text if parse_fraction(text) == value else repr(value)


def parse_size(text: str) -> int:
    """Read a size such as ``4GiB`` or ``512MB``; a bare number is bytes.

    Args:
        text: A number with B, kB to PB (powers of 1000) or KiB to PiB (powers of 1024), in
            capitals or not.

    Returns:
        Bytes, rounded down to a whole number, at least 0.

    Raises:
        ValueError: The text is not a size.
    """
    match = _SIZE.fullmatch(text)
    units = {unit.lower(): factor for unit, factor in _BYTES.items()}
    factor = units.get(match[2].lower() or "b") if match else None
    if match is None or factor is None:
        raise ValueError(f"{text!r} is not a size such as 512MB or 4GiB")
    if match[1].isdigit():
        return int(match[1]) * factor
    return int(_finite(float(match[1]) * factor, text))


def format_size(size: int) -> str:
    """Write bytes in the form that `parse_size` reads, in the unit with the smallest count."""
    whole = [(size // factor, unit) for unit, factor in _BYTES.items() if size % factor == 0]
    count, unit = min(whole, key=lambda pair: pair[0]) if size else (0, "B")
    return f"{count}{unit}"


def _finite(value: float, text: str) -> float:
    if not math.isfinite(value):
        raise ValueError(f"{text!r} is too large")
    return value
