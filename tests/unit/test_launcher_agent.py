"""What the agent does while the snapshot process does not answer."""

from __future__ import annotations

import asyncio
import sys
import threading
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from mnemo.launcher import Agent, Hooks, LaunchOptions, silence
from mnemo.launcher.output import Terminal
from mnemo.launcher.team import Alone
from mnemo.recovery.journal import Journal

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


class Fenced(Alone):
    """A team whose seat is lost at some time."""

    is_over = False

    def watch(self, changed: Callable[[], None]) -> None:
        self.changed = changed

    def fence(self) -> None:
        self.is_over = True
        self.changed()


@pytest.mark.timeout(30)
def test_ranks_are_fenced_off_though_the_snapshot_process_hangs(tmp_path: Path) -> None:
    """One has ended well, and whether the other trains without it is asked in vain."""
    asked, answers = threading.Event(), threading.Event()

    def training() -> bool:
        asked.set()
        assert answers.wait(60)
        return True

    async def run() -> None:
        options = LaunchOptions(
            command=(sys.executable,), run_id="run", ranks=2, log_dir=tmp_path, grace_s=0.2
        )
        team = Fenced(options)
        agent = Agent(
            options,
            journal=Journal(tmp_path / "journal"),
            terminal=Terminal(),
            hooks=Hooks(training=training),
            team=team,
        )
        team.watch(agent._changed.set)
        life: Any = SimpleNamespace(exits={0: 0})
        supervising = asyncio.create_task(agent._supervise(life))
        await asyncio.to_thread(asked.wait)
        team.fence()
        try:
            assert await asyncio.wait_for(supervising, 5) is None
        finally:
            answers.set()

    asyncio.run(run())


def test_a_silent_snapshot_process_is_said_once_and_that_it_answers_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(silence, "_EVERY_S", 0.01)
    found = [0, 0, 4711, 4711, 4711, 0, 0, 4711]
    said: list[str] = []
    over = threading.Event()

    def silent() -> int:
        if len(found) == 1:
            over.set()
        return found.pop(0) if len(found) > 1 else found[0]

    async def run() -> None:
        watching = asyncio.create_task(silence.watch(silent, said.append))
        await asyncio.to_thread(over.wait)
        while len(said) < 3:
            await asyncio.sleep(0.01)
        watching.cancel()

    asyncio.run(asyncio.wait_for(run(), 20))
    assert [line.partition(",")[0] for line in said] == [
        "the snapshot process",
        "the snapshot process answers again",
        "the snapshot process",
    ]
    assert said[0].startswith("the snapshot process, 4711, has given no answer for 0 s: training")
