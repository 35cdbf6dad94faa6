"""A rank that hangs is found, killed and replaced; what only seems to hang is left alone."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

from replacing_lab import Job, job, records, write

REPLACED = "s, 0 steps lost, exact"
MOVES = "import itertools; ticks = itertools.count(4, 2)"
TRAINS = f"{MOVES}; progress = lambda: (next(ticks), 8, 7)"
"""The rank goes from step to step, and whenever it is asked it waits for the others."""


def stacks_in(said: str) -> Path:
    found = re.search(r"stacks in (\S+?)\)", said)
    assert found, said
    return Path(found[1])


def test_who_is_stopped_beyond_the_limit_is_replaced(tmp_path: Path) -> None:
    with job("recover.hang=2s", write(tmp_path, before=TRAINS), cwd=tmp_path) as run:
        run.ready(0, 1, 2)
        run.warm()
        stopped = run.pids[1]
        os.kill(stopped, signal.SIGSTOP)
        *_, said = run.until("lost 0 1 [1] [0, 1, 0]", "back 1 1", REPLACED)
        assert "rank 1 is stopped: no progress for " in said
        assert "(limit 2s; stacks in " in said
        assert "State:\tT (stopped)" in (stacks_in(said) / "rank-1.txt").read_text()
        assert run.pids[1] != stopped
        assert run.stop() == 75
    (record,) = records("replaced")
    assert record["kinds"] == ["hang"]
    assert record["by"] == {"1": "standby"}


def test_who_goes_on_within_the_limit_is_not_disturbed(tmp_path: Path) -> None:
    trains = f"{MOVES}; progress = lambda: (say('asked', rank), (next(ticks), 8, 7))[1]"
    with job("recover.hang=8s", write(tmp_path, before=trains), cwd=tmp_path, ranks=2) as run:
        run.ready(0, 1)
        run.until("asked 0", "asked 1")
        os.kill(run.pids[1], signal.SIGSTOP)
        run.until("asked 0", "asked 0")  # two more rounds, of 2 s
        os.kill(run.pids[1], signal.SIGCONT)
        run.until("asked 1", "asked 1", "asked 1")
        assert run.stop() == 75
    assert records("replaced") == records("stuck") == []


def test_who_all_others_wait_for_is_replaced(tmp_path: Path) -> None:
    hangs = (
        f"{MOVES}; hung = joins is None; "
        "progress = lambda: (4, 7 + (rank != 2), 7) if hung else (next(ticks), 8, 8)"
    )
    name = write(tmp_path, before=hangs, then="hung = False")
    with job("recover.hang=1s", name, cwd=tmp_path) as run:
        run.ready(0, 1, 2)
        said = run.until(REPLACED)[0]
        assert "rank 2 hangs in work (train.py:1): no progress for " in said
        assert stacks_in(said).is_dir()
        assert run.stop() == 75
    assert [record["kinds"] for record in records("replaced")] == [["hang"]]


def test_where_it_is_not_one_rank_it_is_said_once(tmp_path: Path) -> None:
    waits = "asked = iter(range(30)); progress = lambda: (say('asked', next(asked)), (4, 8, 7))[1]"
    with job("recover.hang=1s", write(tmp_path, before=waits), cwd=tmp_path, ranks=2) as run:
        run.ready(0, 1)
        before = dict(run.pids)
        said = run.until("it is not one rank that the others wait for")[0]
        assert "no progress for " in said
        assert "(limit 1s)" in said
        run.until("asked 20")
        assert run.pids == before
        assert run.stop() == 75
    assert sum("it is not one rank" in line for line in run.seen) == 1
    assert len(records("stuck")) == 1
    assert records("replaced") == []


def test_off(tmp_path: Path) -> None:
    asked = "progress = lambda: say('asked')"
    with job("recover.hang=off", write(tmp_path, before=asked), cwd=tmp_path, ranks=2) as run:
        run.ready(0, 1)
        run.warm()  # seconds
        assert run.stop() == 75
    assert not any("asked" in line for line in run.seen)


LEAVES = """
    def leave(number, frame):
        channel.tell(Replaceable(False, "its training is over", left=True))
        say("left", rank)
        if number == signal.SIGUSR1:
            raise RuntimeError("of its own")
    signal.signal(signal.SIGUSR1, leave)
    signal.signal(signal.SIGUSR2, leave)
