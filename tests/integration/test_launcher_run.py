from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
from launching import MNEMO, all_records, finish, launch, logs, started

if TYPE_CHECKING:
    from pathlib import Path

PREAMBLE = """
import os, signal, sys, time
rank, life = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
def wait():
    while True:
        signal.pause()
"""


@pytest.fixture
def script(tmp_path: Path) -> Any:
    """Writes the ranks' script, and gives its name."""

    def write(text: str, name: str = "train.py") -> str:
        (tmp_path / name).write_text(PREAMBLE + text)
        return name

    return write


def say_ready(then: str) -> str:
    """Each rank says that it is ready, with its handlers in place, and then waits."""
    return f'{then}\nprint("ready", flush=True)\nwait()\n'


def await_ready(process: subprocess.Popen[str], ranks: int) -> None:
    """Read until all ranks are ready; what was read is lost to `finish`."""
    assert process.stdout is not None
    for _ in range(ranks):
        assert process.stdout.readline().endswith("ready\n")


def test_ranks_get_torchruns_environment(
    tmp_path: Path, script: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    name = script("""
import json
print(json.dumps({"argv": sys.argv[1:], **os.environ}))
""")
    words = ["--nproc-per-node", "2", "--rdzv-id=job7", "--role", "trainer", name, "--nnodes", "9"]
    ended = launch(*words, cwd=tmp_path)
    assert (ended.code, ended.err.count("OMP_NUM_THREADS=1")) == (0, 1), ended.err
    found = [json.loads(text) for _, text in sorted(logs(0).items())]
    for rank, environ in enumerate(found):
        expected = {
            "argv": ["--nnodes", "9"],
            "RANK": f"{rank}",
            "LOCAL_RANK": f"{rank}",
            "ROLE_RANK": f"{rank}",
            "GROUP_RANK": "0",
            "ROLE_NAME": "trainer",
            "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "2",
            "ROLE_WORLD_SIZE": "2",
            "GROUP_WORLD_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1",
            "TORCHELASTIC_RESTART_COUNT": "0",
            "TORCHELASTIC_MAX_RESTARTS": "3",
            "TORCHELASTIC_RUN_ID": "job7",
            "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
            "OMP_NUM_THREADS": "1",
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "MNEMO_RUN_ID": "job7",
            "MNEMO_AGENT": environ["MNEMO_AGENT"],
        }
        assert {key: environ.get(key) for key in expected} == expected
        assert environ["MNEMO_CONTROL_FD"].isdecimal()
        assert environ["TORCHELASTIC_ERROR_FILE"].endswith(f"/job7/life-0/rank-{rank}.error.json")
    assert len({environ["MASTER_PORT"] for environ in found}) == 1


def test_settings_may_stand_anywhere_before_the_script(tmp_path: Path, script: Any) -> None:
    (tmp_path / "mnemo.yaml").write_text("run: {name: gpt}\nsnapshot: {every: 7}\n")
    name = script("""
print(*sys.argv[1:], *(os.environ.get(f"MNEMO_{k}") for k in
    ("SNAPSHOT__EVERY", "RECOVER__GRACE", "CONFIG", "RUN_ID")))
""")
    words = ["snapshot.every=3", "--config", "mnemo.yaml", "--nproc_per_node=1"]
    ended = launch(*words, "recover.grace=5s", name, "a.b=c", cwd=tmp_path)
    *seen, run_id = ended.out.split()
    assert seen == ["a.b=c", "3", "5s", str(tmp_path / "mnemo.yaml")], ended.err
    assert run_id.startswith("gpt-")
    assert f"mnemo: run {run_id} · 1 rank · at most 3 restarts in 1h · logs in " in ended.err
    assert "OMP_NUM_THREADS" not in ended.err


def test_the_port_of_a_life_is_rank_0s_alone(tmp_path: Path, script: Any) -> None:
    """Also while it does not listen there yet."""
    name = script("""
import errno, socket, torch.distributed as dist
port = int(os.environ["MASTER_PORT"])
with socket.socket() as other:
    try:
        other.bind(("", port))
    except OSError as error:
        print(errno.errorcode[error.errno], flush=True)
store = dist.TCPStore("127.0.0.1", port, is_master=True)
store.set("port", str(port))
print(store.get("port").decode(), flush=True)
if not life:
    os.kill(os.getpid(), signal.SIGKILL)
""")
    ended = launch(name, cwd=tmp_path)
    assert ended.code == 0, ended.err
    taken, port, again, other = ended.out.split()
    assert taken == again == "EADDRINUSE"
    assert port.isdecimal()
    assert other.isdecimal()


def test_torchruns_variables_stand_in_for_flags(tmp_path: Path, script: Any) -> None:
    name = script("print(os.environ['WORLD_SIZE'])")
    ended = launch(name, cwd=tmp_path, PET_NPROC_PER_NODE="3", OMP_NUM_THREADS="2")
    assert sorted(ended.out.splitlines()) == [f"[rank {r}] 3" for r in range(3)]
    assert "OMP_NUM_THREADS" not in ended.err


def test_modules_and_programs_can_be_run(tmp_path: Path, script: Any) -> None:
    script("print('module', __name__)", "pack.py")
    assert launch("-m", "pack", cwd=tmp_path).out == "module __main__\n"
    assert launch("--no-python", "echo", "-n", "x", cwd=tmp_path).out == "x"


@pytest.mark.parametrize(
    ("words", "said", "code"),
    [
        (["absent.py"], "the script absent.py does not exist", 1),
        (
            ["--no-python", "absent-program"],
            "cannot start rank 0: [Errno 2] No such file or directory: 'absent-program'",
            1,
        ),
        (["--nnodes=two", "train.py"], "neither a number of nodes nor MIN:MAX", 1),
        (["--nnodes=2", "train.py"], "set MNEMO_SECRET_FILE on all of them", 2),
        (["--nproc-per-node=many", "train.py"], "--nproc-per-node=many is none of", 1),
        (["--max-restarts=-1", "train.py"], "--max-restarts=-1 is negative", 1),
        (["--restart-window=soon", "train.py"], "--restart-window=soon is no duration", 2),
        (["snapshot.overhed=1%", "train.py"], "Did you mean snapshot.overhead", 2),
        (["run.id=../x", "train.py"], "run.id", 2),
        (["--config=absent.yaml", "train.py"], "absent.yaml", 2),
        (["--log-dir=/dev/null/x", "train.py"], "cannot write logs to /dev/null/x", 1),
        (["snapshot.every=3"], "no script after the settings", 2),
        (["--no-such-flag", "train.py"], "--no-such-flag", 2),
    ],
)
def test_a_launch_that_cannot_be_says_why(
    tmp_path: Path, script: Any, words: list[str], said: str, code: int
) -> None:
    script("print('ran')")
    ended = launch(*words, cwd=tmp_path)
    assert said in ended.err.replace("\n", " ")
    assert ended.code == code
    assert "Traceback" not in ended.err
    assert ended.out == ""


def test_all_ranks_restart_when_one_fails_and_the_journal_says_so(
    tmp_path: Path, script: Any
) -> None:
    name = script("""
if life == 0 and rank == 1:
    raise ValueError("bad batch")
if life == 0:
    wait()
print("life", life)
""")
    ended = launch("--nproc-per-node=2", name, cwd=tmp_path)
    assert ended.code == 0, ended.err
    assert sorted(ended.out.splitlines()) == ["[rank 0] life 1", "[rank 1] life 1"]
    line = "rank 1 exited with code 1 (ValueError: bad batch) → all 2 ranks restart"
    assert ended.err.count(f"{line} (1 of 3 restarts)") == 1
    (failure,) = ended.records("failure")
    first, second = ended.records("launch")
    assert failure["worker_pid"] == first["worker_pids"][1]
    assert (failure["rank"], failure["exit_code"], failure["signal"]) == (1, 1, None)
    assert (failure["life"], failure["decision"]) == (0, "restart")
    assert (second["life"], second["restarts"]) == (1, 1)
    assert first["time"] <= failure["noticed"] <= second["time"]
    assert [r["code"] for r in ended.records("end")] == [0]
    assert "ValueError: bad batch" in logs(0)["rank-1.log"]


@pytest.mark.parametrize(("ending", "code"), [("sys.exit(7)", 7), ("os.kill(os.getpid(), 9)", 137)])
def test_too_many_failures_end_with_the_ranks_own_code(
    tmp_path: Path, script: Any, ending: str, code: int
) -> None:
    name = script(f"if rank == 0: {ending}\nwait()")
    ended = launch("--nproc-per-node=2", "--max-restarts=1", name, cwd=tmp_path)
    assert ended.code == code
    assert f"giving up with exit code {code}; its log is " in ended.err
    assert [r["decision"] for r in ended.records("failure")] == ["restart", "exhausted"]


def test_what_mnemo_refuses_is_not_tried_again(tmp_path: Path, script: Any) -> None:
    name = script("from mnemo.errors import ConfigError\nraise ConfigError('snapshot.every is 0')")
    ended = launch("--nproc-per-node=2", name, cwd=tmp_path)
    assert ended.code == 1
    assert "ConfigError: snapshot.every is 0) → a restart would end the same way" in ended.err
    assert [r["decision"] for r in ended.records("failure")] == ["refused"]


def test_later_launches_of_a_run_keep_the_logs_of_earlier_ones(tmp_path: Path, script: Any) -> None:
    name = script("print('here')")
    for _ in range(2):
        assert launch("run.id=same", name, cwd=tmp_path).code == 0
    assert [r["life"] for r in all_records() if r["event"] == "launch"] == [0, 1]
    assert logs(0) == logs(1) == {"rank-0.log": "here\n"}


JOIN = """
from mnemo.smp import lifecycle, messages as m
from mnemo.smp.paths import RunPaths
client = lifecycle.ensure(RunPaths.of(os.environ["MNEMO_RUN_ID"], os.environ["MNEMO_RUN__DIR"]))
board = client.ask(m.Join(0, rank, 2, 5.0), m.Joined)[1]
"""


def test_a_rank_that_leaves_a_training_early_is_a_failure_after_the_grace_period(
    tmp_path: Path, script: Any
) -> None:
    name = script(JOIN + "if rank == 0: wait()")
    words = ["recover.grace=200ms", "--nproc-per-node=2", "--max-restarts=0"]
    ended = launch(*words, name, cwd=tmp_path)
    assert ended.code == 1
    assert "rank 1 exited with code 0 while others were still training" in ended.err


def test_a_rank_that_works_on_after_the_training_is_waited_for(tmp_path: Path, script: Any) -> None:
    ended_training = JOIN + "client.tell(m.Leave(True)); client.close()\n"
    name = script(ended_training + "if rank == 0: time.sleep(1.5)\nprint('done', rank)")
    ended = launch("recover.grace=200ms", "--nproc-per-node=2", name, cwd=tmp_path)
    assert ended.code == 0
    assert "done 0" in ended.out


def test_ranks_may_end_one_after_the_other(tmp_path: Path, script: Any) -> None:
    name = script("time.sleep(0.3 * rank)")
    assert launch("--nproc-per-node=3", name, cwd=tmp_path).code == 0


@pytest.mark.parametrize(
    ("codes", "code", "said"),
    [
        ((75, 75), 75, "the state is saved; queue the job again"),
        ((76, 75), 76, "newest state is lost"),
    ],
)
def test_a_rank_that_speaks_for_the_job_ends_it(
    tmp_path: Path, script: Any, codes: tuple[int, int], code: int, said: str
) -> None:
    ended = launch("--nproc-per-node=2", script(f"sys.exit({codes}[rank])"), cwd=tmp_path)
    assert ended.code == code
    assert said in ended.err
    assert ended.records("failure") == []


def test_a_rank_that_hangs_does_not_hold_up_one_that_saved_the_state(
    tmp_path: Path, script: Any
) -> None:
    name = script("if rank == 0: sys.exit(75)\nwait()")
    ended = launch("recover.grace=200ms", "--nproc-per-node=2", name, cwd=tmp_path)
    assert ended.code == 75


@pytest.mark.parametrize(
    ("sent", "received"),
    [("SIGTERM", "SIGTERM"), ("SIGUSR1", "SIGTERM"), ("SIGHUP", "SIGTERM"), ("SIGINT", "SIGTERM")],
)
def test_a_signal_lets_the_ranks_save_their_state(
    tmp_path: Path, script: Any, sent: str, received: str
) -> None:
    name = script(say_ready(f"signal.signal(signal.{received}, lambda *_: sys.exit(75))"))
    with started("--nproc-per-node=2", name, cwd=tmp_path) as process:
        await_ready(process, 2)
        process.send_signal(signal.Signals[sent])
        ended = finish(process)
        assert ended.code == 75, ended.err
        assert f"{sent}: the ranks have 30 s to save their state and end" in ended.err
        assert [r["signal"] for r in ended.records("stop")] == [sent]


def test_a_signal_that_nobody_heeds_kills_after_the_grace_period(
    tmp_path: Path, script: Any
) -> None:
    name = script(say_ready("signal.signal(signal.SIGTERM, signal.SIG_IGN)"))
    with started("recover.grace=200ms", "--nproc-per-node=2", name, cwd=tmp_path) as process:
        await_ready(process, 2)
        process.terminate()
        assert finish(process).code == 128 + signal.SIGTERM


def test_a_second_ctrl_c_kills_at_once(tmp_path: Path, script: Any) -> None:
    name = script(say_ready('signal.signal(signal.SIGTERM, lambda *_: print("ready", flush=True))'))
    with started("recover.grace=1h", name, cwd=tmp_path) as process:
        await_ready(process, 1)
        process.send_signal(signal.SIGINT)
        await_ready(process, 1)
        process.send_signal(signal.SIGINT)
        assert finish(process).code == 128 + signal.SIGINT


def test_the_terminal_can_be_kept_free_of_ranks(tmp_path: Path, script: Any) -> None:
    name = script("print('out', rank); print('err', rank, file=sys.stderr)")
    words = ["--nproc-per-node=2", "--redirects=0:3,1:1", "--log-dir=logs", "run.id=r", name]
    ended = launch(*words, cwd=tmp_path)
    assert ended.out == ""
    assert "[rank 1] err 1" in ended.err
    assert "err 0" not in ended.err
    assert (tmp_path / "logs/r/life-0/rank-0.log").read_text() in {
        "out 0\nerr 0\n",
        "err 0\nout 0\n",
    }


def test_progress_bars_do_not_garble_a_real_terminal(tmp_path: Path, script: Any) -> None:
    name = script("""
for i in range(50):
    sys.stderr.write(f"\\r{i}% of rank {rank}"); sys.stderr.flush()
    print("line", i)
sys.stderr.write("\\n")
""")
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [*MNEMO, "run", "--nproc-per-node=2", name],
        cwd=tmp_path, stdin=slave, stdout=slave, stderr=slave, env={**os.environ, "NO_COLOR": "1"},
    )  # fmt: skip
    os.close(slave)
    shown = b""
    try:
        while data := os.read(master, 1 << 16):
            shown += data
    except OSError:  # the terminal's other side is closed: all is read
        pass
    os.close(master)
    assert process.wait(60) == 0
    ended = [line.rpartition(b"\x1b[K")[2] for line in shown.split(b"\r\n")]
    for rank in range(2):
        lines = [x for x in ended if x.startswith(b"[rank %d] line" % rank)]
        assert lines == [b"[rank %d] line %d" % (rank, i) for i in range(50)]
        assert b"[rank %d] 49%% of rank %d" % (rank, rank) in ended


