"""What a person is asked, and may say, where too few nodes are left to decide by themselves."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

    from mnemo.membership import Machine, Rules
    from mnemo.smp.paths import RunPaths


_ADVISES_S: Final = 15.0
"""A Store that only moves is back by then, and nobody has to do anything."""


class Operator:
    """Speaks through ``mnemo confirm-lost``, which leaves a file.

    Args:
        paths: The run's on this node, where that is.
        machine: What waits for it.
        rules: Of the run.
        say: Tells the user.
    """

    def __init__(
        self, paths: RunPaths, machine: Machine, rules: Rules, say: Callable[[str], None]
    ) -> None:
        self._paths = paths
        self._machine = machine
        self._rules = rules
        self._say = say
        self._stuck_since: float | None = None

    @property
    def advice(self) -> str:
        """What can be done now; empty if nothing has to be."""
        machine = self._machine
        since = self._stuck_since
        if self._rules.arbiter or machine.committed is None or since is None:
            return ""
        if time.monotonic() - since < _ADVISES_S:
            return ""
        others = [m.address for m in machine.committed.members if m.key != machine.me.key]
        return (
            f" (the others are {', '.join(others)}). If some are surely dead: mnemo confirm-lost "
            f"ADDRESS… --run {self._paths.run_id}"
        )

    def drop_early_words(self) -> None:
        """Whatever was said before a wait does not count in it."""
        for name in self._take():
            self._say(f"that {name} is lost was said before this node waited for it: not taken")

    def hear(self) -> None:
        """Nodes that are vouched for are lost, unless they are heard of; ask now and then."""
        machine = self._machine
        if not machine.is_stuck:
            self._stuck_since = None
            return
        self._stuck_since = self._stuck_since or time.monotonic()
        members = machine.committed.members if machine.committed else ()
        for name in self._take():
            found = [m for m in members if name in (m.address, m.node)]
            living = [m for m in found if m.key in {machine.me.key, *machine.present}]
            if not found:
                known = ", ".join(member.address for member in members)
                self._say(f"{name} is none of {known}")
            elif living:
                self._say(f"{name} is not lost: its agent answers")
            else:
                self._say(f"{name} is lost, says the operator")
                for member in found:
                    machine.confirm_lost(member.key)

    def _take(self) -> list[str]:
        taken = self._paths.verdicts.with_suffix(".taken")  # who speaks now speaks in another file
        try:
            self._paths.verdicts.replace(taken)
        except FileNotFoundError:
            return []
        names = taken.read_text().splitlines()
        taken.unlink()
        return names
