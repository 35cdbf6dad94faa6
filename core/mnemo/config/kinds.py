"""What a setting may hold: how its text is read, written and described.

Every source of settings is reduced to text first, so that a value means the same in a file, in
the environment, on the command line and as an argument.
"""

from __future__ import annotations

import ipaddress
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from mnemo.config.units import (
    format_duration,
    format_fraction,
    format_size,
    parse_duration,
    parse_fraction,
    parse_size,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from enum import Enum

_SWITCH: Final = {
    **dict.fromkeys(("true", "yes", "on", "1"), True),
    **dict.fromkeys(("false", "no", "off", "0"), False),
}
_LIMITS: Final = {"auto": 0.0, "off": math.inf}
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_INTERFACE: Final = re.compile(r"(?!\.{1,2}$)[^\s/:]{1,15}")
_MOST_NODES: Final = 256
"""Of one group: fragments of a code over GF(2^8)."""
_LONGEST_LABEL: Final = 128
_PASSWORD: Final = re.compile(r"://[^/@]*:[^/]*@")


@dataclass(frozen=True)
class Kind:
    """One kind of value.

    Attributes:
        accepts: What a person may write, to complete "Give ...".
        parse: From text to the value; raises ValueError where the text is not accepted.
        format: From the value to text that `parse` reads back.
    """

    accepts: str
    parse: Callable[[str], Any]
    format: Callable[[Any], str] = str


def choice(options: type[Enum]) -> Kind:
    """Give the kind that takes the values of one enumeration of strings."""
    return Kind(
        accepts=f"one of {', '.join(option.value for option in options)}",
        parse=lambda text: options(text.strip()),
        format=lambda option: str(option.value),
    )


def without_password(text: str) -> str:
    """Hide the user and password of a URL, so that messages can show the rest."""
    return _PASSWORD.sub("://***@", text)


def parse_ports(text: str) -> range:
    """Read a port such as ``5000``, or a range such as ``5000-5100`` with both ends in it.

    Raises:
        ValueError: The text is neither, or not within 1 to 65535.
    """
    match = re.fullmatch(r"\s*([0-9]{1,5})\s*(?:-\s*([0-9]{1,5})\s*)?", text)
    if match is None:
        raise ValueError(f"{text!r} is neither a port nor a range")
    first, last = int(match[1]), int(match[2] or match[1])
    if not 1 <= first <= last <= 65535:
        raise ValueError(f"{text!r} is not within 1 to 65535, or the wrong way round")
    return range(first, last + 1)


def _above_zero(parse: Callable[[str], float]) -> Callable[[str], float]:
    def checked(text: str) -> float:
        value = parse(text)
        if value <= 0:
            raise ValueError(f"{text!r} is not above 0")
        return value

    return checked


def _whole(least: int) -> Callable[[str], int]:
    def checked(text: str) -> int:
        number = float(text)
        if not number.is_integer() or number < least:
            raise ValueError(f"{text!r} is not a whole number, at least {least}")
        return int(number)

    return checked


def _switch(text: str) -> bool:
    try:
        return _SWITCH[text.strip().lower()]
    except KeyError:
        raise ValueError(f"{text!r} is neither true nor false") from None


def _name(text: str) -> str:
    if text and not _NAME.fullmatch(text):
        raise ValueError(f"{text!r} cannot be part of a file name")
    return text


def parse_code(text: str) -> tuple[int, int]:
    """Read an erasure code such as ``4+2``: nodes with data, nodes with parities.

    Raises:
        ValueError: The text is none, or has more than 256 nodes.
    """
    match = re.fullmatch(r"\s*([0-9]{1,3})\s*\+\s*([0-9]{1,3})\s*", text)
    if match is None:
        raise ValueError(f"{text!r} is not a code such as 4+2")
    data, parities = int(match[1]), int(match[2])
    if data < 1 or parities < 1 or data + parities > _MOST_NODES:
        raise ValueError(f"{text!r} is no code of at most {_MOST_NODES} nodes")
    return data, parities


def _code(text: str) -> str:
    return "{}+{}".format(*parse_code(text)) if text.strip() else ""


def _label(text: str) -> str:
    if len(text) > _LONGEST_LABEL:
        raise ValueError(f"{text!r} is too long for a label")
    return _plain(text).strip()


def _rate(text: str) -> float:
    lowered = text.strip().lower()
    rate = float(parse_size(lowered.removesuffix("/s")))
    if rate <= 0:
        raise ValueError(f"{text!r} lets nothing through")
    return rate


def _plain(text: str) -> str:
    if not text.isprintable():
        raise ValueError(f"{text!r} has control characters")
    return text


def _path(text: str) -> str:
    try:
        return str(Path(_plain(text)).expanduser()) if text else ""
    except RuntimeError as error:
        raise ValueError(f"{text!r} names an unknown user") from error


def _named_path(text: str) -> str:
    if not text.strip():
        raise ValueError("the path is empty")
    return _path(text)


def _url(text: str) -> str:
    if _PASSWORD.search(text):
        raise ValueError("a URL with a password in it ends up in logs")
    text = _plain(text).strip()
    return _path(text) if text.startswith("~") else text


def _ports(text: str) -> str:
    if not text.strip():
        return ""
    ports = parse_ports(text)
    return f"{ports[0]}-{ports[-1]}" if len(ports) > 1 else str(ports[0])


def _interface(text: str) -> str:
    text = text.strip()
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        if text and not _INTERFACE.fullmatch(text):
            raise
    else:
        if address.is_unspecified or "%" in text:
            raise ValueError(f"{text!r} is nothing that another node can connect to")
    return text


def _limit(text: str) -> float:
    named = _LIMITS.get(text.strip().lower())
    return _above_zero(parse_duration)(text) if named is None else named


def _limit_as_text(seconds: float) -> str:
    named = [name for name, value in _LIMITS.items() if value == seconds]
    return named[0] if named else format_duration(seconds)


DURATION: Final = Kind(
    "a duration above 0, such as 90s, 10min or 1h30min (a bare number is seconds)",
    _above_zero(parse_duration),
    format_duration,
)
WAIT: Final = Kind(
    "how long to wait, such as wait 5min or 5min",
    _above_zero(lambda text: parse_duration(text.strip().removeprefix("wait "))),
    lambda seconds: f"wait {format_duration(seconds)}",
)
LIMIT: Final = Kind(
    "auto, off, or a duration above 0, such as 90s or 10min", _limit, _limit_as_text
)
FRACTION: Final = Kind(
    "a share above 0% and up to 100%, such as 1% or 0.01 (a bare number is below 1)",
    _above_zero(parse_fraction),
    format_fraction,
)
COUNT: Final = Kind("a whole number, at least 1", _whole(1))
NUMBER: Final = Kind("a whole number, at least 0", _whole(0))
SWITCH: Final = Kind("true or false", _switch, lambda value: str(value).lower())
NAME: Final = Kind("up to 64 letters, digits, dots, dashes and underscores", _name)
INTERFACE: Final = Kind(
    "the name of a network interface (up to 15 characters) or one of its IP addresses", _interface
)
PORTS: Final = Kind("a port or a range of ports within 1 to 65535, such as 5000-5100", _ports)
CODE: Final = Kind(
    "nodes with data and nodes with parities, each at least 1 and at most 256 together, "
    "such as 4+2",
    _code,
)
LABEL: Final = Kind("a label of at most 128 printable characters", _label)
RATE: Final = Kind(
    "bytes per second above 0, such as 100MB/s or 1GiB/s",
    _rate,
    lambda rate: f"{format_size(int(rate))}/s",
)
PATH: Final = Kind("a path", _path)
NAMED_PATH: Final = Kind("a path that is not empty", _named_path)
URL: Final = Kind(
    "a path or URL without a password (storage credentials belong in the environment or in "
    "fsspec's own configuration)",
    _url,
)
