"""A snapshot process that holds nothing to resume from does not stay for an hour."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import smp_lab
from launching import launch
from smp_lab import Rank, run_directory

from mnemo.smp import lifecycle
from mnemo.smp import messages as m

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mnemo.smp.paths import RunPaths

HOUR_S = 3600.0


@pytest.fixture
def paths() -> Iterator[RunPaths]:
    with run_directory() as found:
        yield found


def kept_for(paths: RunPaths) -> float | None:
    """Seconds that the snapshot process would stay, as it says itself."""
    with smp_lab.connect(paths) as client:
        seconds: float | None = client.status()["kept_for_s"]
        return seconds


def test_without_a_committed_generation_it_stays_a_minute(paths: RunPaths) -> None:
    rank = Rank.join(paths, keep_alive_s=HOUR_S)
    assert kept_for(paths) is None
    rank.begin(1)  # never sealed
    rank.close()
    assert 50 < (kept_for(paths) or 0) <= 60


def test_ranks_that_join_late_find_it(paths: RunPaths) -> None:
    first = Rank.join(paths, 0, 2, keep_alive_s=HOUR_S)
    pid = first.client.pid
    first.write(1)  # sealed by one of two: nothing to resume from
    first.close()
    assert 50 < (kept_for(paths) or 0) <= 60
    ranks = [Rank.join(paths, rank, 2, keep_alive_s=HOUR_S) for rank in (0, 1)]
    assert {rank.client.pid for rank in ranks} == {pid}
    assert kept_for(paths) is None
    for rank in ranks:
        rank.write(2)
    for rank in ranks:
        rank.close()
    assert (kept_for(paths) or 0) > HOUR_S - 60


def test_what_was_given_up_is_not_kept(paths: RunPaths) -> None:
    rank = Rank.join(paths, keep_alive_s=HOUR_S)
    rank.write(1)
    rank.client.tell(m.Resume(-1))  # begun anew, and nothing committed since
    rank.close()
    assert (kept_for(paths) or 0) <= 60


def test_a_shorter_keep_alive_counts(paths: RunPaths) -> None:
    rank = Rank.join(paths, keep_alive_s=0.3)
    pid = rank.client.pid
    rank.close()
    smp_lab.wait_for_exit(pid, 10.0)
    assert not paths.directory.exists()


def test_an_agent_keeps_it_and_takes_it_along(paths: RunPaths) -> None:
    with lifecycle.ensure(paths) as agent:
        agent.tell(m.Attend())
        rank = Rank.join(paths, keep_alive_s=HOUR_S)
        rank.close()
        assert kept_for(paths) is None
        pid = agent.pid
    smp_lab.wait_for_exit(pid, 10.0)
    assert not paths.directory.exists()


def test_an_agent_that_goes_leaves_what_is_committed(paths: RunPaths) -> None:
    with lifecycle.ensure(paths) as agent:
        agent.tell(m.Attend())
        rank = Rank.join(paths, keep_alive_s=HOUR_S)
        rank.write(1)
        rank.close()
    assert (kept_for(paths) or 0) > HOUR_S - 60


def test_lives_that_fail_before_the_first_snapshot_share_one_and_leave_none(tmp_path: Path) -> None:
    """Each life joins, waits as long as an SMP lingers that nobody attends, and fails."""
    (tmp_path / "train.py").write_text("""
import os, time
from mnemo.smp import lifecycle, messages as m
from mnemo.smp.paths import RunPaths
from mnemo.smp.server import LINGER_S
with lifecycle.ensure(RunPaths.of(os.environ["MNEMO_RUN_ID"], os.environ["MNEMO_RUN__DIR"])) as c:
    c.ask(m.Join(0, 0, 1, 3600.0), m.Joined)
    print("smp", c.pid, flush=True)
time.sleep(LINGER_S + 0.5)
raise ValueError("no such model")
""")
    ended = launch("--max-restarts=1", "train.py", cwd=tmp_path)
    assert ended.code == 1
    said = [line for line in ended.out.splitlines() if line.startswith("smp ")]
    assert len(said) == 2
    assert len(set(said)) == 1
    smp_lab.wait_for_exit(int(said[0].split()[1]), 10.0)
    assert list(Path(os.environ["MNEMO_RUN__DIR"]).iterdir()) == []
