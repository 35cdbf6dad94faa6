"""SIGKILL of the snapshot process and of its trainers: no committed generation is ever lost."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import smp_lab
from smp_lab import SIZE, Rank, content, run_directory

from mnemo.errors import SmpError
from mnemo.smp import messages as m
from mnemo.smp.link import Link

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mnemo.smp.paths import RunPaths


@pytest.fixture
def paths() -> Iterator[RunPaths]:
    with run_directory() as found:
        yield found


class LinkedRank:
    """One rank as the snapshot engine talks: through a `Link` that outlives its SMP."""

    def __init__(self, paths: RunPaths, rank: int, members: int) -> None:
        self.losses: list[str] = []
        self.link = Link(paths, m.Join(0, rank, members, 60.0), on_loss=self.losses.append)
        self.rank = rank

    def begin(self, tick: int) -> tuple[m.Granted, int]:
        granted, fds = self.link.ask(m.Begin(tick, tick * 10, SIZE), m.Granted)
        self.link.forget(set(granted.live) - {granted.index})
        self.link.hold(granted.index, fds[0])
        return granted, fds[0]

    def write(self, tick: int) -> m.Generation | None:
        granted, fd = self.begin(tick)
        smp_lab.seal(fd, tick, tick * 10, content(self.rank, tick), self.rank)
        return self.link.ask(m.Seal(granted.index, tick), m.Sealed)[0].committed

    def newest(self) -> tuple[int, dict[int, bytes]]:
        return read_newest(self.link)


def read_newest(link: Link) -> tuple[int, dict[int, bytes]]:
    fetched, fds = link.ask(m.Fetch(), m.Fetched)
    assert fetched.generation is not None
    bulks = dict(enumerate(map(smp_lab.read_bulk, fds)))
    for fd in fds:
        os.close(fd)
    return fetched.generation.tick, bulks


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    smp_lab.wait_for_exit(pid)


@pytest.mark.parametrize("phase", ["between", "granted", "half written", "sealed unsaid"])
def test_the_snapshot_process_dies_in_mid_snapshot(paths: RunPaths, phase: str) -> None:
    """One of the ranks starts another, both hand their segments back, nothing is lost."""
    ranks = [LinkedRank(paths, r, 2) for r in range(2)]
    for tick in (1, 2):
        for rank in ranks:
            rank.write(tick)
    ranks[0].link.board.schedule(77)
    if phase != "between":
        _, fd = ranks[0].begin(3)
        if phase == "half written":
            os.pwrite(fd, b"half", 5000)
        elif phase == "sealed unsaid":
            smp_lab.seal(fd, 3, 30, content(0, 3), 0)
    old = ranks[0].link.smp_pid
    kill(old)

    def notice(rank: LinkedRank) -> None:
        with pytest.raises(SmpError):
            rank.write(4)

    with ThreadPoolExecutor(2) as pool:
        for noticed in [pool.submit(notice, rank) for rank in ranks]:
            noticed.result(60)
    new = {rank.link.smp_pid for rank in ranks}
    assert len(new) == 1
    assert old not in new
    assert all(f"process {old} was lost" in rank.losses[0] for rank in ranks)
    assert ranks[0].newest() == (2, {r: content(r, 2) for r in range(2)})
    assert ranks[1].link.board.is_scheduled(77), "the ranks no longer share one board"
    with ThreadPoolExecutor(2) as pool:
        for tick in (5, 6, 7):
            list(pool.map(lambda rank, tick=tick: rank.write(tick), ranks))
    assert ranks[1].newest() == (7, {r: content(r, 7) for r in range(2)})
    for rank in ranks:
        rank.link.leave(finished=True)


def test_it_dies_again_and_again(paths: RunPaths, seed: int) -> None:
    """At random instants of two ranks that write all the time."""
    rng = random.Random(seed)
    ranks = [LinkedRank(paths, r, 2) for r in range(2)]
    for rank in ranks:
        rank.write(1)
    committed = [1]
    barrier = threading.Barrier(2)

    def train(rank: LinkedRank) -> None:
        tick = 1
        while len(rank.losses) < 3:
            tick += 1
            try:
                done = rank.write(tick)
            except SmpError:
                continue
            if done is not None:
                committed.append(done.tick)
        barrier.wait(60)

    with ThreadPoolExecutor(2) as pool:
        training = [pool.submit(train, rank) for rank in ranks]
        for count in range(1, 4):
            threading.Event().wait(rng.uniform(0.05, 0.3))  # the instant is the point
            kill(ranks[0].link.smp_pid)
            while any(len(rank.losses) < count for rank in ranks):
                threading.Event().wait(0.01)
                for future in training:
                    assert not future.done() or future.result() is None
        for future in training:
            future.result(60)
    tick, bulks = ranks[0].newest()
    assert tick >= max(committed)
    assert bulks == {r: content(r, tick) for r in range(2)}
    for rank in ranks:
        rank.link.leave(finished=True)


def test_a_voided_generation_is_not_revived_by_a_later_process(paths: RunPaths) -> None:
    rank = LinkedRank(paths, 0, 1)
    rank.write(1)
    rank.write(2)
    rank.link.ask(m.Resume(-1), m.Done)  # a fresh start: nothing of this is wanted
    kill(rank.link.smp_pid)
    with pytest.raises(SmpError):
        rank.link.ask(m.Status(), m.StatusReply)
    assert rank.link.ask(m.Fetch(), m.Fetched)[0].generation is None
    rank.link.leave(finished=True)


def test_a_trainer_that_dies_before_it_writes_revives_nothing(paths: RunPaths) -> None:
    """A granted segment still holds an older, voided generation's bytes."""
    rank = Rank.join(paths)
    rank.write(1)
    rank.write(2)
    rank.client.tell(m.Resume(1))
    rank.begin(2)
    rank.close()
    again = Rank.join(paths)
    assert again.newest() == (1, {0: content(0, 1)})
    again.close()


