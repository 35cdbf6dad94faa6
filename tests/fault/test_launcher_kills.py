from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest
from launching import TIMEOUT_S, all_records, finish, launch, started

from mnemo.faults import Declaration, Fault, Hook
from mnemo.smp.paths import RunPaths

if TYPE_CHECKING:
    from collections.abc import Iterator

# A rank with a child in its group and one that has left it; each prints its number.
FAMILY = """
import os, signal, subprocess, sys
rank, life = os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]
sleep = ["sleep", "1000"]
near = subprocess.Popen(sleep)
far = subprocess.Popen(sleep, start_new_session=True)
orphan = subprocess.run(
    [sys.executable, "-c", "import subprocess as s; print(s.Popen(['sleep', '1000'],"
     " start_new_session=True, stdout=s.DEVNULL, stderr=s.DEVNULL).pid)"],
    capture_output=True, text=True)
print("pids", os.getpid(), near.pid, far.pid, orphan.stdout.strip(), flush=True)
if life == "0":
    signal.pause()
"""


def numbers(process: subprocess.Popen[str], ranks: int) -> dict[int, list[int]]:
    """The processes of each rank: itself, near, far, orphan."""
    assert process.stdout is not None
    found = {}
    while len(found) < ranks:
        prefix, _, rest = process.stdout.readline().partition("pids ")
        found[int(prefix.split()[1].strip("]"))] = [int(pid) for pid in rest.split()]
    return found


