"""Nodes that are lost while they train: the job comes back, exact, on what takes their place."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import netns
import pytest
from cluster_lab import Job, etcd, until

Result = list[tuple[str, dict[int, str]]]


def job_of(net: netns.Network, directory: Path, nodes: str, code: str, steps: int) -> Job:
    return Job(net, directory, nodes, steps, {"MNEMO_PROTECT__NODES": code})


def undisturbed(directory: Path, nodes: int, code: str, steps: int) -> Result:
    """What a training has in the end that nobody disturbs."""
    directory.mkdir()
    with netns.network(directory, nodes) as net:
        job = job_of(net, directory / "job", str(nodes), code, steps)
        with job.explained():
            job.start(*net.hosts)
            assert job.codes() == [0] * nodes
        return job.result(nodes)


def test_a_spare_takes_the_place_of_the_node_with_the_store(tmp_path: Path) -> None:
    """It hosted rank 0, its store and the journal, too."""
    with netns.network(tmp_path, 4) as net:
        job = job_of(net, tmp_path / "job", "3:4", "2+1", 200)
        with job.explained():
            job.start(*net.hosts[:3])
            job.reach(5)
            job.start(net.hosts[3])
            until("a protected step", lambda: job.protected_step(*net.hosts[:3]) >= 5)
            net.hosts[0].lose()
            assert job.codes(*net.hosts[1:]) == [0, 0, 0]
            assert "node 10.77.0.10 was lost" in job.said(net.hosts[1])
            assert "node 10.77.0.10 was lost → resumed from memory at step" in job.said()
        assert len({digest for digest, _ in job.result(3)}) == 1
        assert job.steps_done() == 200  # `Job.losses` sees to it that repeated steps are equal


@pytest.mark.campaign
@pytest.mark.timeout(3600)
def test_thirty_nodes_are_lost_one_after_another(tmp_path: Path, seed: int) -> None:
    """Any of four, the Store's host among them; a new one comes in its place each time."""
    chance = random.Random(seed)
    steps = 60 + 40 * 30
    control = undisturbed(tmp_path / "control", 4, "3+1", steps)
    with netns.network(tmp_path, 4) as net:
        job = job_of(net, tmp_path / "job", "4", "3+1", steps)
        with job.explained():
            job.start(*net.hosts)
            for number in range(30):
                reached = job.steps_done()
                until("all go on", lambda reached=reached: job.steps_done() > reached)
                until(
                    "a protected step",
                    lambda reached=reached: job.protected_step(*net.hosts) > reached,
                )
                goal = job.steps_done() + chance.randint(1, 15)
                job.reach(goal)
                time.sleep(chance.random() * 0.02)  # somewhere within a step
                host = chance.choice(net.hosts)
                began = time.monotonic()
                host.lose()
                job.start(host)
                at = job.steps_done()
                # The step that was being made may still have been written down.
                until("the job comes back", lambda at=at: job.steps_done() > at + 1)
                took = time.monotonic() - began
                print(f"loss {number}: host {host.number} at step {at}, back after {took:.1f} s")
            assert job.codes() == [0] * 4
        assert job.result(4) == control


@pytest.mark.campaign
@pytest.mark.timeout(1200)
def test_a_second_node_is_lost_while_the_first_comes_back(tmp_path: Path, seed: int) -> None:
    """Two parities: both come back, whatever the moment, and whichever they are, with etcd."""
    chance = random.Random(seed)
    control = undisturbed(tmp_path / "control", 4, "2+2", 400)
    with netns.network(tmp_path, 5) as net, etcd(net.hosts[4]) as place:
        job = job_of(net, tmp_path / "job", "4", "2+2", 400)
        job.etcd = place
        nodes = net.hosts[:4]
        with job.explained():
            job.start(*nodes)
            for delay_s in (1.0, 4.0, 7.0, 10.0):
                reached = job.steps_done()
                until(
                    "a protected step",
                    lambda reached=reached: job.protected_step(*nodes) > reached,
                )
                first, second = chance.sample(nodes, 2)
                first.lose()
                job.start(first)
                time.sleep(delay_s)
                second.lose()
                job.start(second)
                at = job.steps_done()
                until("the job comes back", lambda at=at: job.steps_done() > at + 1)
            assert job.codes(*nodes) == [0] * 4
        assert job.result(4) == control


