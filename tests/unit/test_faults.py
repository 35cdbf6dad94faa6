from __future__ import annotations

import os
import signal
import subprocess
import sys
import timeit
from collections import Counter
from typing import TYPE_CHECKING

import psutil
import pytest

from mnemo import faults
from mnemo.errors import ConfigError, FaultNotFiredError
from mnemo.faults import Declaration, Fault, Hook

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

# Goes through 20 steps of three phases, and prints each so that a test can see how far it came.
TRAINING = """
import sys
from mnemo import faults
for step in range(20):
    for phase in ("forward", "backward", "update"):
        print(step, phase, flush=True)
        faults.reach(phase, step=step)
print("done", flush=True)
"""

# Says "ready", then waits in a phase until it is hit.
WAITING = """
import signal
from mnemo import faults
faults.reach("backward", step=4)
faults.reach("mid_copy", step=5)
print("ready", flush=True)
signal.pause()
"""


def train(declared: Declaration, rank: int = 0) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", TRAINING],
        env={**os.environ, **declared.environ(), "RANK": str(rank)},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )


def declare(tmp_path: Path, *declared: Fault) -> Declaration:
    return Declaration(declared, record=str(tmp_path / "fired"))


@pytest.fixture
def disarm() -> Iterator[None]:
    yield
    faults.arm({})


def test_a_hook_costs_next_to_nothing_when_nothing_is_declared() -> None:
    calls = 20_000
    best = min(
        timeit.repeat(lambda: faults.reach("forward", step=1), number=calls, repeat=50),
    )
    assert best / calls < 200e-9, f"{best / calls * 1e9:.0f} ns a call"


@pytest.mark.parametrize(
    ("kind", "code"),
    [("sigkill", -signal.SIGKILL), ("sigterm", -signal.SIGTERM), ("exception", 1), ("exit0", 0)],
)
def test_a_fault_happens_at_its_step_and_phase(
    tmp_path: Path, kind: faults.Kind, code: int
) -> None:
    declared = declare(tmp_path, Fault(kind, 0, Hook("backward", 7)))
    with pytest.raises(FaultNotFiredError, match=r"1 of 1 faults never happened.*backward"):
        declared.assert_fired()
    ended = train(declared)
    assert ended.returncode == code, ended.stderr
    assert ended.stdout.splitlines()[-1] == "7 backward"
    declared.assert_fired()
    (fired,) = declared.fired()
    assert (fired.kind, fired.rank, fired.phase, fired.step) == (kind, 0, "backward", 7)


def test_each_fault_happens_once_over_restarts(tmp_path: Path) -> None:
    declared = declare(
        tmp_path, Fault("sigkill", 0, Hook("forward", 3)), Fault("sigkill", 0, Hook("update", 3))
    )
    assert train(declared).stdout.splitlines()[-1] == "3 forward"
    assert train(declared).stdout.splitlines()[-1] == "3 update"
    assert train(declared).stdout.splitlines()[-1] == "done"
    assert [f.fault for f in declared.fired()] == [0, 1]


def test_only_the_declared_rank_is_hit(tmp_path: Path) -> None:
    declared = declare(tmp_path, Fault("sigkill", 1, Hook("forward")))
    assert train(declared, rank=0).returncode == 0
    assert train(declared, rank=1).returncode == -signal.SIGKILL


@pytest.mark.parametrize(("least", "hit"), [(None, 0), (0, 0), (5, 6), (6, 6), (7, 8)])
def test_a_step_is_the_least_at_which_a_phase_is_hit(
    tmp_path: Path, disarm: None, least: int | None, hit: int
) -> None:
    declared = declare(tmp_path, Fault("exception", 0, Hook("validation", least)))
    faults.arm(declared.environ())
    for step in range(0, hit, 2):
        faults.reach("validation", step=step)
    with pytest.raises(RuntimeError, match="injected fault"):
        faults.reach("validation", step=hit)
    faults.reach("validation", step=hit)
    assert [fired.step for fired in declared.fired()] == [hit]


def test_a_phase_without_step_does_not_match_a_fault_with_one(tmp_path: Path, disarm: None) -> None:
    declared = declare(tmp_path, Fault("exception", 0, Hook("loading", 0)))
    faults.arm(declared.environ())
    faults.reach("loading")
    assert declared.fired() == []


def test_nothing_happens_when_it_cannot_be_recorded(tmp_path: Path) -> None:
    declared = Declaration(
        (Fault("sigkill", 0, Hook("forward", 1)),), record=str(tmp_path / "absent" / "fired")
    )
    ended = train(declared)
    assert ended.returncode == 1
    assert "FileNotFoundError" in ended.stderr


