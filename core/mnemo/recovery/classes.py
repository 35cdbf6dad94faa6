"""What kind of failure ended a rank, what follows it, and the words for it.

All that is known of a process that is gone is its exit code, its last lines, and what the kernel
and the agent say. `RUNGS` says for each kind which rung of the ladder is tried first.
"""

from __future__ import annotations

import re
import signal
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Final

from mnemo.recovery.ladder import Rung
from mnemo.types import EXIT_OK, EXIT_STATE_LOST, EXIT_STATE_SAVED

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


class Kind(str, Enum):
    """Kinds of failures."""

    PEER_LOST = "peer lost"
    """A signal, or an exit code without an exception."""
    HOST_MEMORY = "out of host memory"
    DEVICE_MEMORY = "out of device memory"
    DEVICE_ERROR = "device error"
    """One that stays: nothing works on the device any more in that process."""
    EXCEPTION = "exception"
    """Of the program."""
    LINK_LOST = "link lost"
    """An exception that only says that another rank cannot be reached."""
    HANG = "hang"
    PREEMPTION = "preemption"
    """It was told to go, and has said whether its state is saved."""
    REFUSAL = "refusal"
    """A wrong setting, or wrong arguments."""
    LEFT = "left"
    """It has ended well while others were training."""


RUNGS: Final[Mapping[Kind, Rung]] = {
    Kind.PEER_LOST: Rung.REPLICA,
    Kind.HOST_MEMORY: Rung.REPLICA,
    Kind.DEVICE_MEMORY: Rung.REPLICA,
    Kind.DEVICE_ERROR: Rung.REPLICA,
    Kind.EXCEPTION: Rung.REPLICA,
    Kind.LINK_LOST: Rung.REPLICA,
    Kind.HANG: Rung.REPLICA,
    Kind.PREEMPTION: Rung.LEAVE,
    Kind.REFUSAL: Rung.STOP,
    Kind.LEFT: Rung.SNAPSHOT,
}

ITS_OWN: Final = frozenset({Kind.EXCEPTION, Kind.DEVICE_MEMORY})
"""What the program does itself: the same again at the same batch is no accident."""

_RANK = r"(?:\[rank\d+\]: )?"
"""What torch puts before the lines of a traceback, once there is a process group."""
_TRACEBACK: Final = re.compile(rf"{_RANK}Traceback \(most recent call last\):")
_ERROR_LINE: Final = re.compile(rf"{_RANK}([A-Za-z_][\w.]*(?:Error|Exception|Interrupt|Exit)\b.*)")
_UNCAUGHT: Final = 1
"""Exit code of an interpreter that nobody caught an exception in."""
_REFUSAL: Final = re.compile(
    rf"{_RANK}mnemo\.errors\."
    r"(ConfigError|HostMemoryError|IdentityError|MissingExtraError|ModelChangedError|NothingToResumeError)"
    r": "
)
_USAGE_CODE: Final = 2
_USAGE: Final = re.compile(r"([\w.-]+(?: [\w.-]+)*: )?error: .")
"""What argparse writes before it exits with 2, and LightningCLI's jsonargparse."""
_LONGEST: Final = 200
_LAST_LINES: Final = 20

_BY_ERROR: Final[Sequence[tuple[Kind, re.Pattern[str]]]] = (
    (Kind.DEVICE_MEMORY, re.compile(r".*(CUDA out of memory|CUDA error: out of memory)")),
    (Kind.DEVICE_ERROR, re.compile(r".*(CUDA|CUBLAS|cuDNN|HIP) (driver )?error|torch\.Accel")),
    (Kind.HOST_MEMORY, re.compile(r"MemoryError|.*(can't|Cannot) allocate memory")),
    (
        Kind.LINK_LOST,
        re.compile(
            r"mnemo\.errors\.(GroupBroken|Comm)Error|torch\.distributed\.Dist\w*Error|Connection\w*Error"
            r"|.*(Connection (closed|reset) by peer|gloo/transport)"
        ),
    ),
)
"""By how the line begins that names the exception, the first that fits."""


@dataclass(frozen=True)
class Failure:
    """The end of one process.

    Attributes:
        kind: What it was.
        words: For people, to follow "rank 1".
        error: The exception, with its message; empty if there was none.
        last_lines: That it printed.
    """

    kind: Kind
    words: str
    error: str = ""
    last_lines: tuple[str, ...] = ()

    @property
    def rung(self) -> Rung:
        """What is tried first."""
        return RUNGS[self.kind]

    @property
    def last_words(self) -> tuple[str, ...]:
        """Some of its last lines; the whole of the last traceback, if it is among them."""
        begins = [n for n, line in enumerate(self.last_lines) if _TRACEBACK.match(line)]
        many = len(self.last_lines) - begins[-1] if begins else 0
        return self.last_lines[-max(_LAST_LINES, many) :]


def classify(
    code: int,
    tail: Sequence[str],
    *,
    out_of_memory: bool = False,
    refusal: str = "",
    hang: str = "",
) -> Failure:
    """What ended a process.

    Args:
        code: Exit code; negative for a signal.
        tail: Its last lines.
        out_of_memory: The kernel has just killed for want of memory.
        refusal: The wrong setting that it named itself.
        hang: Why the agent killed it, in words.
    """
    lines = tuple(tail)
    if hang:
        return Failure(Kind.HANG, hang, last_lines=lines)
    if refusal:
        return Failure(Kind.REFUSAL, f"found a wrong setting ({refusal})", last_lines=lines)
    if code == -signal.SIGKILL and out_of_memory:
        return Failure(Kind.HOST_MEMORY, "killed (out of host memory)", last_lines=lines)
    error = _error_of(code, lines) if code > 0 else ""
    words = in_words(code) + (f" ({error[:_LONGEST]})" if error else "")
    return Failure(_kind(code, error, lines), words, error, lines)


def in_words(code: int) -> str:
    """An exit code, negative for a signal."""
    if code >= 0:
        return f"exited with code {code}"
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"killed by signal {-code}"


def _kind(code: int, error: str, tail: Sequence[str]) -> Kind:
    if code == EXIT_OK:
        return Kind.LEFT
    if code in {EXIT_STATE_SAVED, EXIT_STATE_LOST}:
        return Kind.PREEMPTION
    if code > 0 and any(map(_REFUSAL.match, tail)):
        return Kind.REFUSAL
    if code == _USAGE_CODE and any(map(_USAGE.match, tail)):
        return Kind.REFUSAL
    if not error:
        return Kind.PEER_LOST
    return next((kind for kind, text in _BY_ERROR if text.match(error)), Kind.EXCEPTION)


def _error_of(code: int, tail: Sequence[str]) -> str:
    """What its last lines say of an exception: they end with it, or with the rest of its message.

    Only what nobody caught ends a process with code 1; of others the very last line counts.
    """
    last = next((line for line in reversed(tail) if line.strip()), "")
    found = _ERROR_LINE.match(last)
    if found is None and code == _UNCAUGHT:
        begins = [number for number, line in enumerate(tail) if _TRACEBACK.match(line)]
        after = tail[begins[-1] :] if begins else ()
        found = next(filter(None, map(_ERROR_LINE.match, after)), None)
    return found[1].strip() if found else ""
