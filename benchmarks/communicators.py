"""One member of 4, 8 and 16 ranks with a 2-D mesh is replaced, against a new start of all groups.

Links (connections between two ranks) are counted from both ends' sockets. What was asked for after
either is one all-reduce in each dimension of the mesh; a collective of the world would connect all
of it again, since gloo cannot replace one member's links: a row of its own shows what that is.
The new process is there, as a warm standby would be, when the time begins.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from benchmarks.harness import Samples
from mnemo import comm

if TYPE_CHECKING:
    from collections.abc import Sequence
    from multiprocessing.connection import Connection

    from typing_extensions import Self

    from benchmarks.harness import Report

MESHES = {4: (2, 2), 8: (2, 4), 16: (4, 4)}
PATIENCE = timedelta(seconds=120)
_fork = multiprocessing.get_context("fork")  # importing torch sixteen times takes long


def run(quick: bool, report: Report) -> None:
    """Measure in turns: a replacement, then a start of all over plain gloo."""
    rounds = 3 if quick else 10
    for size in (4,) if quick else MESHES:
        with _Ranks(size, "mnemo") as ours, _Ranks(size, "gloo") as theirs:
            replaced, anew = [], []
            for epoch in range(1, rounds + 1):
                replaced.append(ours.replace(epoch))
                anew.append(theirs.anew(epoch))
            whole_world = ours.world_links()
        fresh, first = anew[-1], replaced[-1]
        ours_s = Samples([each["seconds"] for each in replaced])
        theirs_s = Samples([each["seconds"] for each in anew])
        speedup = theirs_s.over(ours_s).median
        share = first["opened"] / first["all"]
        untouched = max(each["opened_elsewhere"] for each in replaced)
        report.row(
            ranks=size,
            replace_ms=1000 * ours_s.median,
            anew_gloo_ms=1000 * theirs_s.median,
            speedup=speedup,
            links_opened=first["opened"],
            links_of_the_mesh=first["all"],
            links_anew_gloo=fresh["links"],
            links_opened_with_world=first["opened"] + whole_world,
            groups_touched_of_all_ranks=first["touched"],
            groups_of_all_ranks=first["groups"],
        )
    report.bar("untouched_group_links", untouched, 0, "lower")
    report.bar(f"links_opened_share_{size}", share, 0.35, "lower")
    report.bar(f"reinit_speedup_{size}", speedup, 2, "higher")


class _Ranks:
    """Processes with groups of one backend."""

    def __init__(self, size: int, backend: str) -> None:
        self._size, self._backend = size, backend
        self._host, self._port = _host()
        self._ranks: list[tuple[Any, Connection]] = []

    def __enter__(self) -> Self:
        self._ranks = [self._start(rank, 0) for rank in range(self._size)]
        self._hear()
        return self

    def __exit__(self, *exc: object) -> None:
        for process, _ in self._ranks:
            process.kill()
            process.join()
        self._host.kill()
        self._host.join()

    def _start(self, rank: int, epoch: int) -> tuple[Any, Connection]:
        ours, theirs = _fork.Pipe()
        given = (self._backend, rank, self._size, self._port, epoch, theirs)
        process = _fork.Process(target=_rank, args=given, daemon=True)
        process.start()
        theirs.close()
        return process, ours

    def _hear(self) -> list[Any]:
        said = []
        for _, line in self._ranks:
            if not line.poll(PATIENCE.total_seconds()):
                msg = "a rank says nothing"
                raise RuntimeError(msg)
            said.append(line.recv())
        return said

    def _all(self, *order: Any) -> list[Any]:
        for _, line in self._ranks:
            line.send(order)
        return self._hear()

    def replace(self, epoch: int) -> dict[str, float]:
        """Kill the last rank, have another in its place, and time how all go on."""
        before = self._all("links")
        lost, _ = self._ranks.pop()
        os.kill(lost.pid, signal.SIGKILL)
        lost.join()
        self._all("lost", self._size - 1)
        self._ranks.append(self._start(self._size - 1, epoch))
        self._ranks[-1][1].recv()
        start = time.perf_counter()
        rebuilt = self._all("reconfigure", epoch)
        seconds = time.perf_counter() - start
        after = self._all("links")
        before[-1] = {}
        opened = elsewhere = total = 0
        for old, new, names in zip(before, after, rebuilt, strict=True):
            for name, sockets in new.items():
                fresh = len(sockets - old.get(name, frozenset()))
                total += len(sockets)
                opened += fresh
                elsewhere += 0 if name in names else fresh
        return {
            "seconds": seconds,
            "opened": opened // 2,
            "opened_elsewhere": elsewhere,
            "all": total // 2,
            "touched": sum(len(names) for names in rebuilt),
            "groups": sum(len(each) for each in after),
        }

    def world_links(self) -> int:
        """How many links a collective of the world opens."""
        before = sum(len(s) for each in self._all("links") for s in each.values())
        self._all("world")
        after = sum(len(s) for each in self._all("links") for s in each.values())
        return (after - before) // 2

    def anew(self, epoch: int) -> dict[str, float]:
        """Time how all make all groups again."""
        start = time.perf_counter()
        links = self._all("anew", epoch)
        return {"seconds": time.perf_counter() - start, "links": sum(links) // 2}


def _host() -> tuple[Any, int]:
    ours, theirs = _fork.Pipe()

    def serve() -> None:
        store = dist.TCPStore("127.0.0.1", 0, None, is_master=True, wait_for_workers=False)
        theirs.send(store.port)
        signal.pause()

    process = _fork.Process(target=serve, daemon=True)
    process.start()
    return process, ours.recv()


def _rank(backend: str, rank: int, size: int, port: int, epoch: int, line: Connection) -> None:
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, None, is_master=False, timeout=PATIENCE)
    members = [0] * size
    members[-1] = epoch
    groups = _groups(backend, rank, size, store, epoch)
    kept = [groups]  # a group of gloo's that is destroyed hangs now and then
    if not epoch:
        _use(groups)
    line.send("ready")
    while True:
        what, *given = line.recv()
        answer: Any = None
        if what == "links":
            answer = comm.links()
        elif what == "lost":
            comm.mark_broken(given, "killed")
        elif what == "reconfigure":
            members[-1] = given[0]
            answer = comm.reconfigure(given[0], members, store).rebuilt
            _use(groups)
        elif what == "world":
            dist.all_reduce(torch.ones(1))
        else:
            before = _sockets()
            dist.destroy_process_group()
            groups = _groups(backend, rank, size, store, given[0])
            kept.append(groups)
            _use(groups)
            answer = _sockets() - before - len(groups)  # each listens, too
        line.send(answer)


def _groups(backend: str, rank: int, size: int, store: Any, life: int) -> list[Any]:
    place = dist.PrefixStore(f"life{life}", store)
    dist.init_process_group(backend, store=place, rank=rank, world_size=size, timeout=PATIENCE)
    mesh = init_device_mesh("cpu", MESHES[size], mesh_dim_names=("data", "model"))
    return [mesh.get_group("data"), mesh.get_group("model"), dist.group.WORLD]


def _use(groups: Sequence[Any]) -> None:
    for each in groups[:2]:
        dist.all_reduce(torch.ones(1000), group=each)


def _sockets() -> int:
    return sum(each.is_socket() for each in Path("/proc/self/fd").iterdir())