def test_a_killed_rank_takes_everything_along_that_any_rank_started(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(FAMILY)
    with started("recover.grace=10s", "--nproc-per-node=2", "train.py", cwd=tmp_path) as process:
        family = numbers(process, 2)
        os.kill(family[1][0], signal.SIGKILL)
        again = numbers(process, 2)
        for pid in (*family[0], *family[1]):
            assert not psutil.pid_exists(pid)
        ended = finish(process)
        assert ended.code == 0, ended.err
        assert "rank 1 killed by SIGKILL → all 2 ranks restart" in ended.err
        for pid in (*again[0], *again[1]):  # also after a good end
            assert not psutil.pid_exists(pid)


def test_a_death_is_noticed_at_once(tmp_path: Path) -> None:
    declared = Declaration(
        (Fault("sigkill", 1, Hook("forward", 3)),), record=str(tmp_path / "fired")
    )
    (tmp_path / "train.py").write_text("""
import time
from mnemo import faults
for step in range(10):
    faults.reach("forward", step=step)
    time.sleep(0.02)
""")
    ended = launch("--nproc-per-node=2", "train.py", cwd=tmp_path, **declared.environ())
    assert ended.code == 0, ended.err
    declared.assert_fired()
    (failure,) = ended.records("failure")
    (fired,) = declared.fired()
    assert (failure["rank"], failure["worker_pid"]) == (1, fired.pid)
    assert 0 <= failure["noticed"] - fired.time < 1.0


def test_nothing_survives_the_agents_own_death(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(
        "import os, signal; print('pids', os.getpid(), flush=True); signal.pause()"
    )
    with started("--nproc-per-node=2", "train.py", cwd=tmp_path) as process:
        ranks = [psutil.Process(pids[0]) for pids in numbers(process, 2).values()]
        process.kill()
        finish(process)
        _, alive = psutil.wait_procs(ranks, timeout=TIMEOUT_S)
        assert alive == []


def test_the_snapshot_process_is_spared(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text("""
import os, subprocess
smp = subprocess.Popen(["sleep", "1000"], start_new_session=True, stdout=subprocess.DEVNULL,
                       stderr=subprocess.DEVNULL, env={**os.environ, "MNEMO_ROLE": "smp"})
print(smp.pid, flush=True)
os.kill(os.getpid(), 9)
""")
    ended = launch("--max-restarts=1", "train.py", cwd=tmp_path)
    assert ended.code == 137
    pids = [int(line) for line in ended.out.split()]
    assert len(pids) == 2
    for pid in pids:
        spared = psutil.Process(pid)
        spared.kill()
        spared.wait(TIMEOUT_S)


def test_deaths_are_noticed_without_pidfd(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text("""
import os, signal
if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    os.kill(os.getpid(), 9) if os.environ["RANK"] == "1" else signal.pause()
""")
    old_kernel = "import os; del os.pidfd_open; from mnemo.cli import main; main()"
    ended = subprocess.run(
        [sys.executable, "-c", old_kernel, "run", "--nproc-per-node=2", "train.py"],
        cwd=tmp_path, capture_output=True, text=True, timeout=TIMEOUT_S, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert "rank 1 killed by SIGKILL" in ended.stderr


@contextmanager
def memory_group(limit: int) -> Iterator[Path]:
    """A control group with so many bytes of memory, of either version."""
    root = Path("/sys/fs/cgroup")
    v1 = (root / "memory").is_dir()
    parent = root / "memory" if v1 else root
    group = parent / f"mnemo-test-{os.getpid()}"
    try:
        group.mkdir()
        (group / ("memory.limit_in_bytes" if v1 else "memory.max")).write_text(str(limit))
    except OSError as error:
        pytest.skip(f"needs a memory control group: {error}")
    try:
        yield group
    finally:
        group.rmdir()


def test_a_rank_killed_for_want_of_memory_is_said_to_be(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text("""
import os
if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    hog = [bytearray(b"x" * (16 << 20)) for _ in range(64)]
""")
    with memory_group(200 << 20) as group, subprocess.Popen(
        ["sh", "-c", 'echo $$ > "$0/cgroup.procs" && exec "$@"', str(group), sys.executable,
         "-c", "from mnemo.cli import main; main()", "run", "train.py"],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        ended = finish(process)
    assert ended.code == 0, ended.err
    assert "rank 0 killed (out of host memory) → it restarts (1 of" in ended.err
    assert [r["kind"] for r in all_records() if r["event"] == "failure"] == ["out of host memory"]


@pytest.mark.campaign
def test_two_gloo_ranks_meet_again_after_one_is_killed(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text("""
import torch, torch.distributed as dist
from mnemo import faults
dist.init_process_group("gloo")
total = torch.ones(4) * dist.get_rank()
for step in range(5):
    faults.reach("between", step=step)
    dist.all_reduce(total)
print("sum", total.tolist(), flush=True)
dist.destroy_process_group()
""")
    declared = Declaration(
        (Fault("sigkill", 0, Hook("between", 2)),), record=str(tmp_path / "fired")
    )
    ended = launch("--nproc-per-node=2", "train.py", cwd=tmp_path, **declared.environ())
    assert ended.code == 0, ended.err
    declared.assert_fired()
    assert sorted(ended.out.splitlines()) == [
        f"[rank {rank}] sum [16.0, 16.0, 16.0, 16.0]" for rank in range(2)
    ]
    assert [r["rank"] for r in ended.records("failure")] == [0]
    ports = [r["life"] for r in ended.records("launch")]
    assert ports == [0, 1]


def test_what_a_rank_leaves_behind_may_finish_within_the_grace_period(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text("""
import os, subprocess, sys
uploader = '''
import os, signal, sys
def finish(*_):
    print("uploaded", flush=True)
    os._exit(0)
signal.signal(signal.SIGTERM, finish)
os.write(int(sys.argv[1]), b"ready")
while True:
    signal.pause()
'''
read_end, write_end = os.pipe()
subprocess.Popen([sys.executable, "-c", uploader, str(write_end)], pass_fds=[write_end],
                 start_new_session=True)
assert os.read(read_end, 5) == b"ready"
""")
    ended = launch("train.py", cwd=tmp_path)
    assert (ended.code, ended.out) == (0, "uploaded\n"), ended.err


@pytest.mark.campaign
def test_a_snapshot_process_that_is_stopped_for_a_while_is_named(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text("import signal; print('up', flush=True); signal.pause()")
    with started("run.id=stopped", "train.py", cwd=tmp_path) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        record = RunPaths.of("stopped", os.environ["MNEMO_RUN__DIR"]).read_record()
        assert record is not None
        os.kill(record.pid, signal.SIGSTOP)
        try:
            lines = iter(process.stderr.readline, "")
            assert any(f"{record.pid}, has given no answer for 5 s" in line for line in lines)
        finally:
            os.kill(record.pid, signal.SIGCONT)
        assert "the snapshot process answers again, after" in process.stderr.readline()
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGINT)
        finish(process)


@pytest.mark.campaign
def test_a_stopped_snapshot_process_is_waited_for_with_a_line(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text("""
import os, signal
print("life", os.environ["TORCHELASTIC_RESTART_COUNT"], os.getpid(), flush=True)
if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    signal.pause()
""")
    with started("run.id=stuck", "train.py", cwd=tmp_path) as process:
        assert process.stdout is not None
        rank = int(process.stdout.readline().split()[-1])
        record = RunPaths.of("stuck", os.environ["MNEMO_RUN__DIR"]).read_record()
        assert record is not None
        os.kill(record.pid, signal.SIGSTOP)
        try:
            os.kill(rank, signal.SIGKILL)
            assert process.stderr is not None
            said = [process.stderr.readline()]
            while "does not answer" not in said[-1]:
                assert said[-1], said
                said.append(process.stderr.readline())
        finally:
            os.kill(record.pid, signal.SIGCONT)
        ended = finish(process)
    assert ended.code == 0, ended.err
    assert any("rank 0 killed by SIGKILL" in line for line in said)
    assert "life 1" in ended.out
