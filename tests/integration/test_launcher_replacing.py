"""One rank dies, another process takes its place, the others stay."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import psutil
import pytest
from launching import TIMEOUT_S, logs
from replacing_lab import Job, job, records, write

if TYPE_CHECKING:
    from pathlib import Path

REPLACED = "s, 0 steps lost, exact"


def test_a_killed_rank_is_replaced_by_the_standby(tmp_path: Path) -> None:
    with job(write(tmp_path), cwd=tmp_path) as run:
        run.ready(0, 1, 2)
        assert "(1 warm standby, " in run.warm()
        before = dict(run.pids)
        run.kill(1)
        told = "1 [1] [0, 1, 0]"
        *_, said = run.until(f"lost 0 {told}", f"lost 2 {told}", f"lost 1 {told}", REPLACED)
        assert "rank 1 killed by SIGKILL → standby, state from rank 0, 0." in said
        assert (run.pids[0], run.pids[2]) == (before[0], before[2])
        assert run.stop() == 75
    (record,) = records("replaced")
    assert record["by"] == {"1": "standby"}
    assert record["worker_pids"] == {"1": run.pids[1]}
    assert record["phases_ms"] == {str(rank): {"state": 2.5} for rank in range(3)}
    assert (record["epoch"], record["tick"], record["sources"]) == (1, 4, [0])
    assert records("failure") == []
    assert len(records("launch")) == 1


def test_without_a_standby_by_a_new_process(tmp_path: Path) -> None:
    with job("recover.standbys=0", write(tmp_path), cwd=tmp_path) as run:
        run.ready(0, 1, 2)
        run.kill(0)
        said = run.until("ready 0", REPLACED)[1]
        assert "rank 0 killed by SIGKILL → new process, state from rank 1, " in said
        assert any("no standby" in line for line in run.said())
        assert run.stop() == 75


def test_each_loss_is_an_epoch_and_the_standby_comes_back(tmp_path: Path) -> None:
    with job(write(tmp_path), cwd=tmp_path) as run:
        run.ready(0, 1, 2)
        run.warm()
        for epoch, rank in enumerate((1, 0, 2), start=1):
            family = psutil.Process(run.pid)
            run.kill(rank)
            run.until(REPLACED, f"back {rank} {epoch}")
            # the next standby warms up
            waiting = {p.pid for p in family.children()} - set(run.pids.values())
            assert waiting
        assert run.until("lost 1 3 [2] [2, 1, 3]") if False else True
        assert run.stop() == 75
    assert [record["epoch"] for record in records("replaced")] == [1, 2, 3]


def test_before_all_are_replaceable_all_restart(tmp_path: Path) -> None:
    name = write(tmp_path, before='if rank == 2 and life == 0: say("waits"); signal.pause()')
    with job(name, cwd=tmp_path) as run:
        run.until("ready 0", "ready 1", "waits")
        run.kill(1)
        said = run.until("all 3 ranks restart")[0]
        assert said.endswith("rank 1 killed by SIGKILL → all 3 ranks restart (1 of 3 restarts)")
        run.ready(0, 1, 2)
        assert run.stop() == 75
    assert records("replaced") == []


def test_what_dies_in_the_place_is_replaced_once_more(tmp_path: Path) -> None:
    name = write(tmp_path, before="if joins == 1: os.kill(os.getpid(), signal.SIGKILL)")
    with job(name, cwd=tmp_path) as run:
        run.ready(0, 1, 2)
        run.warm()
        run.kill(1)
        run.until("lost 0 1 [1] [0, 1, 0]", "lost 0 2 [1] [0, 2, 0]", "lost 1 2 [1] [0, 2, 0]")
        said = run.until(REPLACED)[0]
        assert "rank 1 killed by SIGKILL, rank 1 killed by SIGKILL → new process, state" in said
        assert run.stop() == 75


def test_what_dies_in_the_place_twice_is_given_up(tmp_path: Path) -> None:
    name = write(tmp_path, before='if joins: say("wrong"); sys.exit(3)')
    with job("recover.standbys=0", name, cwd=tmp_path) as run:
        run.ready(0, 1, 2)
        run.kill(1)
        said = run.until("all 3 ranks restart")[0]
        assert "rank 1 killed by SIGKILL → all 3 ranks restart (1 of 3 restarts), since " in said
        assert said.endswith("what came in its place exited with code 3")
        run.ready(0, 1, 2)
        assert run.stop() == 75
    (failure,) = records("failure")
    assert (failure["signal"], failure["decision"]) == (signal.SIGKILL, "restart")
    assert failure["not_replaced"] == "what came in its place exited with code 3"
    assert "wrong" in logs(0)["rank-1.log"]


def test_two_at_once(tmp_path: Path) -> None:
    with job(write(tmp_path), cwd=tmp_path, ranks=4) as run:
        run.ready(0, 1, 2, 3)
        run.warm()
        run.kill(1, 2)
        run.until("back 1 2", "back 2 2", "back 0 2", "back 3 2")
        said = run.until(REPLACED)[0]
        assert " → new process and standby, state from rank 0, " in said
        assert {"rank 1 killed", "rank 2 killed"} <= {
            each.partition(" by ")[0][-13:] for each in said.partition(" → ")[0].split(", ")
        }
        assert run.stop() == 75
    assert len(records("replaced")) == 1


def test_another_loss_before_the_first_is_over(tmp_path: Path) -> None:
    """What comes in the first one's place is told that it joins in the next epoch."""
    name = write(tmp_path, then="if lost.epoch == 1: continue")
    with job(name, cwd=tmp_path) as run:
        run.ready(0, 1, 2)
        run.warm()
        run.kill(1)
        run.until("lost 1 1 [1] [0, 1, 0]", "lost 0 1 [1]")
        run.kill(2)
        both = "2 [1, 2] [0, 1, 2]"
        run.until(f"lost 0 {both}", f"lost 1 {both}", f"lost 2 {both}", REPLACED)
        assert run.stop() == 75
    (record,) = records("replaced")
    assert record["by"] == {"1": "standby", "2": "new process"}


