"""Nodes whose link is slow: they train like the others, or others do without them."""

from __future__ import annotations

import time
from pathlib import Path

import netns
import pytest
from cluster_lab import Job, until
from test_partitions import members, ranks_of

SETTINGS = {"MNEMO_PROTECT__NODES": "2+1"}


@pytest.mark.campaign
@pytest.mark.timeout(600)
@pytest.mark.parametrize("number", [0, 2])
def test_a_node_on_a_slow_link_trains_and_outlives_another(tmp_path: Path, number: int) -> None:
    """From the start, 30 ms each way and 2 MB/s; it has the Store, or has not."""
    with netns.network(tmp_path, 4) as net:
        job = Job(net, tmp_path / "job", "3:4", 120, SETTINGS)
        slow = net.hosts[number]
        slow.slow(0.03, rate=2e6)
        with job.explained():
            job.start(*net.hosts[:3])
            job.reach(5)
            job.start(net.hosts[3])
            until("a protected step", lambda: job.protected_step(*net.hosts[:3]) >= 5)
            lost = net.hosts[1]
            lost.lose()
            rest = [host for host in net.hosts if host is not lost]
            assert job.codes(*rest) == [0, 0, 0]
            assert f"node {lost.address} was lost → resumed from memory at step" in job.said()
            assert f"{slow.address} was lost" not in job.said()
        assert len({digest for digest, _ in job.result(3)}) == 1
        assert job.steps_done() == 120  # `Job.losses` sees to it that repeated steps are equal


@pytest.mark.campaign
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("number", "delay_s"), [(0, 0.05), (2, 0.1), (0, 0.3), (2, 1.5), (0, 1.5)])
def test_a_link_becomes_slow_and_one_side_goes_on(
    tmp_path: Path, number: int, delay_s: float
) -> None:
    """The node stays, or is replaced by the spare; never do both go on."""
    with netns.network(tmp_path, 4) as net:
        job = Job(net, tmp_path / "job", "3:4", 100, SETTINGS)
        with job.explained():
            job.start(*net.hosts[:3])
            job.reach(5)
            job.start(net.hosts[3])
            until("a protected step", lambda: job.protected_step(*net.hosts[:3]) >= 5)
            slow = net.hosts[number]
            slow.slow(delay_s)
            reached = job.steps_done()
            deadline = time.monotonic() + 120
            while job.steps_done() < reached + 20:
                assert time.monotonic() < deadline
                assert len(members(job)) <= 3
                time.sleep(0.1)
            stays = bool(ranks_of(slow))
            assert stays == (delay_s < 0.2)
            slow.slow(0.0)
            rest = [host for host in net.hosts if stays or host is not slow]
            assert job.codes(*rest) == [0] * len(rest)
            slow.lose()  # it is a spare, or finds nobody any more
        assert len({digest for digest, _ in job.result(3)}) == 1
        assert job.steps_done() == 100