"""


def test_who_leaves_its_training_and_fails_is_replaced(tmp_path: Path) -> None:
    with job(write(tmp_path, before=LEAVES), cwd=tmp_path, ranks=2) as run:
        run.ready(0, 1)
        run.warm()
        os.kill(run.pids[1], signal.SIGUSR1)
        said = run.until(REPLACED)[0]
        assert "rank 1 exited with code 1 (RuntimeError: of its own) → standby" in said
        assert run.stop() == 75


def test_who_fails_as_soon_as_it_is_back_is_replaced_again(tmp_path: Path) -> None:
    """Though another one may not be back by then."""
    waits = "rank or [time.sleep(0.01) for _ in iter(lambda: os.path.exists('go'), True)]"
    with job(write(tmp_path, before=LEAVES, then=waits), cwd=tmp_path, ranks=2) as run:
        run.ready(0, 1)
        run.warm()
        run.kill(1)
        run.until("back 1 1")
        os.kill(run.pids[1], signal.SIGUSR2)
        run.until("left 1")
        (tmp_path / "go").touch()
        run.until(REPLACED)
        os.kill(run.pids[1], signal.SIGUSR1)
        assert "(RuntimeError: of its own) → " in run.until(REPLACED)[0]
        assert run.stop() == 75


def test_who_has_left_its_training_gives_nothing_to_others(tmp_path: Path) -> None:
    with job(write(tmp_path, before=LEAVES), cwd=tmp_path, ranks=2) as run:
        run.ready(0, 1)
        os.kill(run.pids[0], signal.SIGUSR2)
        run.until("left 0")
        run.kill(1)
        said = run.until("all 2 ranks restart")[0]
        assert "rank 1 killed by SIGKILL" in said
        run.ready(0, 1)
        assert run.stop() == 75


AGENT = """
import sys
from pathlib import Path
from mnemo.errors import CrashLoopError
from mnemo.launcher import Agent, Hooks, LaunchOptions, Position
from mnemo.launcher.output import Terminal
from mnemo.recovery.journal import Journal

options = LaunchOptions(
    command=(sys.executable, "-u", "train.py"), run_id="lab", ranks=2, log_dir=Path("logs"),
    in_process=True, max_restarts=50,
)
hooks = Hooks(position=lambda: Position(2, 17, 417))
agent = Agent(options, journal=Journal("journal.jsonl"), terminal=Terminal(), hooks=hooks)
try:
    agent.run()
except CrashLoopError as error:
    print("LOOP", agent.exit_code, error, flush=True)
"""


def test_the_same_exception_twice_at_one_batch_ends_the_job(tmp_path: Path) -> None:
    fails = """
    def fail(number, frame):
        raise RuntimeError("of its own")
    signal.signal(signal.SIGUSR1, fail)
"""
    write(tmp_path, before=fails)
    with subprocess.Popen(
        [sys.executable, "-c", AGENT],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        run = Job(process)
        try:
            run.ready(0, 1)
            os.kill(run.pids[1], signal.SIGUSR1)
            run.until(REPLACED, "back 1 1")
            os.kill(run.pids[1], signal.SIGUSR1)
            assert run.wait() == 0
        finally:
            process.kill()
            run.wait()
    said = "\n".join(run.seen).partition("LOOP ")[2]
    assert said.startswith("1 2 failures in a row at epoch 2, batch 17, step 417: ")
    assert "Rank 1 exited with code 1 (RuntimeError: of its own); its last lines" in said
    assert "\n  Traceback (most recent call last):\n" in said
    assert said.count("RuntimeError: of its own") == 2
