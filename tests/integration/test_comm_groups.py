"""Which groups a loss touches: those with the lost rank, those caught in the middle, no others."""

from __future__ import annotations

import signal
from typing import Any

import comm_lab
import pytest
import torch
import torch.distributed as dist

from mnemo import comm
from mnemo.errors import CommError, GroupBrokenError

PAIRS = ([0, 1], [2, 3], [0, 2], [1, 3])


def _mesh_of_four(rank: int, port: int, talk: comm_lab.Talk, epoch: int, torn: bool) -> Any:
    """What became of the two pairs of this rank: name of the others, rebuilt, links kept."""
    members = [0, 0, 0, epoch]
    with comm_lab.group("mnemo", rank, 4, port, str(epoch)) as store:
        pairs = {tuple(each): dist.new_group(each) for each in PAIRS}
        mine = {each: pair for each, pair in pairs.items() if rank in each}
        assert len(comm.links()) == 3
        if not epoch:
            for pair in mine.values():
                dist.all_reduce(torch.ones(1), group=pair)
            before = comm.links()
            talk.say("up")
            talk.hear()
            comm.mark_broken({3}, "rank 3 is gone")
            if torn and rank == 0:  # it went on further than rank 2
                ahead = dist.all_reduce(torch.ones(1), group=mine[0, 2], async_op=True)
            talk.hear()
            members[3] = 1
        changes = comm.reconfigure(1, members, store)
        after = comm.links()
        assert after["0"] == frozenset()  # the world has not been used
        for pair in mine.values():
            x = torch.tensor([float(rank)])
            dist.all_reduce(x, group=pair)
            assert isinstance(pair, comm.Group)
            assert x.item() == sum(pair.ranks)
        comm.check()
        if epoch:
            return None
        if torn and rank == 0:
            with pytest.raises(GroupBrokenError):  # and not done over the new links
                ahead.wait()
        return {
            each: (pair.key in changes.rebuilt, after[pair.key] == before[pair.key])
            for each, pair in mine.items()
            if isinstance(pair, comm.Group)
        }


@pytest.mark.parametrize("torn", [False, True])
def test_only_what_was_touched_is_rebuilt(torn: bool) -> None:
    with comm_lab.world() as world:
        *others, lost = world.start_all(_mesh_of_four, 4, 0, torn)
        assert [each.hear() for each in (*others, lost)] == ["up"] * 4
        lost.signal(signal.SIGKILL)
        for each in others:
            each.tell("lost")
        new = world.start(_mesh_of_four, 3, 1, torn)
        for each in others:
            each.tell("go")
        found = [each.result() for each in others]
        assert new.result() is None
    kept, rebuilt = (False, True), (True, False)
    across = rebuilt if torn else kept
    assert found == [
        {(0, 1): kept, (0, 2): across},
        {(0, 1): kept, (1, 3): rebuilt},
        {(2, 3): rebuilt, (0, 2): across},
    ]


def _receive(rank: int, port: int, talk: comm_lab.Talk) -> None:
    with comm_lab.group("mnemo", rank, 2, port):
        x = torch.zeros(1_000_000)
        if rank == 1:
            dist.send(x, 0)
            talk.say("sent")
            talk.hear()  # killed here
        dist.recv(x, 1)
        pending = dist.irecv(x, 1)
        assert pending is not None
        talk.say("waiting")
        with pytest.raises(GroupBrokenError):
            pending.wait()
        assert x.isnan().all()
        with pytest.raises(GroupBrokenError):
            dist.send(x, 1)


def test_a_message_that_never_comes() -> None:
    with comm_lab.world() as world:
        receiver, sender = world.start_all(_receive, 2)
        assert (sender.hear(), receiver.hear()) == ("sent", "waiting")
        sender.signal(signal.SIGKILL)
        receiver.result()


def _mistakes(rank: int, port: int, talk: comm_lab.Talk) -> None:
    del talk
    with comm_lab.group("mnemo", rank, 2, port) as store:
        with pytest.raises(RuntimeError, match="invalid tensor size"):
            dist.all_gather([torch.ones(2), torch.ones(2)], torch.ones(3))
        with pytest.raises(CommError, match=r"members \[0\] do not fit a world of 2 ranks"):
            comm.reconfigure(1, [0], store)
        with pytest.raises(CommError, match="none of the future"):
            comm.reconfigure(1, [0, 2], store)
        x = torch.ones(3)
        dist.all_reduce(x)  # a mistake of the caller's breaks nothing
        assert x.tolist() == [2.0] * 3


def test_mistakes_are_told_and_break_nothing() -> None:
    comm_lab.run_all(_mistakes, 2)
