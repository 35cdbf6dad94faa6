"""What memory can be had, what it outlives, and who is killed first."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from smp_lab import memory_group

from mnemo.smp import memory


def in_group(group: Path, code: str) -> str:
    """What ``code`` prints in a process of ``group``."""
    enter = f"open({str(group / 'cgroup.procs')!r}, 'w').write('0')\n"
    done = subprocess.run(
        [sys.executable, "-c", enter + code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_no_more_than_the_host_has() -> None:
    limit = memory.memory_limit()
    assert 0 < limit.available <= limit.total <= psutil.virtual_memory().total
    assert limit.bound in ("host", "container")


def test_a_containers_limit_counts() -> None:
    code = (
        "from mnemo.smp.memory import memory_limit\n"
        "limit = memory_limit(); print(limit.bound, limit.total, limit.available)"
    )
    with memory_group(512 << 20) as group:
        bound, total, available = in_group(group, code).split()
    assert (bound, int(total)) == ("container", 512 << 20)
    assert (400 << 20) < int(available) <= (512 << 20)


@pytest.mark.parametrize(
    ("variables", "ends", "container"),
    [
        ({}, True, None),
        ({"SLURM_JOB_ID": "7"}, None, None),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, True, False),
    ],
)
def test_survival_domain(
    monkeypatch: pytest.MonkeyPatch,
    variables: dict[str, str],
    ends: bool | None,
    container: bool | None,
) -> None:
    for name in ("SLURM_JOB_ID", "KUBERNETES_SERVICE_HOST"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    domain = memory.survival_domain()
    assert domain["the trainer's death"] is True
    assert domain["the launcher's end"] is ends
    if not Path("/.dockerenv").exists():
        assert domain["the container's restart"] is container
    assert isinstance(domain["an out-of-memory kill"], bool)


def test_a_trainer_is_a_likelier_victim_than_the_snapshot_process() -> None:
    code = (
        "import os; from mnemo.smp.memory import rank_above\n"
        "read = lambda: int(open('/proc/self/oom_score_adj').read())\n"
        "before = read(); rank_above(os.getppid()); once = read()\n"
        "rank_above(os.getppid()); print(before, once, read())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before, once, twice = map(int, done.stdout.split())
    ours = int(Path("/proc/self/oom_score_adj").read_text())
    assert once == twice == max(before, min(ours + 200, 1000))


def test_a_snapshot_process_that_is_gone_changes_nothing() -> None:
    before = Path("/proc/self/oom_score_adj").read_text()
    memory.rank_above(2**22 + 1)
    assert Path("/proc/self/oom_score_adj").read_text() == before
