"""How long a lost shard takes to come back, over reading the same bytes once over the same link.

Nodes are processes on loopback. What each may send is limited, to the same rate for both: that is
the link. Reading is one node that sends another a shard; rebuilding is all survivors that gather,
decode and send. ``loopback`` is without a limit, where it is two cores that all share.
"""

from __future__ import annotations

from benchmarks.group import Node, everybody, group_of, introduce
from benchmarks.harness import Report, Samples

SHAPES = ((4, 1), (4, 2), (8, 2))
LINK = 40e6


def run(quick: bool, report: Report) -> None:
    """Fill ``report``."""
    worst = 0.0
    for link, rate in (("40 MB/s", LINK), ("loopback", float("inf"))):
        for n, m in SHAPES:
            size = (24 if quick else 96) << 20
            reading, rebuilding = _measure(n, m, size, rate, rounds=1 if quick else 5)
            ratio = rebuilding.over(reading)
            low, high = ratio.quartiles
            report.row(
                link=link,
                what=f"{n - m}+{m}",
                shard_mib=size / 2**20,
                read_s=reading.median,
                rebuild_s=rebuilding.median,
                over_read=ratio.median,
                q1=low,
                q3=high,
            )
            if rate == LINK:
                worst = max(worst, ratio.median)
    report.bar("rebuild_over_read", worst, 1.5, "lower")


def _measure(n: int, m: int, size: int, rate: float, *, rounds: int) -> tuple[Samples, Samples]:
    reading, rebuilding = [], []
    with group_of(n, m, rate=rate) as nodes:
        everybody(nodes, "commit", 1, size)
        everybody(nodes, "protect", 1)
        for number in range(rounds):
            lost = 1 + number % (n - 1)
            before, shard = nodes[lost].ask("digest", 1), nodes[lost].ask("shard", 1)
            reading.append(nodes[lost].ask("read", nodes[0].name, shard))
            nodes[lost].kill()
            nodes[lost] = Node(lost, n, m, rate)
            introduce(nodes)
            rebuilding.append(nodes[lost].ask("rebuild"))
            if nodes[lost].ask("digest", 1) != before:
                raise RuntimeError(f"{nodes[lost].name} came back with other bytes")
            nodes[lost].ask("start")
    return Samples(reading), Samples(rebuilding)
