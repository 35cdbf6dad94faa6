"""Whether the kernel has killed for want of memory."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


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
