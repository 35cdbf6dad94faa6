"""What a person is asked, and may say, where too few nodes are left to decide by themselves."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from mnemo.membership import Machine, Rules
    from mnemo.smp.paths import RunPaths


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

    @property
    def advice(self) -> str:
        """What can be done now; empty if nothing has to be."""
        machine = self._machine
        if self._rules.arbiter or machine.committed is None or not machine.is_stuck:
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
        """Nodes that are vouched for are lost, unless they are heard of."""
        machine = self._machine
        if not machine.is_stuck:
            return
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
        try:
            names = self._paths.verdicts.read_text().splitlines()
            self._paths.verdicts.unlink()
        except FileNotFoundError:
            return []
        return names
