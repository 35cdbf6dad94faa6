"""Messages between two members of a group. They are not kept, so they cannot be replayed."""

from __future__ import annotations

from abc import abstractmethod
from functools import partial
from typing import TYPE_CHECKING, Any

from mnemo.comm.gloo import LinkError, begun
from mnemo.comm.work import Delegated, Given
from mnemo.errors import GroupBrokenError

if TYPE_CHECKING:
    from collections import Counter
    from collections.abc import Callable, Sequence

    import torch

    from mnemo.comm.c10d import Gloo, Work
    from mnemo.comm.gloo import GlooLinks

    Tensors = list[torch.Tensor]


class Messages:
    """What a group does with them."""

    ranks: tuple[int, ...]
    sent: Counter[int]
    received: Counter[int]

    @property
    @abstractmethod
    def alone(self) -> bool:
        """Whether there is nobody yet to have messages with."""

    live: Callable[[], GlooLinks]
    given: Callable[[list[Any], Tensors], Work]
    on_break: Callable[[str, GlooLinks], object]
    outcome: Callable[[str, GlooLinks], GroupBrokenError]

    def send(self, tensors: Tensors, to: int, tag: int) -> Work:
        """To one rank."""
        self.sent[to] += 1
        return self._message([to], lambda gloo: begun(gloo.send, tensors, to, tag), tensors, [])

    def recv(self, tensors: Tensors, source: int, tag: int) -> Work:
        """From one rank."""
        self.received[source] += 1
        return self._message(
            [source], lambda gloo: begun(gloo.recv, tensors, source, tag), tensors, tensors
        )

    def recv_anysource(self, tensors: Tensors, tag: int) -> Work:
        """From whichever rank is first."""
        everybody = range(len(self.ranks))
        self.received[-1] += 1
        return self._message(
            everybody, lambda gloo: begun(gloo.recv_anysource, tensors, tag), tensors, tensors
        )

    def _message(
        self,
        peers: Sequence[int],
        issue: Callable[[Gloo], Work],
        tensors: Tensors,
        written: Tensors,
    ) -> Work:
        if self.alone:
            return Given(tensors)
        while True:
            try:
                links = self.live()
            except GroupBrokenError:
                return self.given(tensors, written)
            try:
                inner = issue(links.peer(peers))
            except LinkError as error:
                self.on_break(str(error), links)
            else:
                return Delegated(inner, tensors, written, partial(self._failed, links))

    def _failed(self, links: GlooLinks, error: Exception | None) -> GroupBrokenError:
        return self.outcome(str(error or "a message was given up"), links)
