"""Nodes that are lost while they train: the job comes back, exact, on what takes their place."""

from __future__ import annotations

from pathlib import Path

import netns
from cluster_lab import Job

STEPS = 60


def undisturbed(tmp_path: Path, nodes: int) -> list[tuple[str, dict[int, str]]]:
    """What a training has in the end that nobody disturbs."""
    (tmp_path / "control").mkdir()
    with netns.network(tmp_path / "control", nodes) as net:
        job = Job(net, tmp_path / "control-job", str(nodes), STEPS, {"MNEMO_PROTECT__NODES": "2+1"})
        with job.explained():
            job.start(*net.hosts)
            assert job.codes() == [0] * nodes
        return job.result(nodes)


def test_a_spare_takes_the_place_of_node_0(tmp_path: Path) -> None:
    """Which hosted the Store, rank 0's store and the journal."""
    control = undisturbed(tmp_path, 3)
    with netns.network(tmp_path, 4) as net:
        job = Job(net, tmp_path / "job", "3:4", STEPS, {"MNEMO_PROTECT__NODES": "2+1"})
        with job.explained():
            job.start(*net.hosts)
            job.reach(20)
            net.hosts[0].lose()
            assert job.codes(*net.hosts[1:]) == [0, 0, 0]
        assert job.result(3) == control