def test_the_snapshot_process_is_hit_as_soon_as_it_is_known(tmp_path: Path, disarm: None) -> None:
    declared = declare(tmp_path, Fault("smp_kill", 0, Hook("update")))
    faults.arm(declared.environ())
    faults.reach("update", step=1)
    assert declared.fired() == []
    with subprocess.Popen(["sleep", "60"]) as smp:
        faults.identify(rank=0, smp_pid=smp.pid)
        faults.reach("update", step=2)
        assert smp.wait(10) == -signal.SIGKILL
    assert declared.fired()[0].pid == smp.pid


@pytest.mark.parametrize("kind", ["sigkill", "sigterm", "sigstop"])
def test_strike_records_the_phase_in_which_it_hits(tmp_path: Path, kind: faults.Kind) -> None:
    fault = Fault(kind, 0, 0.5)
    declared = declare(tmp_path, fault)
    with subprocess.Popen(
        [sys.executable, "-c", WAITING],
        env={**os.environ, **declared.environ()},
        stdout=subprocess.PIPE,
        text=True,
    ) as victim:
        assert victim.stdout is not None
        assert victim.stdout.readline() == "ready\n"
        fired = declared.strike(victim.pid, fault)
        if kind == "sigstop":
            _, status = os.waitpid(victim.pid, os.WUNTRACED)
            assert os.WIFSTOPPED(status)
            assert psutil.Process(victim.pid).status() == psutil.STATUS_STOPPED
            victim.kill()
        else:
            assert victim.wait(10) == -faults._SIGNALS[kind]
    assert (fired.phase, fired.step, fired.pid) == ("mid_copy", 5, victim.pid)
    declared.assert_fired()
    with pytest.raises(ValueError, match="has happened already"):
        declared.strike(victim.pid, fault)


@pytest.mark.parametrize("reaped", [False, True])
def test_strike_on_a_dead_process_records_nothing(tmp_path: Path, reaped: bool) -> None:
    fault = Fault("sigkill", 0, 0.5)
    declared = declare(tmp_path, fault)
    with subprocess.Popen(["true"]) as gone:
        os.waitid(os.P_PID, gone.pid, os.WEXITED | os.WNOWAIT)
        if reaped:
            gone.wait()
        with pytest.raises(ProcessLookupError):
            declared.strike(gone.pid, fault)
    assert declared.fired() == []


def test_strike_lets_the_process_go_on_if_it_cannot_record(tmp_path: Path) -> None:
    fault = Fault("sigkill", 0, 0.5)
    declared = Declaration((fault,), record=str(tmp_path / "absent" / "fired"))
    with subprocess.Popen(["sleep", "60"]) as victim:
        with pytest.raises(FileNotFoundError):
            declared.strike(victim.pid, fault)
        assert psutil.Process(victim.pid).status() != psutil.STATUS_STOPPED
        victim.kill()


def test_random_faults_are_repeatable_and_cover_the_phases() -> None:
    drawn = faults.random_faults(7, 50, ranks=2, steps=range(5, 30))
    assert drawn == faults.random_faults(7, 50, ranks=2, steps=range(5, 30))
    assert drawn != faults.random_faults(8, 50, ranks=2, steps=range(5, 30))
    hooks = [f.at for f in drawn if isinstance(f.at, Hook)]
    phases = Counter(h.phase for h in hooks)
    assert set(phases) == set(faults.PHASES)
    assert min(phases.values()) >= 50 // len(faults.PHASES)
    assert {f.rank for f in drawn} == {0, 1}
    assert all(h.step is not None and 5 <= h.step < 30 for h in hooks)


def test_random_instants_are_repeatable_and_bounded() -> None:
    drawn = faults.random_instants(7, 50, ranks=3, within_s=(1.0, 2.5))
    assert drawn == faults.random_instants(7, 50, ranks=3, within_s=(1.0, 2.5))
    assert all(isinstance(f.at, float) and 1.0 <= f.at <= 2.5 for f in drawn)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("explode", 0, Hook("forward")), "'explode' is not one of sigkill"),
        (("sigkill", -1, Hook("forward")), "-1 is negative"),
        (("sigkill", 0, -0.5), "after -0.5 s"),
        (("sigkill", 0, float("nan")), "after nan s"),
        (("exception", 0, 1.0), "bind it to a Hook"),
    ],
)
def test_a_senseless_fault_is_refused(args: tuple[object, ...], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Fault(*args)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"faults": []}',
        '{"faults": [], "record": "relative"}',
        '{"faults": [{"kind": "boom", "rank": 0, "at": 1.0}], "record": "/x"}',
        '{"faults": [{"kind": "sigkill", "rank": -3, "at": 1.0}], "record": "/x"}',
    ],
)
def test_a_declaration_that_cannot_be_read_is_an_error(text: str, disarm: None) -> None:
    with pytest.raises(ConfigError, match="MNEMO_FAULTS"):
        faults.arm({faults.ENV: text})


def test_an_undeclared_process_is_never_armed(disarm: None) -> None:
    faults.arm({faults.ENV: ""})
    faults.identify(rank=3, smp_pid=1)
    faults.reach("forward", step=1)
    assert faults._armed is None