def test_a_seal_that_was_not_told_counts(paths: RunPaths) -> None:
    rank = Rank.join(paths)
    rank.write(1)
    granted = rank.begin(2)
    smp_lab.seal(rank.held[granted.index], 2, 20, content(0, 2))
    rank.close()
    again = Rank.join(paths)
    assert again.newest() == (2, {0: content(0, 2)})
    again.close()


TRAINER = """
import os, sys, time
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from smp_lab import Rank
from mnemo.smp.paths import RunPaths

rank = Rank.join(RunPaths(Path(sys.argv[1])))
newest = rank.newest()
tick = newest[0] if newest else 0
child = os.fork()
if child == 0:  # as a loader's worker: holds every socket and outlives its trainer
    os.setsid()
    time.sleep(600)
print(child, flush=True)
while True:
    tick += 1
    rank.write(tick)
    print(tick, flush=True)
"""


def test_a_trainer_is_killed_at_random_instants(paths: RunPaths, seed: int) -> None:
    """Its forked child goes on holding the socket; the next life goes on all the same."""
    rng = random.Random(seed)
    tests = str(Path(smp_lab.__file__).parent)
    children: list[int] = []
    told = 0
    try:
        for _ in range(5):
            trainer = subprocess.Popen(
                [sys.executable, "-c", TRAINER, str(paths.directory), tests],
                stdout=subprocess.PIPE,
                text=True,
            )
            assert trainer.stdout is not None
            children.append(int(trainer.stdout.readline()))
            first = int(trainer.stdout.readline())
            assert first >= told + 1, "a committed generation was lost"
            threading.Event().wait(rng.uniform(0.0, 0.1))  # the instant is the point
            trainer.kill()
            os.kill(children[-1], signal.SIGSTOP)  # it is there, and holds what it holds
            trainer.wait()
            data = os.read(trainer.stdout.fileno(), 1 << 20).decode() if ready(trainer) else ""
            told = max([first, *(int(line) for line in data.split("\n")[:-1] if line)])
            trainer.stdout.close()
            with smp_lab.connect(paths) as tool:
                fetched, fds = tool.ask(m.Fetch(0, fit=0), m.Fetched)
                assert fetched.generation is not None
                assert fetched.generation.tick >= told
                bulk = smp_lab.read_bulk(fds[0])
                os.close(fds[0])
            assert bulk == content(0, fetched.generation.tick)
    finally:
        for child in children:
            kill(child)


def ready(process: subprocess.Popen[str]) -> bool:
    """Whether there is output to read now; the child keeps the pipe open."""
    import select

    return bool(select.select([process.stdout], [], [], 0)[0])
