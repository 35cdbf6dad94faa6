"""State of the ranks that are left, handed to those that join."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from mnemo.comm.c10d import PrefixStore
from mnemo.comm.gloo import GlooLinks, LinkError
from mnemo.comm.losses import losses
from mnemo.comm.ordered import flattened
from mnemo.comm.stream import receive, send
from mnemo.comm.waiting import PATIENCE, wait_for
from mnemo.errors import CommError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mnemo.comm.c10d import Store


def handover(
    membership_epoch: int,
    store: Store,
    tensors: Sequence[torch.Tensor],
    source: int,
    to: Sequence[int],
) -> None:
    """Give the values of ``tensors`` to ranks that join. Called by ``source`` and by each of these.

    From any thread, also while a group is held. Whatever is in the tensors while it lasts is sent.

    Args:
        membership_epoch: In which they join. It is done once in each.
        store: What all reach. Keys are put below ``mnemo/<membership epoch>``.
        tensors: The same number, kinds and shapes on all of them.
        source: Global rank of the one that has the values.
        to: Global ranks of the others.

    Raises:
        GroupBrokenError: A rank was lost meanwhile, or did not come in time.
        CommError: The tensors do not match.
        IntegrityError: Other bytes came than were sent.
    """
    here = PrefixStore(f"mnemo/{membership_epoch}/handover", store)
    me, said = dist.get_rank(), json.dumps([f"{each.dtype} {list(each.shape)}" for each in tensors])
    links = GlooLinks(here, me, dist.get_world_size(), PATIENCE)
    try:
        with torch.inference_mode(), losses.cutting(links, membership_epoch):
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
