"""Networks that are cut while nodes train: never do two sides go on, and one does if it may."""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import time
from pathlib import Path

import netns
import pytest
from cluster_lab import MNEMO, Job, etcd, until

STEPS = 120
FOUR = {"MNEMO_PROTECT__NODES": "2+2"}
THREE = {"MNEMO_PROTECT__NODES": "2+1"}


def members(job: Job) -> list[netns.Host]:
    """Hosts on which a rank runs."""
    return [host for host in job.network.hosts if ranks_of(host)]


def ranks_of(host: netns.Host) -> list[int]:
    """Processes of its ranks."""
    found = []
    for pid in host.pids():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            words = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            if any(word.startswith(b"LOCAL_RANK=") for word in words):
                found.append(pid)
    return found


@pytest.mark.campaign
def test_without_a_majority_all_pause_until_the_operator_speaks(tmp_path: Path) -> None:
    """Two of four nodes are lost, with the Store: the rest may as well be cut off themselves."""
    with netns.network(tmp_path, 6) as net:
        job = Job(net, tmp_path / "job", "4:6", STEPS, FOUR)
        with job.explained():
            job.start(*net.hosts[:4])
            job.reach(20)
            job.start(*net.hosts[4:])
            until("a protected step", lambda: job.protected_step(*members(job)) > 0)
            lost, left, rest = net.hosts[:2], net.hosts[2:4], net.hosts[2:]
            for host in lost:  # the first has the Store
                host.lose()
            until("the others stop", lambda: not members(job))
            until("they ask", lambda: all("mnemo confirm-lost" in job.said(h) for h in left))
            done = job.steps_done()
            time.sleep(3.0)  # that nothing happens shows in nothing that could be waited on
            assert (members(job), job.steps_done()) == ([], done)
            words = ("confirm-lost", *(h.address for h in lost), "--run=job")
            command = (*MNEMO, *words, f"--dir={left[0].home / 'run'}")
            subprocess.run(command, check=True, env=os.environ)
            assert job.codes(*rest) == [0] * len(rest)
        assert job.steps_done() == STEPS
        assert "→ resumed from memory" in job.said()


@pytest.mark.campaign
def test_with_etcd_two_of_four_go_on(tmp_path: Path, seed: int) -> None:
    """It knows who is there, whoever is lost."""
    with netns.network(tmp_path, 7) as net, etcd(net.hosts[6]) as place:
        job = Job(net, tmp_path / "job", "4:6", STEPS, FOUR, etcd=place)
        with job.explained():
            job.start(*net.hosts[:6])
            job.reach(20)
            until("a protected step", lambda: job.protected_step(*members(job)) > 0)
            lost = random.Random(seed).sample(members(job), 2)
            for host in lost:
                host.lose()
            rest = [host for host in net.hosts[:6] if host not in lost]
            assert job.codes(*rest) == [0] * 4
        assert job.steps_done() == STEPS
        assert "→ resumed from memory" in job.said()


@pytest.mark.campaign
@pytest.mark.parametrize("how", ["cut", "pull", "mute"])
@pytest.mark.parametrize("number", [0, 2])
def test_a_node_that_is_cut_off_stops_and_the_others_go_on(
    tmp_path: Path, number: int, how: str
) -> None:
    """Cut silently, loudly, or only in one direction; it had the Store, or had not."""
    with netns.network(tmp_path, 4) as net:
        job = Job(net, tmp_path / "job", "3:4", STEPS, THREE)
        with job.explained():
            job.start(*net.hosts[:3])
            job.reach(10)
            job.start(net.hosts[3])
            job.reach(20)
            off = net.hosts[number]
            if how == "mute":
                for other in net.hosts:
                    if other is not off:
                        off.mute_to(other)
            else:
                getattr(off, how)()
            until("it stops", lambda: not ranks_of(off))
            until("the others go on", lambda: len(members(job)) == 3)
            assert not ranks_of(off)
            off.mend()
            rest = [host for host in net.hosts if host is not off]
            assert job.codes(*rest) == [0] * 3
            # It comes back as a spare, finds nothing to do, or finds nobody any more.
            off.lose()
        assert job.steps_done() == STEPS
        assert "→ resumed from memory" in job.said()
