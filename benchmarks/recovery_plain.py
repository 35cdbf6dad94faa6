"""The training of `benchmarks.recovery` without Lightning, as its peers need it."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from data import StandardLibrary
from model import GPT
from torch.nn import functional as F

from benchmarks.recovery_marks import mark

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_CONTEXT, _BATCH = 64, 8


class Training:
    """Model, optimizer, and the batches of one rank, in an order that the step decides."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        torch.manual_seed(1)
        self.model = GPT(context=_CONTEXT)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        data = StandardLibrary(_CONTEXT, _BATCH)
        data.setup("fit")
        self._windows = data.train

    def batches(self, rank: int, ranks: int, step: int) -> Iterator[torch.Tensor]:
        """From the one of this step on."""
        while True:
            order = torch.Generator().manual_seed(step * ranks + rank)
            chosen = torch.randint(len(self._windows), (_BATCH,), generator=order)
            yield torch.stack([self._windows[int(place)] for place in chosen])
            step += 1

    def backward(self, ddp: Callable[[torch.Tensor], Any], window: torch.Tensor, step: int) -> None:
        """Forward and backward pass of this step."""
        mark("forward", step=step)
        logits = ddp(window[:, :-1])
        F.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten()).backward()
        mark("backward", step=step)

    def state(self) -> dict[str, Any]:
        """All that a step changes, by reference."""
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load(self, state: dict[str, Any]) -> None:
        """Have the values of that, and share nothing with it."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