LOOP = """
import sys
from pathlib import Path
from mnemo.errors import CrashLoopError
from mnemo.launcher import Agent, Hooks, LaunchOptions, Position
from mnemo.launcher.output import Terminal
from mnemo.recovery.journal import Journal

root = Path(sys.argv[1])
options = LaunchOptions(
    command=(sys.executable, "-c", "print('at the batch'); raise ValueError('NaN in sample 9')"),
    run_id="r", ranks=1, log_dir=root / "logs", max_restarts=50,
)
started = []
hooks = Hooks(ensure_smp=lambda: started.append(1), position=lambda: Position(2, 17, 417))
agent = Agent(options, journal=Journal(root / "r.jsonl"), terminal=Terminal(), hooks=hooks)
try:
    agent.run()
except CrashLoopError as error:
    print("LOOP", len(started), agent.exit_code, error)
"""


def test_a_crash_loop_ends_early_and_names_the_batch(tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", LOOP, tmp_path],
        capture_output=True,
        text=True,
        timeout=180,
        check=True,
    )
    said = ended.stdout.partition("LOOP ")[2]
    assert said.startswith("2 1 2 failures in a row at epoch 2, batch 17, step 417")
    assert "Rank 0 exited with code 1 (ValueError: NaN in sample 9)" in said
    assert "\n  at the batch\n" in said
    assert len(list((tmp_path / "logs").glob("life-*"))) == 2


