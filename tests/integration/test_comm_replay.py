"""A rank is killed, what the others asked for waits, another process begins again at the boundary.

The test is the agent: it sees who died, tells the others, and starts the new process. What the
lost rank kept outside itself is a file.
"""

from __future__ import annotations

import hashlib
import os
import signal
import threading
from typing import TYPE_CHECKING, Any, NamedTuple

import comm_lab
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mnemo import comm
from mnemo.comm import ddp as comm_ddp

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

STEPS = 6


class Outcome(NamedTuple):
    """Of a rank that trained to the end."""

    losses: list[float]
    hashed: str
    passes: int


class _Model(nn.Module):
    """With dropout, and buffers of each rank's own."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(64, 512)
        self.norm = nn.BatchNorm1d(512)
        self.last = nn.Linear(512, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.nn.functional.dropout(self.norm(self.first(x).relu()), 0.1)
        return self.last(x)


class _Training:
    """Training that keeps its own small state in a file at each boundary."""

    def __init__(self, rank: int, folder: Path) -> None:
        torch.manual_seed(0)
        self.model = _Model()
        self.ddp = DistributedDataParallel(self.model, bucket_cap_mb=0.05, broadcast_buffers=False)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        for each in self.model.parameters():  # as after a first step: the same tensors on all
            state = self.optimizer.state[each]
            state["step"] = torch.tensor(0.0)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(each), torch.zeros_like(each)
        torch.manual_seed(rank)
        self.ledger = folder / f"rank{rank}"
        self.rank, self.tick, self.passes = rank, 0, 0
        self.losses: list[float] = []
        self.die_at: Any = None

    def shared(self) -> list[torch.Tensor]:
        """What all ranks have alike."""
        states = [self.optimizer.state[each] for each in self.model.parameters()]
        moments = [each[name] for each in states for name in ("step", "exp_avg", "exp_avg_sq")]
        return [*self.model.parameters(), *moments]

    def keep(self) -> None:
        """A boundary."""
        own = {
            "tick": self.tick,
            "losses": self.losses,
            "random": torch.get_rng_state(),
            "buffers": list(self.model.buffers()),
            "layout": comm_ddp.layout(self.ddp),
        }
        torch.save(own, self.ledger.with_suffix(".new"))
        self.ledger.with_suffix(".new").rename(self.ledger)
        comm.mark(self.tick)

    def resume(self, own: dict[str, Any]) -> None:
        """Be where a lost process was."""
        self.tick, self.losses = own["tick"], own["losses"]
        torch.set_rng_state(own["random"])
        with torch.no_grad():
            for each, value in zip(self.model.buffers(), own["buffers"], strict=True):
                each.copy_(value)
        comm_ddp.adopt(self.ddp, own["layout"])

    def run(self) -> Outcome:
        """To the end."""
        while self.tick < STEPS:
            self.at("loading")
            x = torch.randn(16, 64)
            self.at("forward")
            self.passes += 1
            loss = (self.ddp(x) - x).pow(2).mean()
            self.at("backward")
            self.optimizer.zero_grad()
            loss.backward()
            self.at("before the update")
            if self.tick:
                comm.pass_update(self.tick)
            self.optimizer.step()
            mean = loss.detach().clone()
            dist.all_reduce(mean)
            self.losses.append(mean.item())
            self.tick += 1
            self.keep()
            self.at("boundary")
        return Outcome(self.losses, _hash(self.shared()), self.passes)

    def at(self, place: str) -> None:
        """Where a rank may die."""
        if self.die_at == (self.tick, place):
            if place != "backward":
                os.kill(os.getpid(), signal.SIGKILL)
            # Its gradient is the last one.
            first = next(self.model.parameters())
            first.register_post_accumulate_grad_hook(lambda _: os.kill(os.getpid(), signal.SIGKILL))


def _hash(tensors: Iterable[torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for each in tensors:
        digest.update(each.detach().numpy().tobytes())
    return digest.hexdigest()


def _rank(
    rank: int, port: int, talk: comm_lab.Talk, size: int, folder: Path, epoch: int, die_at: Any
) -> Outcome:
    """Train; ``epoch`` is that in which this process comes."""
    comm.mode.replaceable, comm.mode.alone = True, epoch > 0
    with comm_lab.group("mnemo", rank, size, port) as store:
        training = _Training(rank, folder)
        training.die_at = die_at
        if epoch:
            own = torch.load(training.ledger)
            training.resume(own)
            talk.say(own["tick"])
            _, members, joining = talk.hear()
            _join(training, store, epoch, members, joining)
        threading.Thread(target=_obey, args=(talk, training, store), daemon=True).start()
        return training.run()


def _obey(talk: comm_lab.Talk, training: _Training, store: Any) -> None:
    """Do as the agent says."""
    while True:
        epoch, lost = talk.hear()
        comm.hold(lost, f"ranks {lost} are lost")
        epoch, members, joining = talk.hear()
        _join(training, store, epoch, members, joining)
        talk.say("back")


def _join(
    training: _Training, store: Any, epoch: int, members: list[int], joining: dict[int, int]
) -> None:
    source = min(set(range(len(members))) - set(joining))
    if training.rank == source or training.rank in joining:
        place = dist.PrefixStore(f"state/{epoch}", store)
        comm.handover(place, training.shared(), source, list(joining))
    comm.reconfigure(epoch, members, store, joining)


def _undisturbed(size: int, folder: Path) -> list[Outcome]:
    found: list[Outcome] = comm_lab.run_all(_rank, size, size, folder, 0, None)
    return found


@pytest.mark.parametrize("place", ["backward"])
def test_a_killed_rank_is_replaced_and_nothing_is_done_twice(place: str, tmp_path: Path) -> None:
    size, lost, tick = 3, 1, 3
    expected = _undisturbed(size, tmp_path)
    assert len({each.hashed for each in expected}) == 1
    with comm_lab.world() as world:
        ranks = [
            world.start(_rank, rank, size, tmp_path, 0, (tick, place) if rank == lost else None)
            for rank in range(size)
        ]
        ranks[lost].join()
        others = [each for rank, each in enumerate(ranks) if rank != lost]
        for each in others:
            each.tell((1, [lost]))
        new = world.start(_rank, lost, size, tmp_path, 1, None)
        joining = {lost: new.hear()}
        assert joining[lost] == tick
        members = [1 if rank == lost else 0 for rank in range(size)]
        for each in (*others, new):
            each.tell((1, members, joining))
        assert [each.hear() for each in others] == ["back"] * 2
        ranks[lost] = new
        found = [each.result() for each in ranks]
    assert [each.hashed for each in found] == [each.hashed for each in expected]
    assert [each.losses for each in found] == [each.losses for each in expected]
    assert [each.passes for each in found] == [STEPS, STEPS - tick, STEPS]