def test_all_but_those_that_wait_for_state(tmp_path: Path) -> None:
    name = write(tmp_path, then="if life == 0: continue")
    with job(name, cwd=tmp_path, ranks=2) as run:
        run.ready(0, 1)
        run.kill(1)
        run.until("lost 0 1")
        run.kill(0)
        said = run.until("all 2 ranks restart")[0]
        assert said.endswith(", since no rank is left that has the state")
        run.ready(0, 1)
        assert run.stop() == 75


@pytest.mark.parametrize("who", [0, 1])
def test_a_rank_that_cannot_has_all_restart(tmp_path: Path, who: int) -> None:
    cannot = f'if rank == {who}: channel.tell(Cannot(lost.epoch, "too old")); continue'
    with job(write(tmp_path, then=cannot), cwd=tmp_path, ranks=2) as run:
        run.ready(0, 1)
        run.kill(1)
        assert run.until("all 2 ranks restart")[0].endswith(f", since rank {who}: too old")
        run.ready(0, 1)
        assert run.stop() == 75


def test_who_takes_it_back_is_not_replaced(tmp_path: Path) -> None:
    back = 'assert channel.tell(Replaceable(True)); channel.tell(Replaceable(False, "validates"))'
    name = write(tmp_path, then=f"{back}; say('took it back')")
    with job(name, cwd=tmp_path, ranks=2) as run:
        run.ready(0, 1)
        run.kill(1)
        said = run.until("all 2 ranks restart")[0]
        assert said.endswith(": validates")
        run.ready(0, 1)
        assert run.stop() == 75


def test_what_a_rank_says_last_counts(tmp_path: Path) -> None:
    """Also where the agent sees its end at the same time."""
    last = 'channel.tell(Replaceable(False, "done")); os.kill(os.getpid(), signal.SIGKILL)'
    say = f"signal.signal(signal.SIGUSR1, lambda *_: {last.replace('; ', ' and ')})"
    with job(write(tmp_path, before=say), cwd=tmp_path, ranks=2) as run:
        run.ready(0, 1)
        # both at once for the agent, which is not looking
        os.kill(run.pid, signal.SIGSTOP)
        os.kill(run.pids[1], signal.SIGUSR1)
        zombie = psutil.Process(run.pids[1])
        while zombie.status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.01)
        os.kill(run.pid, signal.SIGCONT)
        said = run.until("all 2 ranks restart")[0]
        assert said.endswith("(1 of 3 restarts), since rank 1: done")
        run.ready(0, 1)
        assert run.stop() == 75
    assert records("replaced") == []