@pytest.mark.campaign
@pytest.mark.timeout(600)
def test_nodes_that_know_the_first_place_alone_come_back(tmp_path: Path) -> None:
    """It is lost itself, with the Store, and so is where the Store has been moved to."""
    with netns.network(tmp_path, 3) as net:
        job = job_of(net, tmp_path / "job", "3", "2+1", 400)
        job.meet_at = (net.hosts[0],)
        with job.explained():
            job.start(*net.hosts)
            for number, away_s in ((0, 0.0), (1, 0.0), (2, 15.0), (0, 15.0)):
                reached = job.steps_done()
                until(
                    "a protected step",
                    lambda reached=reached: job.protected_step(*net.hosts) > reached,
                )
                host = net.hosts[number]
                host.lose()
                time.sleep(away_s)
                job.start(host)
                at = job.steps_done()
                until("the job comes back", lambda at=at: job.steps_done() > at + 1)
            assert job.codes() == [0, 0, 0]
        assert job.steps_done() == 400


@pytest.mark.campaign
def test_a_job_that_was_killed_goes_on_with_its_nodes_in_their_places(tmp_path: Path) -> None:
    """A spare has taken the place of node 0; the launch that follows cannot tell by addresses."""
    with netns.network(tmp_path, 4) as net:
        job = job_of(net, tmp_path / "job", "3", "2+1", 400)
        with job.explained():
            job.start(*net.hosts[:3])
            until("a protected step", lambda: job.protected_step(*net.hosts[:3]) >= 5)
            net.hosts[0].lose()
            job.start(net.hosts[3])
            at = job.steps_done()
            job.reach(at + 5)
            rest = net.hosts[1:]
            for host in rest:
                os.killpg(job.agents[host.number].pid, signal.SIGKILL)
            for host in rest:
                job.agents[host.number].wait()
            job.meet_at = tuple(rest)
            job.start(*rest)
            assert job.codes(*rest) == [0, 0, 0]
            assert job.said(net.hosts[3]).count("→ resumed from memory") == 2
        assert job.steps_done() == 400


@pytest.mark.campaign
def test_a_relaunch_waits_for_nodes_with_state_that_come_after_fresh_ones(tmp_path: Path) -> None:
    with netns.network(tmp_path, 4) as net:
        job = job_of(net, tmp_path / "job", "2:4", "1+1", 200)
        with job.explained():
            keepers, fresh = net.hosts[:2], net.hosts[2:]
            job.start(*keepers)
            until("a protected step", lambda: job.protected_step(*keepers) > 5)
            for host in keepers:
                os.killpg(job.agents[host.number].pid, signal.SIGKILL)
                job.agents[host.number].wait()
            job.meet_at = tuple(fresh)
            job.start(*fresh)
            until("there is a Store", lambda: listens(fresh[0], 29400))
            job.start(*keepers)
            assert job.codes() == [0] * 4
            assert "→ resumed from memory" in job.said(*keepers)
        assert job.steps_done() == 200


def listens(host: netns.Host, port: int) -> bool:
    """Whether somebody does there."""
    tables = [Path(f"/proc/{pid}/net/tcp6") for pid in host.pids()[:1]]
    return any(f":{port:04X} {'0' * 32}:0000 0A" in table.read_text() for table in tables)


@pytest.mark.campaign
def test_a_spare_that_is_not_needed_ends_with_the_job(tmp_path: Path) -> None:
    with netns.network(tmp_path, 3) as net:
        job = job_of(net, tmp_path / "job", "2:3", "1+1", 40)
        with job.explained():
            job.start(*net.hosts)
            assert job.codes() == [0, 0, 0]
