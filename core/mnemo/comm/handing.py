"""State of the ranks that are left, handed to those that join."""

from __future__ import annotations

import contextlib
import json
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from mnemo.comm.c10d import PrefixStore
from mnemo.comm.gloo import GlooLinks, LinkError
from mnemo.comm.ordered import flattened
from mnemo.comm.stream import receive, send
from mnemo.comm.waiting import PATIENCE, wait_for
from mnemo.errors import CommError, GroupBrokenError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from mnemo.comm.c10d import Store

under_way: set[GlooLinks] = set()
"""Links that a loss of any rank cuts."""


@contextlib.contextmanager
def cuttable(links: GlooLinks) -> Iterator[None]:
    """A loss cuts them while this is entered.

    Raises:
        GroupBrokenError: They broke.
    """
    under_way.add(links)
    try:
        yield
    except LinkError as error:
        raise GroupBrokenError("of those that hand state over", str(error)) from None
    finally:
        under_way.discard(links)


def handover(store: Store, tensors: Sequence[torch.Tensor], source: int, to: Sequence[int]) -> None:
    """Give the values of ``tensors`` to ranks that join. Called by ``source`` and by each of these.

    From any thread, also while a group is held. Whatever is in the tensors while it lasts is sent.

    Args:
        store: What all reach; of this handing over alone, as keys are used once.
        tensors: The same number, kinds and shapes on all of them.
        source: Global rank of the one that has the values.
        to: Global ranks of the others.

    Raises:
        GroupBrokenError: A rank was lost meanwhile, or did not come in time.
        CommError: The tensors do not match.
        IntegrityError: Other bytes came than were sent.
    """
    here = PrefixStore("handover", store)
    me, said = dist.get_rank(), json.dumps([f"{each.dtype} {list(each.shape)}" for each in tensors])
    links = GlooLinks(here, me, dist.get_world_size(), PATIENCE)
    try:
        with torch.inference_mode(), cuttable(links):
            if me == source:
                here.set("tensors", said)
                pieces = [_bytes(each) for each in tensors]
                links.use_with(to, lambda gloo: send(gloo, to, pieces))
            else:
                _see_that_they_match(here, said, links)
                _receive_into(tensors, links, source)
    finally:
        links.cut("the handing over has ended")


def _see_that_they_match(store: Store, said: str, links: GlooLinks) -> None:
    if wait_for(store, ["tensors"], PATIENCE, lambda: links.is_cut is not None):
        raise LinkError(links.is_cut or f"nothing was handed over within {PATIENCE}")
    if store.get("tensors").decode() != said:
        msg = "other tensors are handed over than those that are here: numbers, kinds or shapes"
        raise CommError(msg)


def _receive_into(tensors: Sequence[torch.Tensor], links: GlooLinks, source: int) -> None:
    whole = [each.contiguous() for each in tensors]
    pieces = [_bytes(each) for each in whole]
    links.use_with([source], lambda gloo: receive(gloo, source, pieces))
    for each, value in zip(tensors, whole, strict=True):
        if each is not value:
            each.copy_(value)


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return flattened(tensor.detach()).view(torch.uint8)