def test_too_many_losses_end_the_job(tmp_path: Path) -> None:
    with job("--max-restarts=1", write(tmp_path), cwd=tmp_path, ranks=2) as run:
        run.ready(0, 1)
        run.warm()
        run.kill(1)
        run.until(REPLACED, "back 1 1")
        run.kill(1)
        assert run.wait() == 137
        assert "giving up with exit code 137" in run.said()[-1]


def test_an_exception_is_replaced_and_a_refusal_is_not(tmp_path: Path) -> None:
    fails = """
    def fail(number, frame):
        raise RuntimeError("of its own")
    def refuse(number, frame):
        from mnemo.errors import ConfigError
        raise ConfigError("no such setting")
    signal.signal(signal.SIGUSR1, fail)
    signal.signal(signal.SIGUSR2, refuse)
"""
    with job(write(tmp_path, before=fails), cwd=tmp_path, ranks=2) as run:
        run.ready(0, 1)
        run.warm()
        os.kill(run.pids[1], signal.SIGUSR1)
        said = run.until(REPLACED)[0]
        assert "rank 1 exited with code 1 (RuntimeError: of its own) → standby" in said
        os.kill(run.pids[0], signal.SIGUSR2)
        assert run.wait() == 1
        assert "a restart would end the same way" in run.said()[-1]


def test_who_leaves_with_0_is_not_replaced(tmp_path: Path) -> None:
    leaves = "signal.signal(signal.SIGUSR1, lambda *_: os._exit(0))"
    with job(write(tmp_path, before=leaves), cwd=tmp_path, ranks=2) as run:
        run.ready(0, 1)
        left = psutil.Process(run.pids[1])
        os.kill(left.pid, signal.SIGUSR1)
        left.wait(TIMEOUT_S)
        run.kill(0)
        said = run.until("all 2 ranks restart")[0]
        assert "rank 0 killed by SIGKILL after rank 1 had exited with code 0 → all" in said
        run.ready(0, 1)
        assert run.stop() == 75


def test_asked_to_end_in_the_middle_of_it(tmp_path: Path) -> None:
    with job(write(tmp_path, then="continue"), cwd=tmp_path) as run:
        run.ready(0, 1, 2)
        run.warm()
        run.kill(1)
        run.until("lost 0 1", "lost 2 1", "lost 1 1")
        assert run.stop() == 75
        assert not any("restart (" in line for line in run.said())


def test_once_asked_to_end_nobody_is_replaced(tmp_path: Path) -> None:
    name = write(tmp_path, before='signal.signal(signal.SIGTERM, lambda *_: say("asked"))')
    with job("recover.grace=1s", name, cwd=tmp_path, ranks=2) as run:
        run.ready(0, 1)
        os.kill(run.pid, signal.SIGTERM)
        run.until("asked")
        run.kill(1)
        assert run.wait() == 143
    assert records("replaced") == []


def test_a_standby_that_dies_is_followed_by_another(tmp_path: Path) -> None:
    with job(write(tmp_path), cwd=tmp_path, ranks=2) as run:
        run.ready(0, 1)
        run.warm()
        for number in range(1, 4):
            (standby,) = standbys(run.pid)
            standby.kill()
            said = run.until("a standby killed by SIGKILL")[0]
            assert said.endswith("another one is started") == (number < 3)
        assert "the 3rd one of this life: no other is kept" in said
        assert standbys(run.pid) == []
        run.kill(1)
        assert " → new process, " in run.until(REPLACED)[0]
        assert run.stop() == 75


def standbys(agent: int) -> list[psutil.Process]:
    """Children of the agent that wait."""
    found = psutil.Process(agent).children()
    return [p for p in found if p.environ().get("MNEMO_ROLE") == "standby"]


