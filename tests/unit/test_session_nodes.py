"""What is seen of a lost node's memory coming back."""

from __future__ import annotations

import io
from typing import Any

import pytest

from mnemo.erasure.stripes import Group
from mnemo.session import nodes
from mnemo.session.place import Place
from mnemo.smp import messages as m

SIZE = 100_000_000


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class ComingBack:
    """A link to a snapshot process that rebuilds."""

    def __init__(self) -> None:
        self._done = 0

    def ask(self, request: m.Message, answer: type[m.Recalled]) -> tuple[Any, list[int]]:
        assert isinstance(request, m.Recall)
        if self._done == SIZE:
            return answer(over=True, kept=True), []
        self._done += SIZE // 4
        return answer(over=False, done=self._done, total=SIZE), []


@pytest.mark.parametrize("terminal", [True, False])
def test_a_bar_shows_it_on_a_terminal_alone(
    monkeypatch: pytest.MonkeyPatch, terminal: bool
) -> None:
    screen = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr(nodes.sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    found = nodes.recall(ComingBack(), Place(), give_up=False)  # type: ignore[arg-type]
    assert found == nodes.Recall(reachable=True, lost=False)
    said = screen.getvalue()
    assert ("rank 0: what this node had comes back" in said) == terminal
    assert ("75.0/100.0 MB" in said) == terminal


@pytest.mark.parametrize(
    ("sizes", "parities", "said"),
    [
        ([4], 1, "one of 4 nodes"),
        ([6], 2, "any 2 of 6 nodes"),
        ([3, 3], 1, "one of each group of 3 nodes"),
        ([5, 4], 2, "any 2 of each group of 4 or 5 nodes"),
    ],
)
def test_the_start_says_how_many_may_be_lost(sizes: list[int], parities: int, said: str) -> None:
    groups = tuple(tuple(f"{i}-{j}" for j in range(size)) for i, size in enumerate(sizes))
    settings = m.ProtectSettings("0-0", groups, parities, {})
    assert str(nodes.Protection(settings, Group(groups[0], parities))) == said
