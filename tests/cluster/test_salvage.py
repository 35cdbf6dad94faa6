"""Nobody takes a lost node's place: what the nodes that are left keep is stored, or stays."""

from __future__ import annotations

import re
from pathlib import Path

import netns
import pytest
from cluster_lab import Job, etcd, until

from mnemo.types import EXIT_STATE_SAVED


def storing(directory: Path, nodes: str) -> dict[str, str]:
    """Settings of a job that stores what is left, and nothing before."""
    return {
        "MNEMO_PROTECT__NODES": nodes,
        "MNEMO_RECOVER__NO_SPARE": "wait 12s",
        "MNEMO_PERSIST__TO": str(directory / "checkpoints"),
        "MNEMO_PERSIST__EVERY": "1h",
    }


def stored_step(job: Job, *hosts: netns.Host) -> int:
    """What all of them say of it."""
    found = {re.findall(r"step (\d+) of all ranks is in", job.said(host))[-1] for host in hosts}
    assert len(found) == 1
    return int(found.pop())


@pytest.mark.parametrize(
    ("code", "nodes", "number"),
    [("1+1", 2, 1), pytest.param("2+1", 3, 0, marks=pytest.mark.campaign)],
)
def test_what_is_left_is_stored_when_nobody_takes_a_lost_nodes_place(
    tmp_path: Path, code: str, nodes: int, number: int
) -> None:
    """One is lost, and the others are when they have exited: new ones go on from storage."""
    with netns.network(tmp_path, nodes) as net:
        job = Job(net, tmp_path / "job", str(nodes), 200, storing(tmp_path, code))
        with job.explained():
            job.start(*net.hosts)
            until("a protected step", lambda: job.protected_step(*net.hosts) > 5)
            lost = net.hosts[number]
            lost.lose()
            left = [host for host in net.hosts if host is not lost]
            assert job.codes(*left) == [EXIT_STATE_SAVED] * len(left)
            step = stored_step(job, *left)
            assert 5 < step <= job.steps_done() < 200
            assert not [path for host in left for path in (host.home / "run").rglob("node-*")]
            for host in left:
                host.lose()
            job.settings["MNEMO_RECOVER__NO_SPARE"] = "wait 60s"
            job.start(*net.hosts)
            assert job.codes() == [0] * nodes
            assert f"→ resumed from storage at step {step}" in job.said(net.hosts[0])
        assert job.steps_done() == 200


@pytest.mark.campaign
def test_two_of_four_are_lost_and_what_is_left_is_stored(tmp_path: Path) -> None:
    """Each of those that are left does it for one that is lost."""
    with netns.network(tmp_path, 5) as net, etcd(net.hosts[4]) as place:
        job = Job(net, tmp_path / "job", "4", 300, storing(tmp_path, "2+2"))
        job.etcd, nodes = place, net.hosts[:4]
        with job.explained():
            job.start(*nodes)
            until("a protected step", lambda: job.protected_step(*nodes) > 5)
            for host in nodes[1:3]:
                host.lose()
            left = [nodes[0], nodes[3]]
            assert job.codes(*left) == [EXIT_STATE_SAVED] * 2
            step = stored_step(job, *left)
            for host in left:
                host.lose()
            job.settings["MNEMO_RECOVER__NO_SPARE"] = "wait 60s"
            job.start(*nodes)
            assert job.codes(*nodes) == [0] * 4
            assert f"→ resumed from storage at step {step}" in job.said()
        assert job.steps_done() == 300


@pytest.mark.campaign
@pytest.mark.parametrize(
    ("nodes", "ranks", "lost"), [(6, 1, (0, 3)), (3, 2, (1,))], ids=["two groups", "two ranks"]
)
def test_what_is_left_of_groups_and_of_several_ranks_a_node_is_stored(
    tmp_path: Path, nodes: int, ranks: int, lost: tuple[int, ...]
) -> None:
    """Each group brings back its own, and each lost node's part has all its ranks."""
    with netns.network(tmp_path, nodes) as net:
        flags = (f"--nproc-per-node={ranks}",)
        job = Job(net, tmp_path / "job", str(nodes), 300, storing(tmp_path, "2+1"), flags)
        job.settings["MNEMO_RECOVER__NO_SPARE"] = "wait 30s"
        with job.explained():
            job.start(*net.hosts)
            until("a protected step", lambda: job.protected_step(*net.hosts) > 5)
            for number in lost:
                net.hosts[number].lose()
            left = [host for host in net.hosts if host.number not in lost]
            assert job.codes(*left) == [EXIT_STATE_SAVED] * len(left)
            step = stored_step(job, *left)
            for host in left:
                host.lose()
            job.settings["MNEMO_RECOVER__NO_SPARE"] = "wait 60s"
            job.start(*net.hosts)
            assert job.codes() == [0] * nodes
            assert f"→ resumed from storage at step {step}" in job.said()
        assert job.steps_done() == 300
        assert len({digest for digest, _ in job.result(nodes * ranks)}) == 1


@pytest.mark.campaign
def test_what_is_left_cannot_be_stored(tmp_path: Path) -> None:
    """Storage cannot be written: it is said, and what is left stays in memory."""
    with netns.network(tmp_path, 3) as net:
        (tmp_path / "checkpoints").write_text("a file, not a directory")
        job = Job(net, tmp_path / "job", "3", 300, storing(tmp_path, "2+1"))
        with job.explained():
            job.start(*net.hosts)
            until("a protected step", lambda: job.protected_step(*net.hosts) > 5)
            net.hosts[2].lose()
            assert job.codes(*net.hosts[:2]) == [EXIT_STATE_SAVED] * 2
            for host in net.hosts[:2]:
                assert "what is left is not stored: step" in job.said(host)
                assert "the state is saved" not in job.said(host)
                assert "stays in memory: start again" in job.said(host)


@pytest.mark.campaign
def test_nobody_takes_a_lost_nodes_place(tmp_path: Path) -> None:
    """What is left stays in memory, and a relaunch goes on from there."""
    with netns.network(tmp_path, 3) as net:
        settings = {"MNEMO_PROTECT__NODES": "2+1", "MNEMO_RECOVER__NO_SPARE": "wait 8s"}
        job = Job(net, tmp_path / "job", "3", 300, settings)
        with job.explained():
            job.start(*net.hosts)
            until("a protected step", lambda: job.protected_step(*net.hosts) > 5)
            net.hosts[2].lose()
            assert job.codes(*net.hosts[:2]) == [EXIT_STATE_SAVED] * 2
            assert "stays in memory: start again" in job.said(net.hosts[0])
            job.settings["MNEMO_RECOVER__NO_SPARE"] = "wait 60s"
            job.start(*net.hosts)
            assert job.codes() == [0, 0, 0]
            assert "→ resumed from memory" in job.said(net.hosts[0])
        assert job.steps_done() == 300