HEARD = """
import asyncio, sys, time
from pathlib import Path
from mnemo.launcher import Agent, Hooks, LaunchOptions
from mnemo.launcher.output import Terminal
from mnemo.launcher.team import Alone
from mnemo.recovery.journal import Journal

root = Path(sys.argv[1])
options = LaunchOptions(
    command=(sys.executable, "-c", "raise SystemExit(3)"),
    run_id="r", ranks=1, log_dir=root / "logs", max_restarts=1,
)
beats = 0

class Team(Alone):
    def watch(self, changed):
        global beats
        beats += 1
        asyncio.get_running_loop().call_later(0.01, self.watch, changed)

def slow(name, answer):
    def ask():
        before = beats
        time.sleep(0.5)
        print("HEARD", name, beats - before > 5)
        return answer
    return ask

hooks = Hooks(ensure_smp=slow("ensure", None), position=slow("position", None),
              taken=slow("taken", False), silent=slow("silent", 0))
agent = Agent(options, journal=Journal(root / "r.jsonl"), terminal=Terminal(), hooks=hooks,
              team=Team(options))
print("CODE", agent.run())
"""


def test_an_agent_is_heard_while_the_snapshot_process_lets_it_wait(tmp_path: Path) -> None:
    """Other nodes would count it as lost."""
    ended = subprocess.run(
        [sys.executable, "-c", HEARD, tmp_path],
        capture_output=True,
        text=True,
        timeout=180,
        check=True,
    )
    said = [line.split()[1:] for line in ended.stdout.splitlines() if line.startswith("HEARD")]
    *during, at_the_end = [(name, heard == "True") for name, heard in said if name != "silent"]
    assert during == [(name, True) for name in ("ensure", "position", "taken")] * 2
    assert at_the_end[0] == "taken"
    assert "CODE 3" in ended.stdout


@pytest.mark.parametrize(
    "words", [("--nproc-per-node=1",), ("recover.in_process=off", "--nproc-per-node=2")]
)
def test_ranks_that_are_not_replaced_have_no_channel_and_their_own_store(
    tmp_path: Path, script: Any, words: tuple[str, ...]
) -> None:
    name = script(
        "print('MNEMO_CONTROL_FD' in os.environ, 'TORCHELASTIC_USE_AGENT_STORE' in os.environ)"
    )
    ended = launch(*words, name, cwd=tmp_path, TORCHELASTIC_USE_AGENT_STORE="True")
    assert {line.rpartition("] ")[2] for line in ended.out.splitlines()} == {"False False"}
