"""What waits when a rank is lost, what a new process is given, and what cannot be replayed."""

from __future__ import annotations

import os
import re
import signal
from typing import TYPE_CHECKING, Any

import comm_lab
import pytest
import torch
import torch.distributed as dist

from mnemo import comm
from mnemo.errors import GroupBrokenError, ReplayError

if TYPE_CHECKING:
    from collections.abc import Callable

PAIRS = ([0, 1], [2, 3], [0, 2], [1, 3])


def _mesh_of_four(rank: int, port: int, talk: comm_lab.Talk, epoch: int) -> Any:
    """Which pairs of this rank kept their links when rank 3 was replaced."""
    comm.mode.replaceable, comm.mode.alone = True, epoch > 0
    with comm_lab.group("mnemo", rank, 4, port) as store:
        pairs = {tuple(each): dist.new_group(each) for each in PAIRS}
        mine = {each: pair for each, pair in pairs.items() if rank in each}
        if epoch:
            comm.reconfigure(1, [0, 0, 0, 1], store, {3: 0})
        else:
            comm.mark(0)
        for pair in mine.values():
            _reduces(pair, rank)
        before = comm.links()
        if not epoch:
            talk.say("up")
            talk.hear()
            comm.hold(1, {3}, "rank 3 is gone")
            talk.hear()
            comm.reconfigure(1, [0, 0, 0, 1], store, {3: 0})
        for pair in mine.values():
            _reduces(pair, rank)
        after = comm.links()
        dist.barrier()  # nobody leaves before
        return {each for each, pair in mine.items() if after[pair.key] == before[pair.key]}


def _reduces(pair: Any, rank: int) -> None:
    x = torch.tensor([float(rank)])
    dist.all_reduce(x, group=pair)
    assert x.item() == sum(pair.ranks)


def test_groups_without_the_lost_rank_keep_their_links() -> None:
    with comm_lab.world() as world:
        *others, lost = world.start_all(_mesh_of_four, 4, 0)
        assert [each.hear() for each in (*others, lost)] == ["up"] * 4
        lost.signal(signal.SIGKILL)
        for each in others:
            each.tell("lost")
        new = world.start(_mesh_of_four, 3, 1)
        for each in others:
            each.tell("go")
        assert [each.result() for each in others] == [{(0, 1), (0, 2)}, {(0, 1)}, {(0, 2)}]
        new.result()


def _wait_in_vain(rank: int, port: int, talk: comm_lab.Talk) -> None:
    comm.mode.replaceable, comm.mode.patience_s = True, 0.3
    with comm_lab.group("mnemo", rank, 2, port):
        comm.mark(0)
        x = torch.ones(3)
        dist.all_reduce(x)
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        with pytest.raises(GroupBrokenError, match=r"within 0\.3 s nobody said what to do"):
            dist.all_reduce(x)
        with pytest.raises(GroupBrokenError):
            comm.check()
        del talk


def test_a_break_that_nobody_tells_of_is_raised_in_the_end() -> None:
    with comm_lab.world() as world:
        waiting, lost = world.start_all(_wait_in_vain, 2)
        lost.join()
        waiting.result()


def _give_up(rank: int, port: int, talk: comm_lab.Talk) -> None:
    comm.mode.replaceable = True
    with comm_lab.group("mnemo", rank, 2, port):
        comm.mark(0)
        x = torch.ones(3)
        if rank == 1:
            talk.hear()  # killed here
        pending = dist.all_reduce(x, async_op=True)
        assert pending is not None
        comm.hold(1, {1}, "rank 1 is gone")
        assert not pending.is_completed()
        assert x.tolist() == [1.0] * 3
        comm.give_up("nobody comes")
        with pytest.raises(GroupBrokenError, match="nobody comes"):
            pending.wait()
        assert x.isnan().all()


def test_what_waits_can_be_given_up() -> None:
    with comm_lab.world() as world:
        waiting, _ = world.start_all(_give_up, 2)
        waiting.result()


def _scatter_a_reduction(x: torch.Tensor, rank: int) -> None:
    del rank
    dist.reduce_scatter_tensor(torch.empty(2), x)


def _exchange_messages(x: torch.Tensor, rank: int) -> None:
    dist.send(x, 1) if rank == 0 else dist.recv(x, 0)


def _pass_an_update(x: torch.Tensor, rank: int) -> None:
    del x, rank
    comm.pass_update(0)


def _do(rank: int, port: int, talk: comm_lab.Talk, epoch: int, what: Callable[..., None]) -> str:
    comm.mode.replaceable, comm.mode.alone = True, epoch > 0
    with comm_lab.group("mnemo", rank, 2, port) as store:
        if not epoch:
            comm.mark(0)
            what(torch.ones(4), rank)
            talk.say("done")
            talk.hear()
            comm.hold(1, {1}, "rank 1 is gone")
        with pytest.raises(ReplayError) as caught:
            comm.reconfigure(1, [0, 1], store, {1: 0})
        return str(caught.value)


@pytest.mark.parametrize(
    ("what", "why"),
    [
        (_scatter_a_reduction, "those that differ by rank"),
        (_exchange_messages, "rank 0 asked for messages since the boundary"),
        (_pass_an_update, "rank 0 has begun the update after boundary 0"),
    ],
)
def test_what_cannot_be_replayed_is_said_alike_by_all(what: Any, why: str) -> None:
    with comm_lab.world() as world:
        left, lost = world.start_all(_do, 2, 0, what)
        assert [left.hear(), lost.hear()] == ["done"] * 2
        lost.signal(signal.SIGKILL)
        new = world.start(_do, 1, 1, what)
        left.tell("go")
        said = [left.result(), new.result()]
        assert said[0] == said[1]
        assert re.search(why, said[0])


def _start_otherwise(rank: int, port: int, talk: comm_lab.Talk, epoch: int) -> Any:
    comm.mode.replaceable, comm.mode.alone = True, epoch > 0
    with comm_lab.group("mnemo", rank, 2, port):
        said = torch.tensor([os.getpid()])
        dist.broadcast(said, 0)
        with comm.unrecorded():
            dist.all_reduce(torch.ones(5))
        if not epoch:
            dist.all_reduce(torch.ones(3))
            comm.mark(0)
            talk.say(said.item())
            talk.hear()  # killed here
        with pytest.raises(ReplayError, match=r"all-gather .* where the first start had .*reduce"):
            dist.all_gather([torch.ones(1)] * 2, torch.ones(1))
        return said.item()


def test_a_new_process_gets_what_the_first_one_got_at_its_start() -> None:
    with comm_lab.world() as world:
        first, other = world.start_all(_start_otherwise, 2, 0)
        said = first.hear()
        assert other.hear() == said
        first.signal(signal.SIGKILL)
        assert world.start(_start_otherwise, 0, 1).result() == said
