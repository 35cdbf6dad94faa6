"""A rank is lost in mid reduction, another takes its place, and the same groups go on."""

from __future__ import annotations

import hashlib
import os
import signal
import threading
import time
from typing import Any

import comm_lab
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mnemo import comm
from mnemo.errors import GroupBrokenError

STEPS, LOST_AT = 8, 4
UNBLOCKED_WITHIN_S = 0.1


class _Training:
    """A small model under DDP, each step's data of its own."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 64))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        self.step = 0
        self.ddp: Any = None

    def wrap(self) -> None:
        """Make DDP, or begin anew with the same object."""
        if self.ddp is None:
            self.ddp = DistributedDataParallel(self.model, bucket_cap_mb=0.05)
        else:
            self.ddp.__init__(self.model, bucket_cap_mb=0.05)

    def share(self) -> None:
        """All have the state of rank 0."""
        state = [(self.step, self.optimizer.state_dict()) if self.rank == 0 else None]
        dist.broadcast_object_list(state, 0)
        for each in self.model.parameters():
            dist.broadcast(each.detach(), 0)
        if self.rank != 0:
            assert state[0] is not None
            self.step = state[0][0]
            self.optimizer.load_state_dict(state[0][1])

    def run(self, until: int) -> None:
        """Train; stop where a group breaks."""
        while self.step < until:
            torch.manual_seed(1000 * self.step + self.rank)
            x = torch.randn(16, 64)
            self.optimizer.zero_grad()
            (self.ddp(x) - x).pow(2).mean().backward()
            comm.check()
            self.optimizer.step()
            self.step += 1

    def hash(self) -> str:
        """Of all parameters."""
        digest = hashlib.sha256()
        for each in self.model.parameters():
            digest.update(each.detach().numpy().tobytes())
        return digest.hexdigest()


def _train(rank: int, port: int, talk: comm_lab.Talk, size: int, epoch: int, end: Any) -> Any:
    """Train to the end; ``end`` says how the last rank of the first life leaves, if it does."""
    members = [0] * (size - 1) + [epoch]
    with comm_lab.group("mnemo", rank, size, port, str(epoch)) as store:
        world = dist.group.WORLD
        halves = [dist.new_group(each) for each in ([0, 1], list(range(2, size)))]
        training = _Training(rank)
        if epoch:
            comm.reconfigure(epoch, members, store)
            training.wrap()
            training.share()
        else:
            training.wrap()
        told = []
        if end is not None and not epoch:
            training.run(LOST_AT)
            if rank == size - 1:
                first = next(training.model.parameters())  # its gradient is the last one
                first.register_post_accumulate_grad_hook(lambda _: os.kill(os.getpid(), end))
            threading.Thread(target=lambda: _obey(talk, told), daemon=True).start()
            with pytest.raises(GroupBrokenError, match=r"rank 3 is gone|gloo|Connection"):
                training.run(STEPS)
            gone_on = time.monotonic()
            talk.say(training.step)
            while not told or told[-1] != "go":
                time.sleep(0.001)
            unblocked = gone_on - told[0]
            changes = comm.reconfigure(1, [0] * (size - 1) + [1], store)
            half = halves[rank // 2]
            assert isinstance(half, comm.Group)
            assert (half.key in changes.rebuilt) == (rank >= 2)
            training.wrap()
            training.share()
            training.run(STEPS)
            assert dist.group.WORLD is world
            return training.hash(), unblocked
        training.run(STEPS)
        return training.hash(), 0.0


def _obey(talk: comm_lab.Talk, told: list[Any]) -> None:
    assert talk.hear() == "lost"
    told.append(time.monotonic())
    comm.mark_broken({3}, "rank 3 is gone")
    told.append(talk.hear())


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGSTOP])
def test_the_others_go_on_with_the_same_groups(end: signal.Signals) -> None:
    undisturbed = {hashed for hashed, _ in comm_lab.run_all(_train, 4, 4, 0, None)}
    assert len(undisturbed) == 1
    with comm_lab.world() as world:
        *others, lost = world.start_all(_train, 4, 4, 0, end)
        comm_lab.wait_for_state(lost.pid, "Z" if end == signal.SIGKILL else "T")
        for each in others:
            each.tell("lost")
        assert [each.hear() for each in others] == [LOST_AT] * 3
        new = world.start(_train, 3, 4, 1, None)
        for each in others:
            each.tell("go")
        results = [each.result() for each in (*others, new)]
        assert {hashed for hashed, _ in results} == undisturbed
        slowest = max(unblocked for _, unblocked in results)
        print(f"the last one went on {1000 * slowest:.1f} ms after it was told")
        assert slowest < UNBLOCKED_WITHIN_S


def _reduce_after(rank: int, port: int, talk: comm_lab.Talk, size: int) -> Any:
    with comm_lab.group("mnemo", rank, size, port) as store:
        x = torch.ones(4_000_000)
        dist.all_reduce(x)
        if rank == size - 1:
            os.kill(os.getpid(), signal.SIGSTOP)
            with pytest.raises(GroupBrokenError):
                dist.all_reduce(x)
            return None
        x.fill_(1)
        pending = dist.all_reduce(x, async_op=True)
        assert pending is not None
        talk.hear()
        comm.mark_broken({size - 1}, "stopped")
        with pytest.raises(GroupBrokenError, match=r"stopped|gloo"):
            pending.wait()
        assert x.isnan().all()  # nobody takes it for a result
        with pytest.raises(GroupBrokenError):
            comm.check()
        with pytest.raises(GroupBrokenError):
            dist.all_reduce(x)
        x.fill_(7)
        talk.say("unblocked")
        talk.hear()  # the stopped one went on, and has left
        changed = x != 7
        del store
        return int(changed.sum())


def test_a_stopped_rank_that_goes_on_overwrites_nothing() -> None:
    with comm_lab.world() as world:
        *others, stopped = world.start_all(_reduce_after, 3, 3)
        comm_lab.wait_for_state(stopped.pid, "T")
        for each in others:
            each.tell("stopped")
        assert [each.hear() for each in others] == ["unblocked"] * 2
        stopped.signal(signal.SIGCONT)
        assert stopped.result() is None
        for each in others:
            each.tell("look")
        assert [each.result() for each in others] == [0, 0]