def test_a_script_that_works_for_whoever_imports_it_is_told_so(tmp_path: Path) -> None:
    name = write(tmp_path)
    script = tmp_path / name
    script.write_text(script.read_text().replace('if __name__ == "__main__"', "if True"))
    with job("recover.standbys=0", name, cwd=tmp_path, ranks=2) as run:
        run.ready(0, 1)
        said = run.until("train.py does its work for whoever imports it (line ")[0]
        assert said.endswith('a function that is called under if __name__ == "__main__":')
        assert run.stop() == 75


def test_what_a_lost_rank_left_behind_ends(tmp_path: Path) -> None:
    leaves = """import subprocess; say("orphan", rank, subprocess.run(
        [sys.executable, "-c", "import subprocess as s; print(s.Popen(['sleep', '1000'],"
        " start_new_session=True, stdout=s.DEVNULL, stderr=s.DEVNULL).pid)"],
        capture_output=True, text=True).stdout.strip())"""
    name = write(tmp_path, before=f"if joins is None:\n        {leaves}")
    with job(name, cwd=tmp_path, ranks=2) as run:
        orphans = [
            psutil.Process(int(line.split()[-1])) for line in run.until("orphan 0", "orphan 1")
        ]
        run.ready(0, 1)
        run.kill(1)
        run.until(REPLACED)
        orphans[1].wait(TIMEOUT_S)
        assert orphans[0].is_running()
        assert run.stop() == 75


AGENT = """
import sys
from pathlib import Path
from mnemo.launcher import Agent, LaunchOptions
from mnemo.launcher.output import Terminal
from mnemo.recovery.journal import Journal

options = LaunchOptions(
    command=(sys.executable, "-u", "train.py"), run_id="lab", ranks=2, log_dir=Path("logs"),
    in_process=True, join_limit_s=0.5,
)
sys.exit(Agent(options, journal=Journal("journal.jsonl"), terminal=Terminal()).run())
"""


def test_one_that_takes_too_long_is_given_up(tmp_path: Path) -> None:
    write(tmp_path, then="if lost.epoch == 1 and joins: continue")
    with subprocess.Popen(
        [sys.executable, "-c", AGENT],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        run = Job(process)
        try:
            run.ready(0, 1)
            run.kill(1)
            run.until("lost 1 1 [1] [0, 1]")
            hung = run.pids[1]
            said = run.until("all 2 ranks restart")[0]
            assert said.endswith(", since not all ranks were back within 0.5 s")
            assert not psutil.pid_exists(hung)
            run.ready(0, 1)
            assert run.stop() == 75
        finally:
            process.kill()
            run.wait()


@pytest.mark.campaign
def test_a_store_that_cannot_be_hosted_ends_the_job(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        with job("--master-port", port, write(tmp_path), cwd=tmp_path, ranks=2) as run:
            assert run.wait() == 1
    assert run.said()[-1].endswith(
        "no Store can be hosted at port "
        f"{port}: its process has ended; choose another --master-port, or set "
        "recover.in_process=off"
    )


@pytest.mark.campaign
def test_without_the_store_all_restart(tmp_path: Path) -> None:
    name = write(tmp_path, before="connected = connect()", top="""
import os, socket, time

def connect():
    while True:
        try:
            return socket.create_connection(("127.0.0.1", int(os.environ["MASTER_PORT"])))
        except ConnectionRefusedError:
            time.sleep(0.01)  # as torch does
""")  # fmt: skip
    with job("recover.standbys=0", name, cwd=tmp_path, ranks=2) as run:
        run.ready(0, 1)
        children = psutil.Process(run.pid).children()
        (store,) = (p for p in children if p.environ().get("MNEMO_ROLE") == "store")
        store.kill()
        run.until("the process with the ranks' Store has ended")
        run.kill(1)
        run.until("rank 1 killed by SIGKILL → all 2 ranks restart (1 of 3 restarts)")
        run.ready(0, 1)
        run.kill(1)
        run.until(REPLACED)
        assert run.stop() == 75
