"""Ranks that fail on one of several nodes, and jobs that are asked to end."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import time
from pathlib import Path

import netns
import pytest
from cluster_lab import Job, etcd, keys_in_etcd, until
from test_partitions import ranks_of

from mnemo.types import EXIT_STATE_SAVED

SETTINGS = {"MNEMO_PROTECT__NODES": "1+1"}


@pytest.mark.campaign
def test_a_rank_dies_and_all_restart_until_that_was_too_often(tmp_path: Path) -> None:
    with netns.network(tmp_path, 3) as net:
        flags = ("--max-restarts=1",)
        job = Job(net, tmp_path / "job", "2:3", 10**6, SETTINGS, flags)
        here, there, spare = net.hosts
        with job.explained():
            job.start(here, there)
            job.reach(1)
            job.start(spare)
            job.reach(10)
            os.kill(ranks_of(there)[0], signal.SIGKILL)
            until("both know", lambda: job.said().count("rank 1 killed by SIGKILL →") >= 2)
            assert job.said(here).count("all 2 ranks restart (1 of 1 restart)") == 1
            at = job.steps_done()
            job.reach(at + 2)
            assert "rank 1 killed by SIGKILL → resumed from memory at step" in job.said(here)
            assert ", exact" in job.said(here)
            os.kill(ranks_of(there)[0], signal.SIGKILL)
            assert job.codes() == [137, 137, 137]
            assert "giving up with exit code 137" in job.said(there)
            assert "ending with exit code 137" in job.said(here)


@pytest.mark.campaign
@pytest.mark.parametrize("backend", ["c10d", "etcd"])
def test_a_job_that_is_asked_to_end_is_saved_on_all_nodes_and_goes_on(
    tmp_path: Path, backend: str
) -> None:
    """It is enough to ask one agent. In etcd nothing of it stays."""
    with netns.network(tmp_path, 3) as net, contextlib.ExitStack() as stack:
        nodes = net.hosts[:2]
        job = Job(net, tmp_path / "job", "2", 150, SETTINGS)
        if backend == "etcd":
            job.etcd = stack.enter_context(etcd(net.hosts[2]))
        with job.explained():
            job.start(*nodes)
            job.reach(10)
            job.agents[1].send_signal(signal.SIGTERM)
            assert job.codes(*nodes) == [EXIT_STATE_SAVED] * 2
            done = job.steps_done()
            assert done < 150
            assert not (job.etcd and keys_in_etcd(net.hosts[2], job.etcd))
            job.start(*nodes)
            assert job.codes(*nodes) == [0, 0]
            assert not (job.etcd and keys_in_etcd(net.hosts[2], job.etcd))
            assert "→ resumed from memory" in job.said(net.hosts[0])
            assert ", 0 steps lost" in job.said(net.hosts[0])
        assert job.steps_done() == 150


def test_nobody_comes(tmp_path: Path) -> None:
    with netns.network(tmp_path, 1) as net:
        settings = {**SETTINGS, "MNEMO_RECOVER__NO_SPARE": "wait 8s"}
        job = Job(net, tmp_path / "job", "2", 10, settings)
        with job.explained():
            job.start(*net.hosts)
            assert job.codes() == [1]
            assert "waited 8s (recover.no_spare)" in job.said()


@pytest.mark.campaign
def test_a_newcomer_that_does_not_begin_leaves_and_costs_nobody_a_restart(tmp_path: Path) -> None:
    """With a program that fails, then where others do not reach it; the third one trains."""
    with netns.network(tmp_path, 6) as net:
        settings = {"MNEMO_PROTECT__NODES": "2+1"}
        job = Job(net, tmp_path / "job", "3", 400, settings, ("--max-restarts=1",))
        first, *left, fails, apart, good = net.hosts
        with job.explained():
            job.start(first, *left)
            until("a protected step", lambda: job.protected_step(first, *left) >= 5)
            first.lose()
            job.settings = {**settings, "WIDTH": "wide"}
            job.start(fails)
            assert job.codes(fails) == [1]
            assert "leaves before it has trained: exit code 1; its log is" in job.said(fails)
            apart.add_dead_end("away")
            job.settings = {**settings, "MNEMO_NETWORK__INTERFACE": "away"}
            job.start(apart)
            assert job.codes(apart) == [2]
            cause = r"node 10\.77\.0\.1[12] cannot reach node 10\.66\.0\.1, where rank 0 is"
            assert re.search(cause, job.said(apart))
            job.settings = settings
            job.start(good)
            assert job.codes(*left, good) == [0, 0, 0]
            for host in left:
                assert re.search(cause, job.said(host))
                assert job.said(host).count("that node leaves, and the others wait") == 2
            assert "→ resumed from memory at step" in job.said(good)


@pytest.mark.campaign
@pytest.mark.timeout(300)
def test_rank_0_where_the_others_do_not_reach_it_is_named_at_once(tmp_path: Path) -> None:
    with netns.network(tmp_path, 2) as net:
        job = Job(net, tmp_path / "job", "2", 400, SETTINGS)
        first, other = net.hosts
        first.add_dead_end("away")
        with job.explained():
            job.start(other)
            job.settings = {**SETTINGS, "MNEMO_NETWORK__INTERFACE": "away"}
            job.start(first)
            begun = time.monotonic()
            assert job.codes() == [2, 2]
            assert time.monotonic() - begun < 60
            for host in net.hosts:
                cause = f"node {other.address} cannot reach node 10.66.0.1, where rank 0 is"
                assert cause in job.said(host)
