"""Numbers in words."""

from __future__ import annotations

import pytest

from mnemo.cli import words


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-0.4, "0.0 s"),
        (0.04, "0.0 s"),
        (9.94, "9.9 s"),
        (10, "10 s"),
        (119.4, "119 s"),
        (120, "2 min"),
        (3600, "60 min"),
        (7200, "2 h"),
        (7500, "2 h 5 min"),
        (48 * 3600, "2 d 0 h"),
        (1e6, "11 d 13 h"),
    ],
)
def test_span(seconds: float, text: str) -> None:
    assert words.span(seconds) == text


def test_size() -> None:
    assert words.size(0) == "0.0 MiB"
    assert words.size(2**30 - 1) == "1024.0 MiB"
    assert words.size(3 * 2**29) == "1.5 GiB"


def test_steps_and_lists() -> None:
    assert [words.steps(n) for n in (0, 1, 2)] == ["0 steps", "1 step", "2 steps"]
    assert [words.listed(n) for n in ([7], [7, 9], [1, 2, 3])] == ["7", "7 and 9", "1, 2 and 3"]
