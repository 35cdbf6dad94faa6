from __future__ import annotations

import signal

import pytest

from mnemo.launcher.restarts import Ended, Failed, Position, RestartPolicy, judge
from mnemo.recovery.classes import Failure, classify

KILL = -signal.SIGKILL


class HandClock:
    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return self.now


@pytest.mark.parametrize(
    ("exits", "stopped_by", "overdue", "verdict"),
    [
        ({}, None, False, None),
        ({0: 0}, None, False, None),
        ({0: 0, 1: 0, 2: 0}, None, False, Ended(0)),
        # a death ends the life at once
        ({1: KILL}, None, False, Failed(1, KILL)),
        ({1: 3}, None, False, Failed(1, 3)),
        # the cause is the rank that was hit, not the one that lost its peer
        ({0: 1, 2: KILL}, None, False, Failed(2, KILL)),
        ({0: 1, 2: 4}, None, False, Failed(0, 1)),
        # leaving early
        ({1: 0}, None, True, Failed(1, 0, early=True)),
        ({1: 0, 0: 1}, None, False, Failed(0, 1, left_before=(1,))),
        ({0: 1, 1: 0}, None, False, Failed(0, 1)),
        # a rank has spoken for the job: the others may follow
        ({0: 75}, None, False, None),
        ({0: 75}, None, True, Ended(75)),
        ({0: 75, 1: 75, 2: 75}, None, False, Ended(75)),
        ({0: 75, 1: KILL}, None, False, None),
        ({0: 75, 1: KILL, 2: 76}, None, False, Ended(76)),
        ({0: 76, 1: 0, 2: 0}, None, False, Ended(76)),
        # asked to end
        ({}, signal.SIGTERM, False, None),
        ({}, signal.SIGTERM, True, Ended(143)),
        ({0: 75, 1: 75}, signal.SIGTERM, False, None),
        ({0: 75, 1: 75}, signal.SIGTERM, True, Ended(75)),
        ({0: 75, 1: 75, 2: 76}, signal.SIGUSR1, False, Ended(76)),
        ({0: 0, 1: 0, 2: 0}, signal.SIGINT, False, Ended(130)),
        ({0: -15, 1: 1, 2: 0}, signal.SIGUSR1, False, Ended(138)),
        ({0: -15}, signal.SIGTERM, False, None),
    ],
)
def test_what_exits_mean(
    exits: dict[int, int], stopped_by: int | None, overdue: bool, verdict: Ended | Failed | None
) -> None:
    assert judge(exits, ranks=3, stopped_by=stopped_by, overdue=overdue) == verdict


def test_restarts_are_limited_within_the_window_only() -> None:
    clock = HandClock()
    policy = RestartPolicy(2, 60.0, clock)
    decisions = []
    for at in (0, 50, 100, 150, 155):
        clock.now = at
        decisions.append((policy.after_failure(None), policy.recent))
    # Failures at 0 and 50 are forgotten by 100 and 150; at 155 there are three within 60 s.
    assert decisions == [
        ("restart", 1),
        ("restart", 2),
        ("restart", 2),
        ("restart", 2),
        ("exhausted", 3),
    ]


def test_no_restart_at_all() -> None:
    assert RestartPolicy(0, 60.0, HandClock()).after_failure(None) == "exhausted"


def test_three_failures_in_a_row_at_one_batch_are_a_loop() -> None:
    policy = RestartPolicy(99, 60.0, HandClock())
    here, there = Position(0, 4, 4), Position(0, 5, 5)
    seen = [policy.after_failure(p) for p in (here, here, there, here, here, here)]
    assert seen == ["restart"] * 5 + ["crash loop"]


def test_the_same_exception_twice_at_one_batch_is_a_loop() -> None:
    here = Position(0, 4, 4)
    nan, other = (classify(1, [f"ValueError: {what}"]) for what in ("nan", "other"))
    killed, lost = classify(-9, []), classify(1, ["ConnectionResetError: by peer"])

    def decisions(*failures: Failure, at: Position | None = here) -> list[str]:
        policy = RestartPolicy(99, 60.0, HandClock())
        return [policy.after_failure(at, failure) for failure in failures]

    assert decisions(nan, nan) == ["restart", "crash loop"]
    assert decisions(nan, other, nan) == ["restart", "restart", "crash loop"]
    assert decisions(nan, killed) == ["restart", "restart"]
    assert decisions(lost, lost, lost) == ["restart", "restart", "crash loop"]
    assert decisions(nan, nan, at=None) == ["restart", "restart"]


def test_what_failed_at_this_batch_is_known() -> None:
    policy = RestartPolicy(99, 60.0, HandClock())
    first, second, third = (classify(code, []) for code in (1, 3, 4))
    policy.after_failure(Position(0, 3, 3), first)
    policy.after_failure(Position(0, 4, 4), second)
    policy.after_failure(Position(0, 4, 4), third)
    assert policy.here == [second, third]


def test_a_failure_that_is_forgiven_does_not_count() -> None:
    policy = RestartPolicy(1, 60.0, HandClock())
    for _ in range(3):
        assert policy.after_failure(None) == "restart"
        policy.forgive()
    assert policy.recent == 0


def test_failures_at_an_unknown_place_are_no_loop() -> None:
    policy = RestartPolicy(99, 60.0, HandClock())
    assert {policy.after_failure(None) for _ in range(10)} == {"restart"}


def test_a_position_reads_well() -> None:
    assert str(Position(1, 17, 417)) == "epoch 1, batch 17, step 417"
