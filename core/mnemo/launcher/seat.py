"""Where this node's ranks stand among all ranks of a job."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Seat:
    """One node's part in one life.

    Attributes:
        world_size: Ranks on all nodes.
        master_port: Where rank 0 hosts the ranks' store.
        master_addr: The address of its node.
        restarts: Lives that the job has had before this one.
        node_rank: Which of the nodes this is.
        nodes: How many there are.
        first_rank: The first of this node's ranks.
        cause: What ended the life before, where that was no failure of a rank; empty otherwise.
    """

    world_size: int
    master_port: int
    master_addr: str
    restarts: int = 0
    node_rank: int = 0
    nodes: int = 1
    first_rank: int = 0
    cause: str = ""
