"""Why a rank died, as far as the kernel and its exit code say."""

from __future__ import annotations

import re
import signal
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

_RANK = r"(?:\[rank\d+\]: )?"
"""What torch puts before the lines of a traceback, once there is a process group."""
_ERROR_LINE = re.compile(rf"{_RANK}([A-Za-z_][\w.]*(?:Error|Exception|Interrupt|Exit)\b.*)")

_REFUSAL = re.compile(
    rf"{_RANK}mnemo\.errors\."
    r"(ConfigError|HostMemoryError|IdentityError|MissingExtraError|ModelChangedError|NothingToResumeError)"
    r": "
)
_USAGE_CODE = 2
_USAGE = re.compile(r"([\w.-]+(?: [\w.-]+)*: )?error: .")
"""What argparse writes before it exits with 2, and LightningCLI's jsonargparse."""


def is_refusal(code: int, tail: Iterable[str]) -> bool:
    """Whether a rank would end the same way again: mnemo refused to start, or wrong arguments.

    Args:
        code: Its exit code.
        tail: Its last lines.
    """
    return any(
        _REFUSAL.match(line) or (code == _USAGE_CODE and _USAGE.match(line)) for line in tail
    )


class OomWatch:
    """Notices that the kernel killed a process of this control group for want of memory.

    Args:
        groups: The agent's own groups, as in ``/proc/self/cgroup``.
        root: Where the control groups are mounted.
    """

    def __init__(
        self, groups: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")
    ) -> None:
        self._counter = next((path for path in _counters(groups, root) if _kills(path)), None)
        self._seen = self._count()

    def struck(self) -> bool:
        """Whether it has happened since the last call."""
        before, self._seen = self._seen, self._count()
        return self._seen > before

    def _count(self) -> int:
        found = _kills(self._counter) if self._counter else None
        return int(found[1]) if found else 0


def _counters(groups: Path, root: Path) -> Iterator[Path]:
    """Files that may count kills: version 2, then 1; within a container the group is the root."""
    try:
        lines = groups.read_text().splitlines()
    except OSError:
        return
    for line in sorted(lines):
        _, controllers, path = line.split(":", 2)
        for group in (path.lstrip("/"), ""):
            if not controllers:
                yield root / group / "memory.events"
            elif "memory" in controllers.split(","):
                yield root / "memory" / group / "memory.oom_control"


def _kills(path: Path) -> re.Match[str] | None:
    try:
        return re.search(r"^oom_kill (\d+)$", path.read_text(), re.MULTILINE)
    except OSError:
        return None


def cause_of(code: int, tail: Sequence[str], *, out_of_memory: bool) -> str:
    """As `describe`.

    Args:
        code: Exit code; negative for a signal.
        tail: Its last lines.
        out_of_memory: What `OomWatch` says.
    """
    last_line = next((line for line in reversed(tail) if line.strip()), "")
    return describe(code, out_of_memory=out_of_memory, last_line=last_line)


def describe(code: int, *, out_of_memory: bool, last_line: str) -> str:
    """Words for the end of a rank.

    Args:
        code: Exit code; negative for a signal.
        out_of_memory: What `OomWatch` says.
        last_line: The last line that it printed: often names the exception.
    """
    if code < 0:
        if code == -signal.SIGKILL and out_of_memory:
            return "killed (out of host memory)"
        try:
            return f"killed by {signal.Signals(-code).name}"
        except ValueError:
            return f"killed by signal {-code}"
    error = _ERROR_LINE.match(last_line)
    said = f" ({error[1].strip()[:200]})" if error else ""
    return f"exited with code {code}{said}"
